/*
 * host.c: staging between host memory and slots (host.h says what; this is how).
 *
 * What is copied into a slot is next read by the device, and what is copied out of one by a training, much later. So
 * long runs are stored past the caches: a cached store first reads the line that it overwrites, which costs a third of
 * the memory's bandwidth.  Measured with 500 MB in blocks of 4 MiB: on one AMD EPYC memcpy moved 7.2 GB/s, this 9.4, and
 * two pages at a time 10.7; on a newer one (family 26) memcpy 20.5, this 24.5, and two pages at a time 14.2.
 *
 * What is copied into a slot is hashed on its way, piece by piece, each from the nearest cache: read from the slot again
 * it would be a third more of what memory moves, at the time when the device reads from it too
 * (docs/decisions/0015-blocks-are-hashed-while-they-are-copied.md).
 */
#include "host.h"

#include <string.h>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "checksum.h"

uint64_t host_block_seed(uint64_t seed, uint32_t file, uint64_t file_offset)
{
    const uint64_t place[3] = {seed, file, file_offset};
    return checksum_baseline.whole(place, sizeof place, 0);
}

enum {
    /* What is hashed at a time of what is copied; every itemsize divides it.  500 MB took 29.6 ms past the caches, with 2048
     * bytes 29.9, with 1024 32.9, with 8192 from 28.6 to 35.4, and 24.8 without hashing (medians of 9, three alignments, on
     * the host of docs/perf.md). */
    PIECE_BYTES = 4096
};

/* The checksum of a block that is being copied. */
typedef struct {
    const checksum_functions *functions;
    XXH3_state_t state;
} block_hash;

/* What is hashed is what has arrived. */
static void copy_cached(uint8_t *to, const uint8_t *from, size_t nbytes, block_hash *hash)
{
    for (size_t done = 0; done < nbytes; done += PIECE_BYTES) {
        const size_t piece_bytes = nbytes - done < PIECE_BYTES ? nbytes - done : PIECE_BYTES;
        memcpy(to + done, from + done, piece_bytes);
        hash->functions->add(&hash->state, to + done, piece_bytes);
    }
}

#if defined(__x86_64__)
enum {
    LINE_BYTES = 64,
    PREFETCH_BYTES = 256, /* four lines ahead, into the next page too, where the hardware's prefetchers do not go */
    STREAM_BYTES_MIN = 64 << 10 /* below this a run may be in the cache, and the setting up is worth more */
};

typedef struct {
    __m128i a, b, c, d; /* names, since a compiler that does not unroll keeps an array in memory */
} cache_line;

static cache_line load_line(const uint8_t *from)
{
    const __m128i *at = (const __m128i *)from;
    _mm_prefetch((const char *)from + PREFETCH_BYTES, _MM_HINT_T0);
    return (cache_line){_mm_loadu_si128(at), _mm_loadu_si128(at + 1), _mm_loadu_si128(at + 2), _mm_loadu_si128(at + 3)};
}

/* Past the caches. */
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

static void copy_run(uint8_t *to, const uint8_t *from, size_t nbytes)
{
    const size_t head = (size_t)(-(uintptr_t)to & (LINE_BYTES - 1));
    if (nbytes < STREAM_BYTES_MIN) {
        memcpy(to, from, nbytes);
        return;
    }
    memcpy(to, from, head);
    size_t done = head;
    for (; nbytes - done >= LINE_BYTES; done += LINE_BYTES)
        stream_line(to + done, load_line(from + done));
    memcpy(to + done, from + done, nbytes - done);
    _mm_sfence(); /* before whoever is told of it looks */
}

static void copy_and_hash(uint8_t *to, const uint8_t *from, size_t nbytes, block_hash *hash)
{
    uint8_t piece[PIECE_BYTES] __attribute__((aligned(LINE_BYTES)));
    const size_t head = (size_t)(-(uintptr_t)to & (LINE_BYTES - 1));
    if (nbytes < STREAM_BYTES_MIN) {
        copy_cached(to, from, nbytes, hash);
        return;
    }
    copy_cached(to, from, head, hash);
    size_t done = head;
    while (nbytes - done >= LINE_BYTES) {
        size_t kept = 0;
        for (; kept < PIECE_BYTES && nbytes - done >= LINE_BYTES; kept += LINE_BYTES, done += LINE_BYTES) {
            const cache_line line = load_line(from + done);
            stream_line(to + done, line);
            keep_line(piece + kept, line);
        }
        hash->functions->add(&hash->state, piece, kept);
    }
    copy_cached(to + done, from + done, nbytes - done, hash);
    _mm_sfence(); /* once: with one a piece it took half as long again */
}
#else
static void copy_run(uint8_t *to, const uint8_t *from, size_t nbytes)
{
    memcpy(to, from, nbytes);
}

static void copy_and_hash(uint8_t *to, const uint8_t *from, size_t nbytes, block_hash *hash)
{
    copy_cached(to, from, nbytes, hash);
}
#endif

