/*
 * checksum.h: XXH3-64, streaming, in the variant the processor runs fastest.
 *
 * checksum.c is compiled once for every variant, each giving one table; checksum_variant() picks at run time.
 * All variants give the same numbers (XXH3 is defined independently of vector width), so a checkpoint written
 * on one machine verifies on another.
 */
#ifndef CHECKSUM_H
#define CHECKSUM_H

#include <stdalign.h>
#include <stddef.h>
#include <stdint.h>

/* Room for XXH3_state_t, whose size and 64-byte alignment checksum.c asserts. */
typedef struct {
    alignas(64) unsigned char opaque[576];
} checksum_state;

typedef struct {
    void (*begin)(checksum_state *state, uint64_t seed);
    void (*update)(checksum_state *state, const void *bytes, size_t nbytes);
    uint64_t (*end)(const checksum_state *state);
    uint64_t (*whole)(const void *bytes, size_t nbytes, uint64_t seed);
} checksum_table;

extern const checksum_table checksum_table_baseline;
#if defined(__x86_64__)
extern const checksum_table checksum_table_avx2;
#endif

static inline const checksum_table *checksum_variant(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2"))
        return &checksum_table_avx2;
#endif
    return &checksum_table_baseline;
}

#endif
