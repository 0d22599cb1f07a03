/*
 * progress.c: how far a job has come, from its first block to its end (progress.h).
 *
 * A job's blocks are begun in its order, but for those that are clean or that a writer waits for.  So `next` says which are
 * begun, and states which are done.
 */
#include "pipeline/progress.h"

#include <errno.h>
#include <string.h>

#include "guarding/guard.h"
#include "pipeline/slots.h"
#include "pipeline/thread.h"

void progress_set_state(eng_job *job, uint32_t block, uint8_t state)
{
    __atomic_store_n(&job->states[block], state, __ATOMIC_RELEASE);
}

void progress_reach(eng_pipeline *p, eng_job *job, uint32_t milestones)
{
    pthread_mutex_lock(&p->mutex);
    __atomic_fetch_or(&job->milestones, milestones, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&p->changed);
    pthread_mutex_unlock(&p->mutex);
}

int progress_set_files(const eng_pipeline *p, uint32_t entry_index, int is_there)
{
    const entry *e = &p->entries[entry_index];
    const uint32_t count = e->job->file_count < ENG_JOB_PLACES ? e->job->file_count : ENG_JOB_PLACES;
    int32_t fds[ENG_JOB_PLACES];

    if (p->io.set_files == NULL)
        return 0;
    for (uint32_t i = 0; i < count; i++)
        fds[i] = is_there ? e->fds[i] : -1;
    return p->io.set_files(p->io.context, entry_index * ENG_JOB_PLACES, fds, count);
}

void progress_give_up_sources(eng_pipeline *p, entry *e)
{
    if (e->helped_count == 0)
        progress_reach(p, e->job, ENG_URGENT | ENG_ALL_STAGED);
}

void progress_fail(eng_pipeline *p, uint32_t entry_index, uint32_t kind, int error, uint32_t block)
{
    entry *e = &p->entries[entry_index];
    if (e->failed)
        return; /* the first failure is latched */
    e->failed = 1;
    e->job->failure = kind;
    e->job->error = error;
    e->job->failed_block = block;
    if (block < e->job->block_count)
        progress_set_state(e->job, block, ENG_FAILED);
    for (uint32_t i = 0; i < p->config.slot_count; i++) {
        const int idle = p->slots[i].state == SLOT_STAGED || p->slots[i].state == SLOT_MOVED;
        if (idle && p->slots[i].entry == entry_index)
            slots_free(p, i);
    }
    if (e->job->guard != NULL)
        guard_end(e->job->guard, e->job);
    progress_give_up_sources(p, e);
}

/* Whether every block has been begun. */
static int all_begun(const entry *e)
{
    return e->next == e->job->block_count && (e->job->direction == ENG_READ || e->clean_next == e->job->block_count);
}

int progress_all_staged(const entry *e)
{
    return all_begun(e) && e->helped_count == 0;
}

void progress_settle(eng_pipeline *p, uint32_t entry_index)
{
    entry *e = &p->entries[entry_index];
    eng_job *job = e->job;
    if (e->slot_count > 0 || !(e->failed || all_begun(e)))
        return;
    /* Check success once more at the end: an `order` that names a block twice omits another. */
    for (uint32_t i = 0; i < job->block_count && !e->failed; i++)
        if (job->states[i] != ENG_WRITTEN)
            progress_fail(p, entry_index, ENG_INVALID_FAILURE, EINVAL, i);
    if (job->guard != NULL)
        guard_end(job->guard, job);
    if (e->has_files)
        progress_set_files(p, entry_index, 0);
    slots_remove(p->queue, &p->queue_count, entry_index);
    job->done_ns = thread_now_ns();
    pthread_mutex_lock(&p->mutex);
    memset(e, 0, sizeof *e);
    pthread_mutex_unlock(&p->mutex);
    progress_reach(p, job, ENG_URGENT | ENG_ALL_STAGED | ENG_DONE);
}

/* Whether a block is passed over until the job has files, which may hold it already.  Not one that is urgent. */
static int is_deferred(const eng_job *job, uint32_t at)
{
    return job->guard != NULL && at >= job->urgent_count && guard_is_clean(job->guard, job->order[at]);
}

/* Whether the staging of a block is begun. */
static int is_begun(const eng_pipeline *p, uint32_t entry_index, uint32_t block)
{
    return p->entries[entry_index].job->states[block] != ENG_PENDING || slots_helped(p, entry_index, block) != NO_SLOT;
}

void progress_advance(eng_pipeline *p, uint32_t entry_index)
{
    entry *e = &p->entries[entry_index];
    const eng_job *job = e->job;
    while (e->next < e->limit && (is_begun(p, entry_index, job->order[e->next]) || is_deferred(job, e->next)))
        e->next++;
    while (e->clean_next < e->limit && is_begun(p, entry_index, job->order[e->clean_next]))
        e->clean_next++;
}

/* Whether the urgent blocks of a write are staged. */
static int urgent_staged(entry *e)
{
    const eng_job *job = e->job;
    while (e->urgent_next < job->urgent_count && job->states[job->order[e->urgent_next]] != ENG_PENDING)
        e->urgent_next++;
    return e->urgent_next == job->urgent_count;
}

void progress_note_staged(eng_pipeline *p, uint32_t entry_index)
{
    entry *e = &p->entries[entry_index];
    eng_job *job = e->job;
    progress_advance(p, entry_index);
    if (e->hashed_count >= e->limit && !eng_reached(job, ENG_URGENT) && urgent_staged(e))
        progress_reach(p, job, ENG_URGENT);
    if (!progress_all_staged(e))
        return;
    if (job->guard != NULL)
        guard_end(job->guard, job); /* before the milestone: the next save may be armed then */
    job->staged_ns = thread_now_ns();
    progress_reach(p, job, ENG_ALL_STAGED);
}
