/*
 * bulk.c: one variant of the functions that copy and hash long runs of bytes.
 *
 * Compiled once for each variant with its own machine flags and ENGINE_BULK_SUFFIX (see CMakeLists.txt).
 *
 * The device reads a filled slot next, and a training reads restored tensors much later.  So long runs are stored past
 * the caches: a cached store first reads the line that it overwrites, which costs a third of the memory's bandwidth.  Measured with 500 MB in blocks of 4 MiB: on one AMD EPYC memcpy moved 7.2 GB/s, this 9.4, and
 * two pages at a time 10.7; on a newer one (family 26) memcpy 20.5, this 24.5, and two pages at a time 14.2.
 *
 * Bytes that are hashed on the way are loaded once and stored twice: past the caches, and into a piece that stays in the
 * nearest cache, where they are hashed.  Reading them back from memory instead would add a third to the memory's
 * traffic, while the device reads from memory too (docs/decisions/0015-blocks-are-hashed-while-they-are-copied.md).
 */
#include "staging/bulk.h"

#include <string.h>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

/* The canonical form, highest byte first: the digits in a manifest and in the output of other tools. */
static eng_hash canonical(XXH128_hash_t value)
{
    XXH128_canonical_t digest;
    eng_hash hash;
    _Static_assert(sizeof digest == sizeof hash, "eng_hash holds one XXH3-128");
    XXH128_canonicalFromHash(&digest, value);
    memcpy(&hash, &digest, sizeof hash);
    return hash;
}

static eng_hash hash(const void *bytes, size_t nbytes)
{
    return canonical(XXH3_128bits(bytes, nbytes));
}

static void begin(XXH3_state_t *state)
{
    XXH3_128bits_reset(state);
}

static void add(XXH3_state_t *state, const uint8_t *bytes, size_t nbytes)
{
    XXH3_128bits_update(state, bytes, nbytes);
}

static eng_hash end(const XXH3_state_t *state)
{
    return canonical(XXH3_128bits_digest(state));
}

static void copy_and_add_cached(XXH3_state_t *state, uint8_t *to, const uint8_t *from, size_t nbytes)
{
    for (size_t done = 0; done < nbytes; done += BULK_PIECE_BYTES) {
        const size_t piece_bytes = nbytes - done < BULK_PIECE_BYTES ? nbytes - done : BULK_PIECE_BYTES;
        memcpy(to + done, from + done, piece_bytes);
        add(state, to + done, piece_bytes);
    }
}

#if defined(__x86_64__)
enum {
    LINE_BYTES = 64,
    PREFETCH_BYTES = 256, /* four lines ahead, also into the next page, which hardware prefetchers do not reach */
    STREAM_BYTES_MIN = 64 << 10 /* a shorter run may be in the cache, and the set-up costs more than it saves */
};

/* A line in registers.  Four named fields: a compiler that does not unroll keeps an array in memory.  Moves are 16 bytes
 * also with AVX2: from an unaligned source every second move of 32 bytes crosses a line, and 500 MB took 40 ms instead
 * of 31. */
typedef struct {
    __m128i a, b, c, d;
} cache_line;

static cache_line load_line(const uint8_t *from)
{
    const __m128i *at = (const __m128i *)from;
    return (cache_line){_mm_loadu_si128(at), _mm_loadu_si128(at + 1), _mm_loadu_si128(at + 2), _mm_loadu_si128(at + 3)};
}

static void stream_line(uint8_t *to, cache_line line)
{
    __m128i *at = (__m128i *)to;
    _mm_stream_si128(at, line.a);
    _mm_stream_si128(at + 1, line.b);
    _mm_stream_si128(at + 2, line.c);
    _mm_stream_si128(at + 3, line.d);
}

static void keep_line(uint8_t *to, cache_line line)
{
    __m128i *at = (__m128i *)to;
    _mm_store_si128(at, line.a);
    _mm_store_si128(at + 1, line.b);
    _mm_store_si128(at + 2, line.c);
    _mm_store_si128(at + 3, line.d);
}

static void prefetch(const uint8_t *from)
{
    _mm_prefetch((const char *)from + PREFETCH_BYTES, _MM_HINT_T0);
}

/* The number of bytes before the first full line of `to`. */
static size_t head_bytes(const uint8_t *to)
{
    return (size_t)(-(uintptr_t)to & (LINE_BYTES - 1));
}

static void copy(uint8_t *to, const uint8_t *from, size_t nbytes)
{
    size_t done = head_bytes(to);
    if (nbytes < STREAM_BYTES_MIN) {
        memcpy(to, from, nbytes);
        return;
    }
    memcpy(to, from, done);
    for (; nbytes - done >= LINE_BYTES; done += LINE_BYTES) {
        prefetch(from + done);
        stream_line(to + done, load_line(from + done));
    }
    memcpy(to + done, from + done, nbytes - done);
    _mm_sfence(); /* streamed stores are visible before the block's state says so */
}

static void copy_and_add(XXH3_state_t *state, uint8_t *to, const uint8_t *from, size_t nbytes)
{
    uint8_t piece[BULK_PIECE_BYTES] __attribute__((aligned(LINE_BYTES)));
    size_t done = head_bytes(to);
    if (nbytes < STREAM_BYTES_MIN) {
        copy_and_add_cached(state, to, from, nbytes);
        return;
    }
    copy_and_add_cached(state, to, from, done);
    while (nbytes - done >= LINE_BYTES) {
        size_t kept = 0;
        for (; kept < BULK_PIECE_BYTES && nbytes - done >= LINE_BYTES; kept += LINE_BYTES, done += LINE_BYTES) {
            prefetch(from + done);
            const cache_line line = load_line(from + done);
            stream_line(to + done, line);
            keep_line(piece + kept, line);
        }
        add(state, piece, kept);
    }
    copy_and_add_cached(state, to + done, from + done, nbytes - done);
    _mm_sfence(); /* once: with one for each piece the call took 1.5 times as long */
}
#else
static void copy(uint8_t *to, const uint8_t *from, size_t nbytes)
{
    memcpy(to, from, nbytes);
}

static void copy_and_add(XXH3_state_t *state, uint8_t *to, const uint8_t *from, size_t nbytes)
{
    copy_and_add_cached(state, to, from, nbytes);
}
#endif

#define JOIN_NAME(a, b) a##b
#define TABLE_NAME(suffix) JOIN_NAME(bulk, suffix)

const bulk_functions TABLE_NAME(ENGINE_BULK_SUFFIX) = {hash, begin, add, end, copy, copy_and_add};
