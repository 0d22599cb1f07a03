/*
 * turns.c: how jobs share the slots and the pipeline's thread, as turns.h specifies.
 *
 * The jobs that can do something take turns: the job that has waited longest is next.  Two rules come first:
 *
 *   1. A save that has not reached ENG_URGENT goes before all others, because a caller waits for it in checkpoint().
 *   2. A job with less than its share of the slots goes before one that has its share.  The share is the number of slots
 *      divided by the number of jobs that can do something.  So a slow job cannot collect the slots that others need, and
 *      a job alone has all of them.
 *
 * A slot of a job without files is freed only when the job gets files, and the thread that makes them may be waiting for
 * another job.  So jobs without files leave one slot to the others.  Every slot of a job with files is freed by the
 * device and this thread alone.  Hence a job with files always makes progress, and no set of jobs can block another.
 */
#include "pipeline/turns.h"

#include "guarding/guard.h"

enum {
    /* Bytes of reads in flight.  Bandwidth times latency keeps a drive busy, some 2 MB, and a few times that keeps an
     * array of drives busy.  More in flight delays the first block, and leaves nothing to read while the last blocks
     * are verified.  500 MB in blocks of 4 MiB took, on the host of docs/perf.md: 139 ms with 16 MiB in flight, 135
     * with 64, 140 with 128, 146 with 256. */
    READ_WINDOW_BYTES = 64 << 20
};

int turns_may_hold(const struct eng_pipeline *p, const entry *e)
{
    uint32_t held = 0; /* by jobs without files */
    if (p->free_count == 0)
        return 0;
    if (e->has_files)
        return 1;
    for (uint32_t at = 0; at < p->queue_count; at++)
        if (!p->entries[p->queue[at]].has_files)
            held += p->entries[p->queue[at]].slot_count;
    return held + 1 < p->config.slot_count;
}

static enum piece next_of_write(const struct eng_pipeline *p, const entry *e)
{
    if (e->hashed_next < e->limit)
        return p->free_count > 0 ? PIECE_HASH : PIECE_NONE;
    if (e->hashed_count < e->limit)
        return PIECE_NONE; /* until the helpers have hashed the last blocks */
    if (e->next < e->limit)
        return turns_may_hold(p, e) ? PIECE_STAGE : PIECE_NONE;
    if (e->has_files && e->clean_next < e->limit && p->free_count > 0)
        return PIECE_CLEAN;
    return PIECE_NONE;
}

/* The next reads start before blocks that have arrived are verified, as long as slots are free and the window allows. */
static enum piece next_of_read(const struct eng_pipeline *p, const entry *e)
{
    const uint64_t reading_bytes = (uint64_t)p->reading_count * p->config.slot_bytes;
    if (e->has_files && e->next < e->job->block_count && p->free_count > 0 && reading_bytes < READ_WINDOW_BYTES)
        return PIECE_READ;
    return e->unverified_count > 0 ? PIECE_VERIFY : PIECE_NONE;
}

static enum piece next_piece(const struct eng_pipeline *p, const entry *e)
{
    if (e->failed)
        return PIECE_NONE;
    return e->job->direction == ENG_WRITE ? next_of_write(p, e) : next_of_read(p, e);
}

/* A job that can do something. */
typedef struct {
    uint32_t entry;
    enum piece piece;
    int urgent;
    int has_share; /* and its piece would take a slot more */
    uint64_t turn;
} candidate;

static int comes_before(const candidate *left, const candidate *right)
{
    if (left->urgent != right->urgent)
        return left->urgent;
    if (left->has_share != right->has_share)
        return right->has_share;
    return left->turn < right->turn; /* of equal ones the older job, which is compared first */
}

uint32_t turns_next(struct eng_pipeline *p, enum piece *piece)
{
    candidate candidates[ENG_JOBS_MAX];
    uint32_t count = 0, first = 0;
    for (uint32_t at = 0; at < p->queue_count; at++) {
        const entry *e = &p->entries[p->queue[at]];
        const enum piece next = next_piece(p, e);
        if (next != PIECE_NONE)
            candidates[count++] = (candidate){p->queue[at], next, !eng_reached(e->job, ENG_URGENT), 0, e->turn};
    }
    if (count == 0)
        return ENG_JOBS_MAX;
    for (uint32_t i = 0; i < count; i++) {
        const entry *e = &p->entries[candidates[i].entry];
        const int has_share = (uint64_t)e->slot_count * count >= p->config.slot_count;
        if (has_share && candidates[i].piece == PIECE_READ && e->unverified_count > 0)
            candidates[i].piece = PIECE_VERIFY; /* which frees one of its slots */
        candidates[i].has_share = has_share && candidates[i].piece != PIECE_VERIFY;
        if (comes_before(&candidates[i], &candidates[first]))
            first = i;
    }
    *piece = candidates[first].piece;
    p->entries[candidates[first].entry].turn = ++p->turn;
    return candidates[first].entry;
}
