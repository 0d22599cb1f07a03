/*
 * pipeline.c: the slot state machine.
 *
 *     FREE -> STAGING -> STAGED -> MOVING ----------> FREE   a block of a write: hashed as it is staged
 *     FREE -> STAGING -> STAGED --------------------> FREE   a block of a write that its file holds already
 *     FREE -> MOVING -> MOVED -> STAGING -----------> FREE   a block of a read: verified, then copied out
 *
 * A write waits in STAGED until its job has files, so that staging begins before the files are made.  If the job has
 * files, the write starts at once.  Jobs share the slots and this thread as turns.c says.
 *
 * With helper threads a slot in STAGING may be with one of them.  This thread gives them as many blocks as they have room
 * for, and then stages one itself, so blocks are staged out of order.  A block that a writer waits for is staged by this
 * thread, unless a helper is already at it.  A job that has failed keeps its sources until no helper copies from them.
 */
#include "pipeline/pipeline.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "guarding/guard.h"
#include "pipeline/job.h"
#include "pipeline/progress.h"
#include "pipeline/slots.h"
#include "pipeline/turns.h"

enum {
    /* Blocks staged before their writes are submitted together: few, so that the device starts early (4 MiB stage in
     * about half a millisecond), but more than one, to share the cost of a submission. */
    BATCH_BLOCKS = 2,
    /* Tries of one operation that made no progress (EINTR, EAGAIN, ENOMEM, a short write under the alignment). */
    RETRIES_MAX = 16,
    /* Refusals of the submission itself in a row, 1 ms apart: 100 ms is far longer than a transient shortage. */
    REFUSALS_MAX = 100,
    REAP_MAX = 64
};

static int is_same(eng_hash left, eng_hash right)
{
    return memcmp(&left, &right, sizeof left) == 0;
}

/* ---- moving bytes ---- */

/* The index of a job's file in the ring's table, or ENG_NO_PLACE. */
static int32_t place_of(uint32_t entry_index, uint32_t file)
{
    return file < ENG_JOB_PLACES ? (int32_t)(entry_index * ENG_JOB_PLACES + file) : ENG_NO_PLACE;
}

static uint32_t padded_bytes(const eng_block *block)
{
    return (block->nbytes + ENG_ALIGNMENT - 1) & ~(uint32_t)(ENG_ALIGNMENT - 1);
}

static void start_io(eng_pipeline *p, uint32_t index)
{
    slot *s = &p->slots[index];
    const eng_job *job = p->entries[s->entry].job;
    const eng_block *block = &job->blocks[s->block];
    const uint32_t padded = padded_bytes(block);
    const eng_io io = {
        .slot = index,
        .direction = job->direction,
        .fd = p->entries[s->entry].fds[block->file],
        .place = place_of(s->entry, block->file),
        .nbytes = padded - s->done_bytes,
        .file_offset = block->file_offset + s->done_bytes,
        .address = slots_memory(p, index) + s->done_bytes,
    };
    s->state = SLOT_MOVING;
    const int result = p->io.start(p->io.context, &io);
    if (result == 0) {
        p->moving_count++;
        p->reading_count += job->direction == ENG_READ;
        return;
    }
    progress_fail(p, s->entry, ENG_IO_FAILURE, -result, s->block);
    slots_free(p, index);
}

static void finish_block(eng_pipeline *p, uint32_t index)
{
    entry *e = &p->entries[p->slots[index].entry];
    progress_set_state(e->job, p->slots[index].block, ENG_WRITTEN);
    slots_free(p, index);
}

/* Whether the file of a block holds bytes with this hash at its offset. */
static int is_held(const entry *e, uint32_t block, eng_hash checksum)
{
    return e->known != NULL && e->is_known[block] && is_same(e->known[block], checksum);
}

/* Start the first I/O of a block, unless its file already holds the block. */
static void begin_io(eng_pipeline *p, uint32_t index)
{
    slot *s = &p->slots[index];
    const entry *e = &p->entries[s->entry];
    if (is_held(e, s->block, e->job->checksums[s->block])) {
        e->job->skipped_bytes += padded_bytes(&e->job->blocks[s->block]);
        finish_block(p, index);
        return;
    }
    if (s->state == SLOT_STAGED)
        slots_remove(p->waiting.slots, &p->waiting.count, index);
    start_io(p, index);
}

