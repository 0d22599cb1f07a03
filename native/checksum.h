/*
 * checksum.h: XXH3-64 in the variant the processor runs fastest, of bytes that lie together or come in pieces.
 *
 * checksum.c is compiled once for every variant, each giving one table of functions; checksum_variant() picks at run
 * time.  All variants give the same numbers (XXH3 is defined independently of vector width), so a checkpoint written
 * on one machine verifies on another.
 */
#ifndef CHECKSUM_H
#define CHECKSUM_H

#include <stddef.h>
#include <stdint.h>

/* Makes every xxHash function static, so that the variants do not collide and nothing is linked. */
#define XXH_INLINE_ALL
#include <xxhash.h>

typedef struct {
    uint64_t (*whole)(const void *bytes, size_t nbytes, uint64_t seed);
    /* The same in pieces: what `end` returns is what `whole` does of all that was added since `begin`. */
    void (*begin)(XXH3_state_t *state, uint64_t seed);
    void (*add)(XXH3_state_t *state, const void *bytes, size_t nbytes);
    uint64_t (*end)(const XXH3_state_t *state);
} checksum_functions;

extern const checksum_functions checksum_baseline;
#if defined(__x86_64__)
extern const checksum_functions checksum_avx2;
#endif

static inline const checksum_functions *checksum_variant(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2"))
        return &checksum_avx2;
#endif
    return &checksum_baseline;
}

#endif
