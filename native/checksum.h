/*
 * checksum.h: XXH3-64 in the variant the processor runs fastest.
 *
 * checksum.c is compiled once for every variant, each giving one function; checksum_variant() picks at run time.
 * All variants give the same numbers (XXH3 is defined independently of vector width), so a checkpoint written
 * on one machine verifies on another.
 */
#ifndef CHECKSUM_H
#define CHECKSUM_H

#include <stddef.h>
#include <stdint.h>

typedef uint64_t (*checksum_function)(const void *bytes, size_t nbytes, uint64_t seed);

extern const checksum_function checksum_baseline;
#if defined(__x86_64__)
extern const checksum_function checksum_avx2;
#endif

static inline checksum_function checksum_variant(void)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2"))
        return checksum_avx2;
#endif
    return checksum_baseline;
}

#endif