/* 0 if what was just staged is what the sources held when the save began, or an errno that says why it may not be. */
static int release_sources(eng_job *job, uint32_t block, eng_hash checksum)
{
    if (job->checked && !is_same(checksum, job->checksums[block]))
        return EBUSY;
    if (job->guard == NULL)
        return 0;
    return guard_release(job->guard, block, job->previous != NULL && is_same(checksum, job->previous[block]));
}

/* A block of a write is in its slot. */
static void finish_copy(eng_pipeline *p, uint32_t index, eng_hash checksum)
{
    const uint32_t entry_index = p->slots[index].entry, block = p->slots[index].block;
    entry *e = &p->entries[entry_index];
    const int torn = release_sources(e->job, block, checksum);
    if (torn != 0) {
        slots_free(p, index);
        progress_fail(p, entry_index, ENG_TORN_FAILURE, torn, block);
        return;
    }
    if (!e->job->checked) /* else it is there already, and others may read it since ENG_URGENT */
        e->job->checksums[block] = checksum;
    progress_set_state(e->job, block, ENG_STAGED);
    progress_note_staged(p, entry_index);
    if (e->has_files)
        begin_io(p, index);
    else
        slots_await_files(p, index);
}

/* A block of a checked job is hashed for the first time; the slot only held the copy meanwhile. */
static void finish_hash(eng_pipeline *p, uint32_t index, eng_hash checksum)
{
    const uint32_t entry_index = p->slots[index].entry;
    entry *e = &p->entries[entry_index];
    e->job->checksums[p->slots[index].block] = checksum;
    e->hashed_count++;
    slots_free(p, index);
    progress_note_staged(p, entry_index);
}

/* A block of a read is verified and copied out, or does not match its hash. */
static void finish_verification(eng_pipeline *p, uint32_t index, int is_verified)
{
    const slot s = p->slots[index];
    if (is_verified) { /* also of a failed job: the state says that the bytes were copied out */
        finish_block(p, index);
        return;
    }
    slots_free(p, index);
    progress_fail(p, s.entry, ENG_CHECKSUM_FAILURE, 0, s.block);
}

/* Continue with a slot whose block was staged, by this thread or by a helper. */
static void finish_staging(eng_pipeline *p, const staging *done)
{
    const slot *s = &p->slots[done->slot];
    const entry *e = &p->entries[s->entry];
    e->job->copying_ns += done->copying_ns;
    e->job->hashing_ns += done->hashing_ns;
    if (e->job->direction == ENG_READ)
        finish_verification(p, done->slot, done->is_verified);
    else if (e->failed)
        slots_free(p, done->slot);
    else if (s->hashes_only)
        finish_hash(p, done->slot, done->checksum);
    else
        finish_copy(p, done->slot, done->checksum);
}

static staging staging_of(const eng_pipeline *p, uint32_t index)
{
    const slot *s = &p->slots[index];
    return (staging){
        .slot = index, .block = s->block, .job = p->entries[s->entry].job, .memory = slots_memory(p, index)};
}

static void stage_here(eng_pipeline *p, uint32_t index)
{
    staging work = staging_of(p, index);
    stage(&work);
    finish_staging(p, &work);
}

/* Give the block of a slot to the helpers, if they have room. */
static int stage_aside(eng_pipeline *p, uint32_t index)
{
    const staging work = staging_of(p, index);
    if (p->stager == NULL || !stager_begin(p->stager, &work))
        return 0;
    slots_enter_helped(p, index);
    return 1;
}

/* Stage a block of a write, with a helper if one has room. */
static void stage_block(eng_pipeline *p, uint32_t entry_index, uint32_t block)
{
    const uint32_t index = slots_take(p, entry_index, block);
    if (stage_aside(p, index))
        progress_advance(p, entry_index);
    else
        stage_here(p, index);
}

/* Hash the next block of a checked job for the first time. */
static void hash_block(eng_pipeline *p, uint32_t entry_index)
{
    entry *e = &p->entries[entry_index];
    const uint32_t index = slots_take(p, entry_index, e->job->order[e->hashed_next++]);
    p->slots[index].hashes_only = 1;
    if (!stage_aside(p, index))
        stage_here(p, index);
}

