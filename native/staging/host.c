/*
 * host.c: staging between host memory and slots, as host.h specifies.
 *
 * bulk.c copies runs of plain memory.  Strided tensors are copied here, a piece at a time, so that each piece is hashed
 * while it is in the nearest cache.
 */
#include "staging/host.h"

#include <string.h>

#include "staging/bulk.h"

/* Copy `count` elements between a strided row and packed bytes.  A size known to the compiler makes the copy of
 * one element one move. */
#define COPY_ROW(size)                                                  \
    for (uint64_t i = 0; i < count; i++, row += step, packed += (size)) \
        if (scatter)                                                    \
            memcpy(row, packed, (size));                                \
        else                                                            \
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

/* Pack a range of a strided tensor, and add the packed bytes to the hash. */
static void pack_and_add(const bulk_functions *bulk, XXH3_state_t *state, const eng_source *source, uint64_t offset,
                         uint8_t *to, uint64_t nbytes)
{
    for (uint64_t done = 0; done < nbytes; done += BULK_PIECE_BYTES) {
        const uint64_t piece_bytes = nbytes - done < BULK_PIECE_BYTES ? nbytes - done : BULK_PIECE_BYTES;
        copy_strided(source, offset + done, to + done, piece_bytes, 0);
        bulk->add(state, to + done, piece_bytes);
    }
}

static uint8_t *source_memory(const eng_source *source, uint64_t offset)
{
    return (uint8_t *)(uintptr_t)source->address + offset;
}

eng_hash host_gather(const eng_job *job, const eng_block *block, uint8_t *slot)
{
    const eng_extent *extents = job->extents + block->extent_start;
    const bulk_functions *bulk = bulk_variant();
    uint64_t filled = 0;
    XXH3_state_t state;

    bulk->begin(&state);
    for (uint32_t i = 0; i < block->extent_count; i++) {
        const eng_extent *extent = &extents[i];
        const eng_source *source = &job->sources[extent->source];
        if (source->ndim == 0)
            bulk->copy_and_add(&state, slot + filled, source_memory(source, extent->source_offset), extent->nbytes);
        else
            pack_and_add(bulk, &state, source, extent->source_offset, slot + filled, extent->nbytes);
        filled += extent->nbytes;
    }
    memset(slot + filled, 0, (size_t)(-filled & (ENG_ALIGNMENT - 1)));
    return bulk->end(&state);
}

void host_scatter(const eng_job *job, const eng_block *block, const uint8_t *slot)
{
    const eng_extent *extents = job->extents + block->extent_start;
    const bulk_functions *bulk = bulk_variant();

    for (uint32_t i = 0; i < block->extent_count; i++) {
        const eng_extent *extent = &extents[i];
        const eng_source *source = &job->sources[extent->source];
        const uint8_t *from = slot + extent->block_offset;
        if (source->ndim == 0)
            bulk->copy(source_memory(source, extent->source_offset), from, extent->nbytes);
        else /* scattering does not write to the slot */
            copy_strided(source, extent->source_offset, (uint8_t *)from, extent->nbytes, 1);
    }
}

eng_hash eng_hash_bytes(const void *bytes, uint64_t nbytes)
{
    return bulk_variant()->hash(bytes, nbytes);
}