/* Copy `count` elements between a strided row and packed bytes.  A size known to the compiler makes the copy of
 * one element one move. */
#define COPY_ROW(size)                                                              \
    for (uint64_t i = 0; i < count; i++, row += step, packed += (size))              \
        if (scatter)                                                                \
            memcpy(row, packed, (size));                                            \
        else                                                                        \
            memcpy(packed, row, (size))

static void copy_row(uint8_t *row, int64_t step, uint8_t *packed, uint64_t count, uint32_t itemsize, int scatter)
{
    switch (itemsize) {
    case 1: COPY_ROW(1); break;
    case 2: COPY_ROW(2); break;
    case 4: COPY_ROW(4); break;
    case 8: COPY_ROW(8); break;
    default: COPY_ROW(16); break;
    }
}

/* Copy a range of a strided tensor's row-major serialisation, to or from packed bytes. */
static void copy_strided(const eng_source *source, uint64_t offset, uint8_t *packed, uint64_t nbytes, int scatter)
{
    const int64_t itemsize = source->itemsize;
    const uint32_t last = source->ndim - 1;
    int64_t index[ENG_DIMS_MAX];
    uint64_t element = offset / source->itemsize;
    uint64_t left = nbytes / source->itemsize;
    uint8_t *at = (uint8_t *)(uintptr_t)source->address;

    for (uint32_t d = source->ndim; d-- > 0; element /= (uint64_t)source->shape[d]) {
        index[d] = (int64_t)(element % (uint64_t)source->shape[d]);
        at += index[d] * source->stride[d] * itemsize;
    }
    while (left > 0) {
        uint64_t count = (uint64_t)(source->shape[last] - index[last]);
        if (count > left)
            count = left;
        copy_row(at, source->stride[last] * itemsize, packed, count, source->itemsize, scatter);
        packed += count * source->itemsize;
        left -= count;
        index[last] += (int64_t)count;
        at += (int64_t)count * source->stride[last] * itemsize;
        for (uint32_t d = last; d > 0 && index[d] == source->shape[d]; d--) {
            at += (source->stride[d - 1] - source->shape[d] * source->stride[d]) * itemsize;
            index[d] = 0;
            index[d - 1]++;
        }
    }
}

static void pack_and_hash(const eng_source *source, uint64_t offset, uint8_t *to, uint64_t nbytes, block_hash *hash)
{
    for (uint64_t done = 0; done < nbytes; done += PIECE_BYTES) {
        const uint64_t piece_bytes = nbytes - done < PIECE_BYTES ? nbytes - done : PIECE_BYTES;
        copy_strided(source, offset + done, to + done, piece_bytes, 0);
        hash->functions->add(&hash->state, to + done, piece_bytes);
    }
}

static uint8_t *source_memory(const eng_source *source, uint64_t offset)
{
    return (uint8_t *)(uintptr_t)source->address + offset;
}

uint64_t host_gather(const eng_job *job, const eng_block *block, uint8_t *slot)
{
    const eng_extent *extents = job->extents + block->extent_start;
    uint64_t filled = 0;
    block_hash hash = {.functions = checksum_variant()};

    hash.functions->begin(&hash.state, host_block_seed(job->seed, block->file, block->file_offset));
    for (uint32_t i = 0; i < block->extent_count; i++) {
        const eng_extent *extent = &extents[i];
        const eng_source *source = &job->sources[extent->source];
        if (source->ndim == 0)
            copy_and_hash(slot + filled, source_memory(source, extent->source_offset), extent->nbytes, &hash);
        else
            pack_and_hash(source, extent->source_offset, slot + filled, extent->nbytes, &hash);
        filled += extent->nbytes;
    }
    memset(slot + filled, 0, (size_t)(-filled & (ENG_ALIGNMENT - 1)));
    return hash.functions->end(&hash.state);
}

uint64_t host_checksum(const eng_job *job, const eng_block *block, const uint8_t *slot)
{
    const uint64_t seed = host_block_seed(job->seed, block->file, block->file_offset);
    return checksum_variant()->whole(slot, block->nbytes, seed);
}

void host_scatter(const eng_job *job, const eng_block *block, const uint8_t *slot)
{
    const eng_extent *extents = job->extents + block->extent_start;
    for (uint32_t i = 0; i < block->extent_count; i++) {
        const eng_extent *extent = &extents[i];
        const eng_source *source = &job->sources[extent->source];
        const uint8_t *from = slot + extent->block_offset;
        if (source->ndim == 0)
            copy_run(source_memory(source, extent->source_offset), from, extent->nbytes);
        else /* which does not write to the slot when it scatters */
            copy_strided(source, extent->source_offset, (uint8_t *)from, extent->nbytes, 1);
    }
}

uint64_t eng_block_checksum(const void *bytes, uint64_t nbytes, uint64_t seed, uint32_t file, uint64_t file_offset)
{
    return checksum_variant()->whole(bytes, nbytes, host_block_seed(seed, file, file_offset));
}
