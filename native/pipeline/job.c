/*
 * job.c: the consistency rules of a job (job.h says why).
 *
 * Addresses of sources cannot be checked.  Python must pass valid ones and keep their memory alive until the job has
 * ended (engine/io/job.py).
 */
#include "pipeline/job.h"

#include <stddef.h>

/* No address space is larger (x86-64 with five levels of page tables: 2^57), and within it the sums that walk a strided
 * source do not overflow. */
static const int64_t REACH_MAX = (int64_t)1 << 57;

static int source_is_valid(const eng_source *source)
{
    if (source->ndim == 0)
        return 1;
    if (source->ndim > ENG_DIMS_MAX || source->itemsize == 0 || source->itemsize > 16)
        return 0;
    if ((source->itemsize & (source->itemsize - 1)) != 0)
        return 0;
    uint64_t nbytes = source->itemsize;
    for (uint32_t d = 0; d < source->ndim; d++) {
        int64_t reach;
        if (source->shape[d] <= 0 || __builtin_mul_overflow(nbytes, (uint64_t)source->shape[d], &nbytes))
            return 0;
        if (__builtin_mul_overflow(source->shape[d], source->stride[d], &reach)
            || __builtin_mul_overflow(reach, (int64_t)source->itemsize, &reach))
            return 0;
        if (reach > REACH_MAX || reach < -REACH_MAX)
            return 0;
    }
    return nbytes <= INT64_MAX && nbytes == source->nbytes;
}

static int extent_is_valid(const eng_job *job, const eng_block *block, const eng_extent *extent)
{
    uint64_t end;
    if (extent->source >= job->source_count || extent->nbytes == 0)
        return 0;
    if ((uint64_t)extent->block_offset + extent->nbytes > block->nbytes)
        return 0;
    if (__builtin_add_overflow(extent->source_offset, (uint64_t)extent->nbytes, &end))
        return 0;
    const eng_source *source = &job->sources[extent->source];
    if (end > source->nbytes)
        return 0;
    return source->ndim == 0
        || (extent->source_offset % source->itemsize == 0 && extent->nbytes % source->itemsize == 0);
}

static int block_is_valid(const eng_job *job, const eng_block *block, uint32_t slot_bytes)
{
    if (block->nbytes == 0 || block->nbytes > slot_bytes || block->file >= job->file_count)
        return 0;
    if (block->file_offset % ENG_ALIGNMENT != 0 || block->file_offset > INT64_MAX - (uint64_t)slot_bytes)
        return 0;
    if ((uint64_t)block->extent_start + block->extent_count > job->extent_count)
        return 0;
    uint64_t covered = 0;
    for (uint32_t i = 0; i < block->extent_count; i++) {
        const eng_extent *extent = &job->extents[block->extent_start + i];
        if (!extent_is_valid(job, block, extent))
            return 0;
        /* A write stores every byte of its block exactly once, in order; a read may want only some. */
        if (job->direction == ENG_WRITE && extent->block_offset != covered)
            return 0;
        covered += extent->nbytes;
    }
    return job->direction == ENG_READ || covered == block->nbytes;
}

/* What a job may ask for at once. */
static int request_is_valid(const eng_job *job, uint32_t withheld_count)
{
    if (withheld_count > 0 && (withheld_count != job->block_count || job->direction == ENG_READ))
        return 0;
    /* ENG_URGENT is about the first blocks of an order that is not known yet. */
    if (withheld_count > 0 && job->urgent_count > 0)
        return 0;
    /* A clean block is not copied, so it could not be compared with its first hash. */
    return !(job->checked && job->guard != NULL);
}

int job_is_valid(const eng_job *job, uint32_t withheld_count, uint32_t slot_bytes)
{
    if (job->direction > ENG_READ || job->block_count == 0 || job->urgent_count > job->block_count)
        return 0;
    if (job->file_count == 0 || !request_is_valid(job, withheld_count))
        return 0;
    for (uint32_t i = 0; i < job->source_count; i++)
        if (!source_is_valid(&job->sources[i]))
            return 0;
    for (uint32_t i = 0; i < job->block_count; i++)
        if (!block_is_valid(job, &job->blocks[i], slot_bytes))
            return 0;
    for (uint32_t i = 0; i < job->block_count - withheld_count; i++)
        if (job->order[i] >= job->block_count)
            return 0;
    return 1;
}
