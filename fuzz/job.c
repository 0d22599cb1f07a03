/*
 * No job, not even a wrong one, makes the pipeline access memory that is not the job's, hang, or report a false result.
 *
 * Every input makes a right job, changes a few of its numbers, and gives it to a pipeline whose I/O table is in memory
 * and fails as the input says.  The invariants: ASan and UBSan report nothing; the job ends; a contradictory job fails as
 * invalid before a byte moves; a job that has not failed has every block in state WRITTEN; a block that reaches the table
 * of a write has its checksum, and only known blocks do not reach it.
 *
 * The caller's side of the contract (engine_native.h, "Ownership") is kept: arrays have the length of their counts, and
 * addresses are valid.  A job that passes validation and would break that is not run.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine_native.h"
#include "pipeline/job.h"
#include "staging/host.h"

enum {
    SLOTS = 3,
    SLOT_BYTES = 2 * ENG_ALIGNMENT,
    SOURCES_MAX = 4,
    BLOCKS_MAX = 8,
    EXTENTS_MAX = 32,
    FILES = 3,
    FILES_MAX = 16,     /* beyond it there are no descriptors; more than a ring has places for */
    SHAPE_MAX = 12,     /* small enough that a strided source is a few pages at most */
    SPAN_MAX = 1 << 20, /* of a strided source whose numbers were changed: beyond it is no memory of ours */
    POKES_MAX = 4,
    STAGING_THREADS_MAX = 3,
    REFUSALS_MAX = 16   /* well below those after which the pipeline takes the ring for gone (pipeline.c) */
};

/* Far above the time of any input: it ends one that hangs. */
static const uint64_t HANG_NS = 20000000000u;

typedef struct {
    const uint8_t *at;
    size_t left;
} input;

typedef struct {
    eng_job job;
    eng_source sources[SOURCES_MAX];
    eng_block blocks[BLOCKS_MAX];
    eng_extent extents[EXTENTS_MAX];
    uint32_t order[BLOCKS_MAX];
    eng_hash checksums[BLOCKS_MAX];
    uint8_t states[BLOCKS_MAX];
    eng_hash known[BLOCKS_MAX]; /* the hashes that a right write would have */
    uint8_t is_known[BLOCKS_MAX];
    uint8_t *memory[SOURCES_MAX];
    uint64_t memory_bytes[SOURCES_MAX];
} trial;

/* The state of the pipeline's thread, set while it has no job. */
static trial *current;
static input script;
static eng_completion completed[SLOTS];
static uint32_t completed_count, refusal_count;
static eng_pipeline *pipelines[STAGING_THREADS_MAX + 1]; /* by the number of their staging threads */
static int broken;

static void fail(const char *what, int line)
{
    fprintf(stderr, "fuzz/job.c:%d: not so: %s\n", line, what);
    abort();
}

#define REQUIRE(truth) ((truth) ? (void)0 : fail(#truth, __LINE__))

/* ---- the input ---- */

static uint64_t take(input *in, size_t nbytes)
{
    uint64_t value = 0;
    for (size_t i = 0; i < nbytes && in->left > 0; i++, in->at++, in->left--)
        value = value << 8 | *in->at;
    return value;
}

static uint32_t below(input *in, uint32_t bound)
{
    return (uint32_t)(take(in, bound > 256 ? 2 : 1) % bound);
}

/* ---- a job that is right ---- */

/* The least and greatest offset in bytes that a strided source reaches; 0 if that is beyond SPAN_MAX. */
static int span(const eng_source *source, int64_t *low, int64_t *high)
{
    *low = 0, *high = source->itemsize;
    for (uint32_t d = 0; d < source->ndim; d++) {
        int64_t reach;
        if (source->shape[d] <= 0 || __builtin_mul_overflow(source->shape[d] - 1, source->stride[d], &reach)
            || __builtin_mul_overflow(reach, (int64_t)source->itemsize, &reach) || reach > SPAN_MAX || reach < -SPAN_MAX)
            return 0;
        *(reach < 0 ? low : high) += reach;
    }
    return *high - *low <= SPAN_MAX;
}

static uint64_t stored_bytes(const eng_source *source, uint64_t memory_bytes)
{
    uint64_t nbytes = source->itemsize;
    for (uint32_t d = 0; d < source->ndim; d++)
        nbytes *= (uint64_t)source->shape[d];
    return source->ndim > 0 ? nbytes : memory_bytes;
}