/* Continue with the blocks that the helpers have staged.  Returns their number. */
static uint32_t collect(eng_pipeline *p)
{
    staging done[ENG_STAGING_BLOCKS_MAX];
    const uint32_t count = p->helped.count > 0 ? stager_poll(p->stager, done) : 0;
    for (uint32_t i = 0; i < count; i++) {
        const uint32_t entry_index = p->slots[done[i].slot].entry;
        entry *e = &p->entries[entry_index];
        slots_leave_helped(p, done[i].slot);
        finish_staging(p, &done[i]);
        if (e->failed)
            progress_give_up_sources(p, e);
        progress_settle(p, entry_index);
    }
    return count;
}

/* Finish a clean block without copying it, if its file holds it. */
static int skip_clean(eng_pipeline *p, uint32_t entry_index, uint32_t block)
{
    const entry *e = &p->entries[entry_index];
    eng_job *job = e->job;
    if (job->guard == NULL || !guard_is_clean(job->guard, block) || !is_held(e, block, job->previous[block]))
        return 0;
    job->checksums[block] = job->previous[block];
    job->skipped_bytes += padded_bytes(&job->blocks[block]);
    job->clean_bytes += job->blocks[block].nbytes;
    guard_skip(job->guard, block);
    progress_set_state(job, block, ENG_WRITTEN);
    progress_note_staged(p, entry_index);
    return 1;
}

/* Verify the oldest block of a read that has arrived, and copy it out, with a helper if one has room. */
static void verify_block(eng_pipeline *p, uint32_t entry_index)
{
    uint32_t at = 0;
    while (p->slots[p->unverified.slots[at]].entry != entry_index)
        at++;
    const uint32_t index = p->unverified.slots[at];
    slots_leave_unverified(p, index);
    p->slots[index].state = SLOT_STAGING;
    if (!stage_aside(p, index))
        stage_here(p, index);
}

static void work_on(eng_pipeline *p, uint32_t entry_index, enum piece piece)
{
    entry *e = &p->entries[entry_index];
    const eng_job *job = e->job;
    switch (piece) {
    case PIECE_NONE: break;
    case PIECE_HASH: hash_block(p, entry_index); break;
    case PIECE_STAGE: stage_block(p, entry_index, job->order[e->next]); break;
    case PIECE_CLEAN:
        if (!skip_clean(p, entry_index, job->order[e->clean_next]))
            stage_block(p, entry_index, job->order[e->clean_next]);
        break;
    case PIECE_READ: start_io(p, slots_take(p, entry_index, job->order[e->next++])); break;
    case PIECE_VERIFY: verify_block(p, entry_index); break;
    }
}

/* A block to be staged by this thread. */
typedef struct {
    eng_pipeline *pipeline;
    uint32_t entry;
    uint32_t slot; /* that it has already, or NO_SLOT */
} claim;

/* Claim a block for this thread, if need be from the helpers: 1, or 0 if one of them is at it. */
static int claim_block(void *context, uint32_t block)
{
    claim *c = context;
    c->slot = slots_helped(c->pipeline, c->entry, block);
    return c->slot == NO_SLOT || stager_withdraw(c->pipeline->stager, c->slot);
}

/* Stage a block that a writer waits for, whichever job it is of: 1, or 0 if there is none. */
static int serve_writer(eng_pipeline *p)
{
    uint32_t block;
    for (uint32_t at = 0; at < p->queue_count; at++) {
        const uint32_t entry_index = p->queue[at];
        const entry *e = &p->entries[entry_index];
        claim c = {p, entry_index, NO_SLOT};
        if (e->failed || progress_all_staged(e) || e->job->guard == NULL || !turns_may_hold(p, e)
            || !guard_wanted(e->job->guard, claim_block, &c, &block))
            continue;
        if (c.slot == NO_SLOT)
            c.slot = slots_take(p, entry_index, block);
        else
            slots_leave_helped(p, c.slot);
        stage_here(p, c.slot);
        progress_settle(p, entry_index);
        return 1;
    }
    return 0;
}

