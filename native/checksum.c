/*
 * checksum.c: one variant of XXH3-64, straight from xxHash's header.
 *
 * Compiled once for each variant with its own machine flags and ENGINE_CHECKSUM_SUFFIX (see CMakeLists.txt).
 */
#include "checksum.h"

#include <string.h>

#define JOIN_NAME(a, b) a##b
#define TABLE_NAME(suffix) JOIN_NAME(checksum, suffix)

static uint64_t whole(const void *bytes, size_t nbytes, uint64_t seed)
{
    return XXH3_64bits_withSeed(bytes, nbytes, seed);
}

static void begin(XXH3_state_t *state, uint64_t seed)
{
    memset(state, 0, sizeof *state); /* the reset looks at the seed that was there */
    XXH3_64bits_reset_withSeed(state, seed);
}

static void add(XXH3_state_t *state, const void *bytes, size_t nbytes)
{
    XXH3_64bits_update(state, bytes, nbytes);
}

static uint64_t end(const XXH3_state_t *state)
{
    return XXH3_64bits_digest(state);
}

const checksum_functions TABLE_NAME(ENGINE_CHECKSUM_SUFFIX) = {whole, begin, add, end};