static void make_source(trial *t, uint32_t index, input *in)
{
    eng_source *source = &t->sources[index];
    int64_t low = 0, high;
    source->ndim = below(in, 2) ? 0 : 1 + below(in, 3);
    source->itemsize = 1u << below(in, 5);
    high = 1 + below(in, 4 * ENG_ALIGNMENT);
    for (uint32_t d = 0; d < source->ndim; d++) {
        source->shape[d] = 1 + below(in, SHAPE_MAX);
        source->stride[d] = (int64_t)below(in, 64) - 32;
    }
    if (source->ndim > 0)
        REQUIRE(span(source, &low, &high));
    t->memory_bytes[index] = (uint64_t)(high - low);
    t->memory[index] = malloc(t->memory_bytes[index]);
    REQUIRE(t->memory[index] != NULL);
    memset(t->memory[index], (int)index + 1, t->memory_bytes[index]);
    source->address = (uint64_t)(uintptr_t)t->memory[index] - (uint64_t)low;
    source->nbytes = stored_bytes(source, t->memory_bytes[index]);
}

/* One extent that continues a block; 0 bytes if it has no room. */
static uint32_t make_extent(trial *t, uint32_t block_offset, input *in)
{
    eng_extent *extent = &t->extents[t->job.extent_count];
    const uint32_t index = below(in, t->job.source_count);
    const eng_source *source = &t->sources[index];
    const uint64_t unit = source->ndim > 0 ? source->itemsize : 1;
    const uint64_t units = stored_bytes(source, t->memory_bytes[index]) / unit;
    const uint64_t start = take(in, 2) % units;
    uint64_t nbytes = (1 + take(in, 2) % (units - start)) * unit;
    if (nbytes > SLOT_BYTES - block_offset)
        nbytes = (SLOT_BYTES - block_offset) / unit * unit;
    *extent = (eng_extent){start * unit, block_offset, (uint32_t)nbytes, index, 0};
    t->job.extent_count += nbytes > 0;
    return (uint32_t)nbytes;
}

static uint8_t stored_byte(uint64_t file_offset)
{
    return (uint8_t)(file_offset ^ file_offset >> 12);
}

static void make_block(trial *t, uint32_t index, input *in)
{
    uint8_t content[SLOT_BYTES];
    eng_block *block = &t->blocks[index];
    *block = (eng_block){(uint64_t)index * SLOT_BYTES, 0, below(in, t->job.file_count), t->job.extent_count, 0};
    for (uint32_t wanted = 1 + below(in, 3); wanted > 0 && t->job.extent_count < EXTENTS_MAX; wanted--)
        block->nbytes += make_extent(t, block->nbytes, in);
    block->extent_count = t->job.extent_count - block->extent_start;
    t->order[index] = index;
    for (uint32_t i = 0; i < block->nbytes; i++)
        content[i] = stored_byte(block->file_offset + i);
    t->checksums[index] = eng_hash_bytes(content, block->nbytes);
}

static void make_job(trial *t, input *in)
{
    eng_job *job = &t->job;
    *job = (eng_job){.direction = below(in, 2), .checked = below(in, 2)};
    const uint64_t known = take(in, 8);
    job->file_count = 1 + below(in, FILES);
    job->source_count = 1 + below(in, SOURCES_MAX);
    for (uint32_t i = 0; i < job->source_count; i++)
        make_source(t, i, in);
    const uint32_t count = 1 + below(in, BLOCKS_MAX);
    for (uint32_t i = 0; i < count && job->extent_count < EXTENTS_MAX; i++, job->block_count++)
        make_block(t, i, in);
    job->urgent_count = below(in, job->block_count + 1);
    job->sources = t->sources, job->blocks = t->blocks, job->extents = t->extents;
    for (uint32_t i = 0; i < job->block_count; i++) {
        uint8_t content[SLOT_BYTES];
        t->known[i] = host_gather(job, &t->blocks[i], content);
        t->is_known[i] = known >> i & 1;
    }
    job->order = t->order, job->checksums = t->checksums, job->states = t->states;
}

/* ---- changes of the job ---- */

static uint64_t hostile(input *in)
{
    static const uint64_t EDGES[] = {0, 1, 7, 4095, 4096, 8192, INT32_MAX, UINT32_MAX, INT64_MAX, 1ull << 63, UINT64_MAX};
    const uint32_t choice = below(in, 16);
    return choice < sizeof EDGES / sizeof *EDGES ? EDGES[choice] : take(in, 8);
}

