/*
 * checksum.c: one variant of XXH3-64, straight from xxHash's header.
 *
 * Compiled once for each variant with its own machine flags and ENGINE_CHECKSUM_SUFFIX (see CMakeLists.txt).
 * XXH_INLINE_ALL makes every xxHash function static, so the variants do not collide and nothing is linked.
 */
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "checksum.h"

#define JOIN_NAME(a, b) a##b
#define FUNCTION_NAME(suffix) JOIN_NAME(checksum, suffix)

static uint64_t checksum(const void *bytes, size_t nbytes, uint64_t seed)
{
    return XXH3_64bits_withSeed(bytes, nbytes, seed);
}

const checksum_function FUNCTION_NAME(ENGINE_CHECKSUM_SUFFIX) = checksum;
