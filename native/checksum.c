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
#define TABLE_NAME(suffix) JOIN_NAME(checksum_table, suffix)

_Static_assert(sizeof(XXH3_state_t) <= sizeof(checksum_state), "checksum_state is too small");
_Static_assert(alignof(checksum_state) >= 64, "XXH3_state_t wants 64-byte alignment");

static void begin(checksum_state *state, uint64_t seed)
{
    XXH3_state_t *xxh3 = (XXH3_state_t *)state->opaque;
    XXH3_INITSTATE(xxh3);
    XXH3_64bits_reset_withSeed(xxh3, seed);
}

static void update(checksum_state *state, const void *bytes, size_t nbytes)
{
    XXH3_64bits_update((XXH3_state_t *)state->opaque, bytes, nbytes);
}

static uint64_t end(const checksum_state *state)
{
    return XXH3_64bits_digest((const XXH3_state_t *)state->opaque);
}

static uint64_t whole(const void *bytes, size_t nbytes, uint64_t seed)
{
    return XXH3_64bits_withSeed(bytes, nbytes, seed);
}

const checksum_table TABLE_NAME(ENGINE_CHECKSUM_SUFFIX) = {begin, update, end, whole};