/* Do one piece of work of the job whose turn it is: 1, or 0 if there is none. */
static int take_turn(eng_pipeline *p)
{
    enum piece piece;
    const uint32_t entry_index = turns_next(p, &piece);
    if (entry_index == ENG_JOBS_MAX)
        return 0;
    work_on(p, entry_index, piece);
    progress_settle(p, entry_index);
    return 1;
}

uint32_t pipeline_work(eng_pipeline *p)
{
    uint32_t progress = collect(p), here = 0; /* by this thread; what it gives to the helpers costs it nothing */
    while (here < BATCH_BLOCKS) {
        const uint32_t helped_before = p->helped.count;
        if (!serve_writer(p) && !take_turn(p))
            break;
        progress++;
        if (p->helped.count <= helped_before) {
            here++;
            progress += collect(p); /* helpers need the next blocks, and writers wait for theirs */
        }
    }
    return progress;
}

static void retry(eng_pipeline *p, uint32_t index, uint32_t kind, int error)
{
    slot *s = &p->slots[index];
    p->entries[s->entry].job->retry_count++;
    if (s->retry_count++ < RETRIES_MAX) {
        start_io(p, index);
        return;
    }
    progress_fail(p, s->entry, kind, error, s->block);
    slots_free(p, index);
}

static void complete(eng_pipeline *p, uint32_t index, int32_t result)
{
    slot *s = &p->slots[index];
    const uint32_t entry_index = s->entry;
    entry *e = &p->entries[entry_index];
    const eng_block *block = &e->job->blocks[s->block];
    const uint32_t padded = padded_bytes(block);
    const uint32_t wanted = e->job->direction == ENG_WRITE ? padded : block->nbytes;

    p->moving_count--;
    p->reading_count -= e->job->direction == ENG_READ;
    if (e->failed) {
        slots_free(p, index);
    } else if (result == -EINTR || result == -EAGAIN || result == -ENOMEM) {
        retry(p, index, ENG_IO_FAILURE, -result);
    } else if (result <= 0 || (uint32_t)result > padded - s->done_bytes) {
        const int error = result < 0 ? -result : result == 0 ? 0 : EIO;
        progress_fail(p, entry_index, result == 0 ? ENG_SHORT_FAILURE : ENG_IO_FAILURE, error, s->block);
        slots_free(p, index);
    } else if (s->done_bytes + (uint32_t)result >= wanted) {
        e->job->io_bytes += (uint32_t)result;
        if (e->job->direction == ENG_READ)
            slots_await_verification(p, index);
        else
            finish_block(p, index);
    } else {
        /* Short: continue at the last aligned byte, as O_DIRECT requires.  Progress resets the count. */
        const uint32_t progress = (uint32_t)result & ~(uint32_t)(ENG_ALIGNMENT - 1);
        e->job->io_bytes += progress;
        s->done_bytes += progress;
        if (progress > 0)
            s->retry_count = 0;
        retry(p, index, ENG_SHORT_FAILURE, 0);
    }
    progress_settle(p, entry_index);
}

/* The ring itself has failed: every job fails, and the next job gets a new ring.  Slots that the kernel may still write
 * to are never used again. */
static void break_down(eng_pipeline *p, int error)
{
    if (p->stager != NULL)
        stager_drain(p->stager);
    while (p->helped.count > 0)
        slots_leave_helped(p, p->helped.slots[0]);
    p->broken = error;
    p->refusal_count = 0;
    p->free_count = 0;
    p->moving_count = p->reading_count = 0;
    while (p->queue_count > 0) {
        const uint32_t entry_index = p->queue[0];
        progress_fail(p, entry_index, ENG_IO_FAILURE, error, UINT32_MAX);
        p->free_count = 0;
        p->entries[entry_index].slot_count = 0;
        progress_settle(p, entry_index);
    }
}

