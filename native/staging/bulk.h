/*
 * bulk.h: copying past the caches, and hashing, in the variant that the processor runs fastest.
 *
 * bulk.c is compiled once for every variant, and each gives one table of functions; bulk_variant() picks at run time.  All
 * variants give the same hashes (XXH3 is defined independently of vector width), so a checkpoint written on one machine
 * verifies on another.  Called by host.c.
 */
#ifndef BULK_H
#define BULK_H

#include <stddef.h>
#include <stdint.h>

/* Makes every xxHash function static, so that the variants do not collide and nothing is linked. */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "engine_native.h"

enum {
    /* Bytes that are copied and then hashed at a time.  500 MB took 29.6 ms with this, 29.9 with 2048 bytes, 32.9 with
     * 1024, 28.6 to 35.4 with 8192, and 24.8 without hashing (medians of 9, three alignments, on the host of
     * docs/perf.md).  Every itemsize divides it. */
    BULK_PIECE_BYTES = 4096
};

typedef struct {
    /* The hash of contiguous bytes. */
    eng_hash (*hash)(const void *bytes, size_t nbytes);
    /* The same in pieces: `end` returns the hash of everything that was added since `begin`. */
    void (*begin)(XXH3_state_t *state);
    void (*add)(XXH3_state_t *state, const uint8_t *bytes, size_t nbytes);
    eng_hash (*end)(const XXH3_state_t *state);
    /* Copy; the ranges do not overlap. */
    void (*copy)(uint8_t *to, const uint8_t *from, size_t nbytes);
    /* Copy, and add the bytes in `to`, even if `from` changes during the call. */
    void (*copy_and_add)(XXH3_state_t *state, uint8_t *to, const uint8_t *from, size_t nbytes);
} bulk_functions;

extern const bulk_functions bulk_baseline, bulk_avx2; /* the second where the build has ENGINE_BULK_AVX2 */

static inline const bulk_functions *bulk_variant(void)
{
#if defined(ENGINE_BULK_AVX2)
    if (__builtin_cpu_supports("avx2"))
        return &bulk_avx2;
#endif
    return &bulk_baseline;
}

#endif