static void poke(trial *t, input *in)
{
    eng_job *job = &t->job;
    eng_source *source = &t->sources[below(in, SOURCES_MAX)];
    eng_block *block = &t->blocks[below(in, BLOCKS_MAX)];
    eng_extent *extent = &t->extents[below(in, EXTENTS_MAX)];
    const uint32_t choice = below(in, 20);
    const uint64_t value = hostile(in);
    switch (choice) {
    case 0: job->direction = (uint32_t)value; break;
    case 1: job->checked = (uint32_t)value; break;
    case 2: job->source_count = (uint32_t)(value % (SOURCES_MAX + 1)); break; /* counts stay within the arrays */
    case 3: job->extent_count = (uint32_t)(value % (EXTENTS_MAX + 1)); break;
    case 4: job->block_count = (uint32_t)(value % (BLOCKS_MAX + 1)); break;
    case 5: job->urgent_count = (uint32_t)value; break;
    case 6: job->file_count = (uint32_t)value; break;
    case 7: source->itemsize = (uint32_t)value; break;
    case 8: source->ndim = (uint32_t)value; break;
    case 9: source->shape[below(in, ENG_DIMS_MAX)] = (int64_t)value; break;
    case 10: source->stride[below(in, ENG_DIMS_MAX)] = (int64_t)value; break;
    case 11: block->file_offset = value; break;
    case 12: block->nbytes = (uint32_t)value; break;
    case 13: block->file = (uint32_t)value; break;
    case 14: block->extent_start = (uint32_t)value; break;
    case 15: block->extent_count = (uint32_t)value; break;
    case 16: extent->source_offset = value; break;
    case 17: extent->block_offset = (uint32_t)value; break;
    case 18: extent->nbytes = (uint32_t)value; break;
    default: t->order[below(in, BLOCKS_MAX)] = (uint32_t)value; break;
    }
}

/* Whether a job that is valid touches only memory that we gave it. */
static int is_ours(const trial *t)
{
    if (t->job.file_count > FILES_MAX)
        return 0;
    for (uint32_t b = 0; b < t->job.block_count; b++)
        for (uint32_t i = 0; i < t->blocks[b].extent_count; i++) {
            const eng_extent *extent = &t->extents[t->blocks[b].extent_start + i];
            const eng_source *source = &t->sources[extent->source];
            const uint64_t start = (uint64_t)(uintptr_t)t->memory[extent->source], all = t->memory_bytes[extent->source];
            int64_t low = 0, high = 0;
            if (source->ndim == 0 && (extent->source_offset > all || extent->nbytes > all - extent->source_offset
                                      || source->address != start))
                return 0;
            if (source->ndim > 0 && (!span(source, &low, &high) || source->address + (uint64_t)low < start
                                     || source->address + (uint64_t)high > start + all))
                return 0;
        }
    return 1;
}

/* ---- the table ---- */

static int set_files(void *context, uint32_t first, const int32_t *fds, uint32_t count)
{
    (void)context, (void)fds;
    return first + count <= ENG_JOBS_MAX * ENG_JOB_PLACES ? 0 : -EINVAL;
}

/* The possible checksums of the bytes that reached the table from a block's start: more than one only if several blocks
 * have the same location. */
static eng_hash arrived[BLOCKS_MAX][BLOCKS_MAX];
static uint32_t arrived_count[BLOCKS_MAX];

static int has_arrived(uint32_t block, eng_hash checksum)
{
    for (uint32_t i = 0; i < arrived_count[block]; i++)
        if (memcmp(&arrived[block][i], &checksum, sizeof checksum) == 0)
            return 1;
    return 0;
}

static void note_written(const eng_io *io)
{
    const eng_job *job = &current->job;
    for (uint32_t i = 0; i < job->block_count; i++) {
        const eng_block *block = &job->blocks[i];
        const int is_here = io->place == ENG_NO_PLACE ? block->file >= ENG_JOB_PLACES
                                                      : block->file == (uint32_t)io->place % ENG_JOB_PLACES;
        if (!is_here || block->file_offset != io->file_offset || block->nbytes > io->nbytes)
            continue;
        const eng_hash checksum = eng_hash_bytes(io->address, block->nbytes);
        if (!has_arrived(i, checksum)) {
            REQUIRE(arrived_count[i] < BLOCKS_MAX);
            arrived[i][arrived_count[i]++] = checksum;
        }
    }
}

static int32_t outcome(uint32_t nbytes)
{
    switch (below(&script, 16)) {
    case 10: return (int32_t)below(&script, nbytes + 1);
    case 11: return (int32_t)(nbytes - ENG_ALIGNMENT);
    case 12: return -EINTR;
    case 13: return -EIO;
    case 14: return (int32_t)nbytes + 1;
    case 15: return -ENOMEM;
    default: return (int32_t)nbytes;
    }
}