void pipeline_reap(eng_pipeline *p, uint32_t wait)
{
    static const struct timespec PAUSE = {0, 1000000};
    eng_completion completions[REAP_MAX];
    const int count = p->io.reap(p->io.context, completions, REAP_MAX, wait);

    for (int i = 0; i < count; i++)
        if (completions[i].slot < p->config.slot_count && p->slots[completions[i].slot].state == SLOT_MOVING)
            complete(p, completions[i].slot, completions[i].result);
        else
            abort(); /* an unexpected completion: our memory may be corrupt */
    if (count >= 0) {
        p->refusal_count = 0;
        return;
    }
    const int passing = count == -EINTR || count == -EAGAIN || count == -EBUSY || count == -ENOMEM;
    if (!passing || ++p->refusal_count > REFUSALS_MAX)
        break_down(p, -count);
    else if (count != -EINTR)
        nanosleep(&PAUSE, NULL);
}

/* ---- the inbox ---- */

/* Give a job its files, and start the writes that waited for them, in the order of staging.  Returns 0 if the
 * ring has failed, and with it the job. */
static int attach_files(eng_pipeline *p, uint32_t entry_index)
{
    entry *e = &p->entries[entry_index];
    if (e->failed || e->has_files)
        return 1;
    e->has_files = 1;
    const int result = progress_set_files(p, entry_index, 1);
    if (result == -EOPNOTSUPP || result == -ENXIO) { /* the descriptor is no ring now (io_uring_register(2), ERRORS) */
        break_down(p, -result);
        return 0;
    }
    if (result < 0)
        progress_fail(p, entry_index, ENG_IO_FAILURE, -result, UINT32_MAX);
    for (uint32_t at = 0; at < p->waiting.count && !e->failed;) {
        const uint32_t index = p->waiting.slots[at];
        if (p->slots[index].entry != entry_index) {
            at++;
            continue;
        }
        begin_io(p, index);
    }
    return 1;
}

/* What a job needs before its first block.  With nothing urgent, ENG_URGENT is reached at once. */
static void begin_job(eng_pipeline *p, uint32_t entry_index)
{
    entry *e = &p->entries[entry_index];
    const eng_job *job = e->job;
    e->hashed_next = e->hashed_count = job->checked && job->direction == ENG_WRITE ? 0 : job->block_count;
    if (job->guard != NULL)
        guard_attach(job->guard, p->forks.descriptors[DESCRIPTOR_WAKE]);
    if (job->direction == ENG_WRITE)
        progress_note_staged(p, entry_index);
    else
        progress_reach(p, e->job, ENG_URGENT);
}

void pipeline_accept(eng_pipeline *p, uint32_t entry_index)
{
    entry *e = &p->entries[entry_index];
    pthread_mutex_lock(&p->mutex);
    const int submitted = e->submitted, attached = e->attached, aborted = e->aborted, released = e->released;
    const int32_t abort_error = e->abort_error;
    const uint32_t withheld_count = e->withheld_count;
    e->submitted = e->attached = e->aborted = e->released = 0;
    if (submitted || released)
        e->limit = e->job->block_count - e->job->withheld_count;
    pthread_mutex_unlock(&p->mutex);

    if (submitted) {
        p->queue[p->queue_count++] = entry_index;
        if (p->broken && service_replace_ring(p) != 0)
            progress_fail(p, entry_index, ENG_IO_FAILURE, p->broken, UINT32_MAX);
        else if (!job_is_valid(e->job, withheld_count, p->config.slot_bytes))
            progress_fail(p, entry_index, ENG_INVALID_FAILURE, EINVAL, UINT32_MAX);
        else
            begin_job(p, entry_index);
    }
    if (aborted)
        progress_fail(p, entry_index, ENG_ABORTED_FAILURE, abort_error, UINT32_MAX);
    if (attached && !attach_files(p, entry_index))
        return;
    if (released && !e->failed)
        progress_note_staged(p, entry_index); /* a writer may have had them staged already */
    if (submitted || aborted || attached || released)
        progress_settle(p, entry_index);
}

void pipeline_cancel_incomplete(eng_pipeline *p)
{
    for (uint32_t at = p->queue_count; at-- > 0;) {
        const uint32_t entry_index = p->queue[at];
        const entry *e = &p->entries[entry_index];
        if (e->has_files && e->limit == e->job->block_count)
            continue;
        progress_fail(p, entry_index, ENG_ABORTED_FAILURE, ECANCELED, UINT32_MAX);
        progress_settle(p, entry_index);
    }
}