static int start(void *context, const eng_io *io)
{
    (void)context;
    REQUIRE(io->slot < SLOTS && completed_count < SLOTS);
    REQUIRE(io->nbytes > 0 && io->nbytes <= SLOT_BYTES && io->nbytes % ENG_ALIGNMENT == 0);
    REQUIRE(io->file_offset % ENG_ALIGNMENT == 0 && io->file_offset <= INT64_MAX - io->nbytes);
    if (below(&script, 32) == 31)
        return -EBUSY;
    if (io->direction == ENG_WRITE)
        note_written(io);
    else
        for (uint32_t i = 0; i < io->nbytes; i++)
            io->address[i] = stored_byte(io->file_offset + i);
    completed[completed_count++] = (eng_completion){io->slot, outcome(io->nbytes)};
    return 0;
}

static int reap(void *context, eng_completion *completions, uint32_t capacity, uint32_t wait)
{
    (void)context, (void)wait;
    const uint32_t choice = below(&script, 64);
    if (choice == 62 && refusal_count++ < REFUSALS_MAX)
        return -EINTR;
    if (choice == 63) {
        broken = 1;
        return -EBADF; /* the ring is gone, and the pipeline with it */
    }
    uint32_t count = 0;
    for (; completed_count > 0 && count < capacity; count++)
        completions[count] = completed[--completed_count];
    return (int)count;
}

/* ---- one input ---- */

static void check_end(const eng_job *job, int valid, int aborted)
{
    REQUIRE(eng_reached(job, ENG_URGENT) && eng_reached(job, ENG_ALL_STAGED));
    REQUIRE(job->failure <= ENG_ABORTED_FAILURE);
    if (!valid)
        REQUIRE(job->failure == ENG_INVALID_FAILURE && job->io_bytes == 0);
    if (job->failure == ENG_ABORTED_FAILURE)
        REQUIRE(aborted);
    if (job->failure == ENG_NO_FAILURE)
        for (uint32_t i = 0; i < job->block_count; i++) {
            REQUIRE(job->states[i] == ENG_WRITTEN);
            const int is_same = memcmp(&current->known[i], &job->checksums[i], sizeof job->checksums[i]) == 0;
            REQUIRE(job->direction == ENG_READ || (current->is_known[i] && is_same) || has_arrived(i, job->checksums[i]));
        }
}

static void run(trial *t, input *in)
{
    static const int32_t FDS[FILES_MAX];
    static const eng_io_table TABLE = {NULL, set_files, start, reap};
    const int valid = job_is_valid(&t->job, t->job.withheld_count, SLOT_BYTES), aborted = below(in, 16) == 15;
    const uint32_t threads = 1 + below(in, STAGING_THREADS_MAX);
    if (valid && !is_ours(t))
        return;
    if (pipelines[threads] == NULL) {
        eng_config config = {
            .slot_count = SLOTS, .slot_bytes = SLOT_BYTES, .staging_threads = threads, .io = &TABLE};
        REQUIRE(eng_open(&config, &pipelines[threads]) == 0);
    }
    eng_pipeline *pipeline = pipelines[threads];
    current = t, script = *in, completed_count = refusal_count = 0;
    memset(arrived_count, 0, sizeof arrived_count);
    REQUIRE(eng_submit(pipeline, &t->job, 0) == 0);
    /* A job that has failed does not take them. */
    const int attached = eng_attach(pipeline, &t->job, FDS, t->known, t->is_known);
    REQUIRE(attached == 0 || attached == -ESRCH);
    if (aborted)
        eng_abort(pipeline, &t->job, EIO);
    REQUIRE(eng_wait(pipeline, &t->job, ENG_DONE, HANG_NS) == 1);
    check_end(&t->job, valid, aborted);
    if (broken) {
        eng_free(&pipelines[threads]);
        broken = 0;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes)
{
    input in = {data, nbytes};
    /* On the heap, so that ASan detects accesses outside of it. */
    trial *t = calloc(1, sizeof *t);
    REQUIRE(t != NULL);
    make_job(t, &in);
    for (uint32_t pokes = below(&in, POKES_MAX + 1); pokes > 0; pokes--)
        poke(t, &in);
    run(t, &in);
    for (uint32_t i = 0; i < SOURCES_MAX; i++)
        free(t->memory[i]);
    free(t);
    return 0;
}
