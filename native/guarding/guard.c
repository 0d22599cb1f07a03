/*
 * guard.c: write protection of an arena, from the call that begins a save until each block is staged.
 *
 * A guard watches one range, in units of 2 MiB: the size of a huge page, below which protection would split it.
 * eng_guard_arm protects every unit.  Each unit counts the extents of the job that are not staged yet; when the last
 * one is, the unit is released.
 *
 * ENG_GUARD_COW.  A write to a protected unit stops its thread in the page fault.  The guard's own thread reads the
 * fault.  If blocks of the unit are not staged, it asks the pipeline for them, and the release lets the writer go on.
 * Otherwise it unprotects the unit at once.
 *
 * ENG_GUARD_DETECT.  A write goes on at once, and the kernel notes the page.  A release asks for the pages that its
 * block was copied from, and fails if one of them was written.
 *
 * A unit of which no block has changed since the job before is released without being unprotected.  If it is still
 * protected when the next job is armed, nobody has written to it: its blocks are clean, and need not be copied where the
 * file holds them already.  A wrong guess costs the writer one fault a unit.
 *
 * Nothing here may stop a training.  If a writer waits and no block is released for PATIENCE_NS, or the kernel refuses to
 * unprotect or to report faults, the guard unprotects everything and the save fails.  The guard's thread takes no lock but the guard's own, touches no guarded memory, and
 * does not need the pipeline's thread to do so.
 *
 * Locks.  `mutex` guards all but what is set once at the start.  `wanted_count` and `clean` are read without it.
 */
#include "guarding/guard.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "guarding/protection.h"
#include "pipeline/forks.h"
#include "pipeline/job.h"
#include "pipeline/thread.h"

enum {
    UNIT_BYTES = 2 << 20,
    POLL_MS = 1000 /* between looks at the time while a writer waits */
};

/* Of the pipeline that a job will be given to the guard knows nothing, so it checks all but that blocks fit in a slot. */
static const uint32_t SLOT_BYTES_MAX = UINT32_MAX & ~(ENG_ALIGNMENT - 1);

/* How long a writer waits while no block is staged.  A block takes milliseconds, and a disk that takes none for this
 * long has failed, or a thread that the save needs waits for the writer, which holds the GIL. */
static const uint64_t PATIENCE_NS = 5000000000u;

typedef struct {
    uint32_t pending;     /* extents of the armed job in this unit that are not staged; of withheld blocks none */
    uint8_t is_protected; /* as far as is known: an asynchronous range is asked when it is armed */
    uint8_t is_wanted;    /* a writer waits */
    uint8_t is_listed; /* in `wanted`, perhaps from a writer that has gone on: a withheld block makes it wanted again */
    uint8_t has_changed; /* a block of the armed job in this unit is not as the job before found it */
} unit;

struct eng_guard {
    forks_owner forks; /* the descriptors: DESCRIPTOR_... */
    protection protection;
    uint32_t kind;
    uint32_t unit_count;
    pthread_t thread;
    int has_thread;
    pthread_mutex_t mutex;
    const eng_job *job; /* the armed one, or NULL */
    unit *units;
    uint32_t *unit_starts; /* the blocks of unit u are unit_blocks[unit_starts[u]] up to unit_starts[u + 1] */
    uint32_t *unit_blocks;
    uint32_t unit_blocks_capacity;
    uint8_t *clean; /* one a block */
    uint32_t clean_capacity;
    uint32_t *wanted; /* units, in order of arrival */
    uint32_t wanted_count;
    uint32_t waiting_count; /* units that are `is_wanted`; of `wanted` some are not any more */
    uint64_t progress_ns; /* when a block was staged last, or a writer began to wait while no other did */
    int has_given_up;
    int wake_fd; /* the pipeline's, while the job is with it; -1 */
};

enum { DESCRIPTOR_UFFD = 0, DESCRIPTOR_PAGEMAP = 1, DESCRIPTOR_STOP = 2 };

/* ---- units ---- */

static void close_protection(eng_guard *g)
{
    forks_lock();
    for (int i = 0; i < FORKS_DESCRIPTORS_MAX; i++)
        if (i != DESCRIPTOR_STOP)
            g->forks.descriptors[i] = -1;
    protection_close(&g->protection);
    forks_unlock();
}

/* The address of a unit; of `unit_count`, the end of the range. */
static uint64_t unit_address(const eng_guard *g, uint32_t index)
{
    const uint64_t offset = (uint64_t)index * UNIT_BYTES;
    return g->protection.address + (offset < g->protection.nbytes ? offset : g->protection.nbytes);
}

/* Protect units, or unprotect them; if the kernel refuses, none counts as protected. */
static int set_units(eng_guard *g, uint32_t first, uint32_t end, int is_protected)
{
    const uint64_t address = unit_address(g, first);
    const int result = protection_set(&g->protection, address, unit_address(g, end) - address, is_protected);
    for (uint32_t u = first; u < end; u++)
        g->units[u].is_protected = is_protected && result == 0;
    return result;
}

/* Unregister the whole range, which lets every writer go on.  The armed save fails, and none can be armed after that. */
static void give_up(eng_guard *g)
{
    g->has_given_up = 1;
    close_protection(g);
}

/* Unprotect units and let their writers go on; give up where the kernel refuses. */
static void unprotect(eng_guard *g, uint32_t first, uint32_t end)
{
    if (g->protection.uffd >= 0 && set_units(g, first, end, 0) < 0)
        give_up(g);
}

/* The memory that an extent is copied from, as addresses of its first byte and after its last.  Of a strided tensor,
 * whose rows are scattered, that is all of it.  0 if it is outside of the guarded range. */
static int extent_range(const eng_guard *g, const eng_job *job, const eng_extent *extent, uint64_t *start,
                        uint64_t *end)
{
    const eng_source *source = &job->sources[extent->source];
    *start = source->address;
    if (source->ndim == 0) {
        *start += extent->source_offset;
        *end = *start + extent->nbytes;
    } else {
        *end = *start + source->itemsize;
        for (uint32_t d = 0; d < source->ndim; d++) {
            const int64_t reach = (source->shape[d] - 1) * source->stride[d] * (int64_t)source->itemsize;
            if (reach < 0)
                *start += (uint64_t)reach;
            else
                *end += (uint64_t)reach;
        }
    }
    return *start >= g->protection.address && *end <= g->protection.address + g->protection.nbytes;
}

/* The units that an extent is copied from: `*first` up to `*end`, which are equal if there are none. */
static void extent_units(const eng_guard *g, const eng_job *job, uint32_t extent, uint32_t *first, uint32_t *end)
{
    uint64_t from, to;
    *first = *end = 0;
    if (!extent_range(g, job, &job->extents[extent], &from, &to))
        return;
    *first = (uint32_t)((from - g->protection.address) / UNIT_BYTES);
    *end = (uint32_t)((to - 1 - g->protection.address) / UNIT_BYTES) + 1;
}

/* ---- arming ---- */

static int reserve(void **array, uint32_t *capacity, uint64_t count, size_t item_bytes)
{
    if (count <= *capacity)
        return 0;
    void *grown = count <= UINT32_MAX ? realloc(*array, count * item_bytes) : NULL;
    if (grown == NULL)
        return -ENOMEM;
    *array = grown;
    *capacity = (uint32_t)count;
    return 0;
}

/* Count the extents of a job in each unit. */
static uint64_t count_extents(eng_guard *g, const eng_job *job)
{
    uint64_t total = 0;
    for (uint32_t u = 0; u < g->unit_count; u++)
        g->units[u].pending = 0;
    for (uint32_t b = 0; b < job->block_count; b++)
        for (uint32_t i = 0; i < job->blocks[b].extent_count; i++) {
            uint32_t u, end;
            extent_units(g, job, job->blocks[b].extent_start + i, &u, &end);
            for (total += end - u; u < end; u++)
                g->units[u].pending++;
        }
    return total;
}

/* List the blocks of each unit.  One that has several extents there is listed as often. */
static void list_blocks(eng_guard *g, const eng_job *job)
{
    uint32_t start = 0;
    for (uint32_t u = 0; u < g->unit_count; u++) {
        start += g->units[u].pending;
        g->unit_starts[u] = start; /* counted down to its first block below */
    }
    g->unit_starts[g->unit_count] = start;
    for (uint32_t b = job->block_count; b-- > 0;)
        for (uint32_t i = 0; i < job->blocks[b].extent_count; i++) {
            uint32_t u, end;
            extent_units(g, job, job->blocks[b].extent_start + i, &u, &end);
            for (; u < end; u++)
                g->unit_blocks[--g->unit_starts[u]] = b;
        }
}

static void note_written(void *context, uint64_t start, uint64_t end)
{
    eng_guard *g = context;
    const uint64_t address = g->protection.address;
    for (uint64_t u = (start - address) / UNIT_BYTES; u <= (end - 1 - address) / UNIT_BYTES; u++)
        g->units[u].is_protected = 0;
}

/* Whether all units of a block have been protected since the job before.  A block without any unit has sources that never
 * change. */
static int is_untouched(const eng_guard *g, const eng_job *job, const eng_block *block)
{
    int untouched = 1;
    for (uint32_t i = 0; i < block->extent_count && untouched; i++) {
        uint32_t u, end;
        for (extent_units(g, job, block->extent_start + i, &u, &end); u < end; u++)
            untouched = untouched && g->units[u].is_protected && !g->units[u].has_changed;
    }
    return untouched;
}

/* Keep of the clean blocks those that are still untouched, and count them. */
static uint32_t keep_clean(eng_guard *g, const eng_job *job)
{
    uint32_t count = 0;
    for (uint32_t b = 0; b < job->block_count; b++) {
        g->clean[b] = g->clean[b] && is_untouched(g, job, &job->blocks[b]);
        count += g->clean[b];
    }
    return count;
}

/* Protect every unit that is not, those next to each other in one call. */
static int protect_all(eng_guard *g)
{
    int result = 0;
    for (uint32_t u = 0, first = 0; u <= g->unit_count && result == 0; u++) {
        if (u < g->unit_count && !g->units[u].is_protected)
            continue;
        if (first < u)
            result = set_units(g, first, u, 1);
        first = u + 1;
    }
    return result;
}

/* Note the units of which a page was written; with `again`, protect those pages again. */
static int ask_written(eng_guard *g, int again)
{
    return protection_scan(&g->protection, g->protection.address, g->protection.nbytes, again, note_written, g);
}

/* Protect everything, and find out which blocks are clean.  The moment of the snapshot is when the last unit is protected.
 * Under ENG_GUARD_DETECT a unit that was protected from before may be written until then, after the first question: its
 * blocks are not clean, and are torn when they are staged. */
static int protect(eng_guard *g, const eng_job *job)
{
    const int is_async = g->kind == ENG_GUARD_DETECT;
    int result = is_async ? ask_written(g, 1) : 0;
    if (job->block_count > 0)
        memset(g->clean, job->previous != NULL, job->block_count);
    const uint32_t clean_count = keep_clean(g, job);
    if (result == 0)
        result = protect_all(g);
    if (result == 0 && is_async && clean_count > 0) {
        result = ask_written(g, 0);
        keep_clean(g, job);
    }
    return result;
}

/* All blocks of the job are withheld: nothing of it is pending, and nothing is protected for it.  Only writers that wait
 * may do that; without them a block would be torn by a write to another that shares its page, and is not released. */
static int withhold(eng_guard *g, const eng_job *job)
{
    if (g->kind != ENG_GUARD_COW || job->withheld_count != job->block_count)
        return -EINVAL;
    for (uint32_t u = 0; u < g->unit_count; u++)
        g->units[u].pending = 0;
    memset(g->clean, 0, job->block_count);
    return 0;
}

/* Whether a unit has a block that is not pending, or is staged already. */
static int is_shared(const eng_guard *g, const eng_job *job, uint32_t index)
{
    int shared = 0;
    for (uint32_t at = g->unit_starts[index]; at < g->unit_starts[index + 1]; at++)
        shared |= __atomic_load_n(&job->states[g->unit_blocks[at]], __ATOMIC_ACQUIRE) != ENG_PENDING;
    return shared;
}

/* Protect the units of an extent, and count it as pending in them.  If a unit was not protected, its other blocks may have
 * been written, so they are not clean now, nor for the job after this one. */
static int watch_extent(eng_guard *g, const eng_job *job, uint32_t extent)
{
    uint32_t u, end;
    int result = 0;
    for (extent_units(g, job, extent, &u, &end); u < end && result == 0; u++) {
        unit *at = &g->units[u];
        if (!at->is_protected) {
            at->has_changed |= (uint8_t)is_shared(g, job, u);
            result = set_units(g, u, u + 1, 1);
        }
        at->pending += result == 0;
    }
    return result;
}

static int watch_block(eng_guard *g, const eng_job *job, uint32_t block)
{
    int result = 0;
    for (uint32_t i = 0; i < job->blocks[block].extent_count && result == 0; i++)
        result = watch_extent(g, job, job->blocks[block].extent_start + i);
    return result;
}

int guard_watch(eng_guard *g, const eng_job *job, const uint32_t *blocks, uint32_t count)
{
    pthread_mutex_lock(&g->mutex);
    int result = g->job != job ? -ESRCH : g->protection.uffd < 0 ? -EBADF : 0;
    for (uint32_t i = 0; i < count && result == 0; i++)
        g->clean[blocks[i]] = job->previous != NULL && is_untouched(g, job, &job->blocks[blocks[i]]);
    for (uint32_t i = 0; i < count && result == 0; i++)
        __atomic_store_n(&job->states[blocks[i]], ENG_PENDING, __ATOMIC_RELEASE);
    for (uint32_t i = 0; i < count && result == 0; i++)
        result = watch_block(g, job, blocks[i]);
    pthread_mutex_unlock(&g->mutex);
    return result;
}

/* The armed job will not read its sources again: unprotect the units of which it still had something to read. */
static void end(eng_guard *g)
{
    for (uint32_t u = 0; u < g->unit_count; u++) {
        if (g->units[u].pending > 0 || g->units[u].is_wanted)
            unprotect(g, u, u + 1);
        g->units[u].is_wanted = 0;
    }
    g->waiting_count = 0;
    __atomic_store_n(&g->wanted_count, 0, __ATOMIC_RELEASE);
    g->job = NULL;
    g->wake_fd = -1;
}

/* Arm a guard that is not.  The mutex is held. */
static int arm(eng_guard *g, const eng_job *job)
{
    int result = reserve((void **)&g->clean, &g->clean_capacity, job->block_count, sizeof *g->clean);
    const uint64_t listed = count_extents(g, job);
    if (result == 0)
        result = reserve((void **)&g->unit_blocks, &g->unit_blocks_capacity, listed, sizeof *g->unit_blocks);
    if (result < 0)
        return result;
    list_blocks(g, job);
    for (uint32_t u = 0; u < g->unit_count; u++)
        g->units[u].is_listed = g->units[u].has_changed = 0;
    if (job->withheld_count == 0)
        result = protect(g, job);
    else
        result = withhold(g, job);
    g->has_given_up = 0;
    g->progress_ns = thread_now_ns();
    g->job = job;
    return result;
}

int eng_guard_arm(const eng_job *job)
{
    eng_guard *g = job->guard;
    if (g->forks.forked || !job_is_valid(job, job->withheld_count, SLOT_BYTES_MAX))
        return -EINVAL;
    pthread_mutex_lock(&g->mutex);
    int result = g->job != NULL ? -EBUSY : g->protection.uffd < 0 ? -EBADF : arm(g, job);
    if (result < 0 && g->job == job)
        end(g);
    pthread_mutex_unlock(&g->mutex);
    return result;
}

/* ---- the pipeline's side ---- */

void guard_attach(eng_guard *g, int wake_fd)
{
    pthread_mutex_lock(&g->mutex);
    g->wake_fd = wake_fd;
    pthread_mutex_unlock(&g->mutex);
}

int guard_is_clean(const eng_guard *g, uint32_t block)
{
    return g->clean[block];
}

/* A pending block of a unit that can be claimed: 1, or 0 if all are staged, or are being staged. */
static int find_pending(const eng_guard *g, uint32_t index, guard_claim claim, void *context, uint32_t *block)
{
    for (uint32_t at = g->unit_starts[index]; at < g->unit_starts[index + 1]; at++) {
        *block = g->unit_blocks[at];
        if (g->job->states[*block] == ENG_PENDING && claim(context, *block))
            return 1;
    }
    return 0;
}

int guard_wanted(eng_guard *g, guard_claim claim, void *context, uint32_t *block)
{
    int found = 0;
    if (__atomic_load_n(&g->wanted_count, __ATOMIC_ACQUIRE) == 0)
        return 0;
    pthread_mutex_lock(&g->mutex);
    while (g->job != NULL && g->wanted_count > 0 && !(found = find_pending(g, g->wanted[0], claim, context, block))) {
        g->units[g->wanted[0]].is_listed = 0;
        memmove(g->wanted, g->wanted + 1, --g->wanted_count * sizeof *g->wanted);
    }
    pthread_mutex_unlock(&g->mutex);
    return found;
}

static void note_torn(void *context, uint64_t start, uint64_t end)
{
    (void)start;
    (void)end;
    *(int *)context = 1;
}

/* Whether pages were written since the guard was armed.  An error of the kernel says nothing, so it counts as yes. */
static int is_written(const eng_guard *g, uint64_t start, uint64_t end)
{
    int torn = 0;
    return start < end && (protection_scan(&g->protection, start, end - start, 0, note_torn, &torn) < 0 || torn);
}

/* Whether a page that a block was copied from was written since the guard was armed.  Extents that continue each other are
 * one question: small tensors have many to a page. */
static int is_torn(const eng_guard *g, const eng_block *block)
{
    const uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
    uint64_t asked_start = 0, asked_end = 0;
    if (g->kind == ENG_GUARD_COW)
        return 0; /* the writer waits */
    for (uint32_t i = 0; i < block->extent_count; i++) {
        uint64_t start, end;
        if (!extent_range(g, g->job, &g->job->extents[block->extent_start + i], &start, &end))
            continue;
        start &= -page_bytes;
        end = (end + page_bytes - 1) & -page_bytes;
        if (start >= asked_start && start <= asked_end) {
            asked_end = end > asked_end ? end : asked_end;
            continue;
        }
        if (is_written(g, asked_start, asked_end))
            return 1;
        asked_start = start;
        asked_end = end;
    }
    return is_written(g, asked_start, asked_end);
}

/* Release the units of an extent that have nothing pending any more: those next to each other in one call. */
static void release_extent(eng_guard *g, uint32_t extent, int is_unchanged)
{
    uint32_t u, end, first;
    extent_units(g, g->job, extent, &u, &end);
    for (first = u; u < end; u++) {
        unit *at = &g->units[u];
        at->has_changed |= (uint8_t)!is_unchanged;
        at->pending--;
        const int is_released = at->pending == 0 && (at->has_changed || at->is_wanted);
        if (at->is_wanted && at->pending == 0) {
            at->is_wanted = 0;
            g->waiting_count--;
        }
        if (is_released)
            continue;
        if (first < u)
            unprotect(g, first, u);
        first = u + 1;
    }
    if (first < u)
        unprotect(g, first, u);
}

/* The mutex is held. */
static void release(eng_guard *g, const eng_block *block, int is_unchanged)
{
    for (uint32_t i = 0; i < block->extent_count && !g->has_given_up; i++)
        release_extent(g, block->extent_start + i, is_unchanged);
    g->progress_ns = thread_now_ns();
}

int guard_release(eng_guard *g, uint32_t block, int is_unchanged)
{
    pthread_mutex_lock(&g->mutex);
    const int is_late = g->has_given_up;
    const int result = is_late ? ETIMEDOUT : is_torn(g, &g->job->blocks[block]) ? EBUSY : 0;
    release(g, &g->job->blocks[block], is_unchanged);
    pthread_mutex_unlock(&g->mutex);
    return result;
}

void guard_skip(eng_guard *g, uint32_t block)
{
    pthread_mutex_lock(&g->mutex);
    release(g, &g->job->blocks[block], 1);
    pthread_mutex_unlock(&g->mutex);
}

void guard_end(eng_guard *g, const eng_job *job)
{
    pthread_mutex_lock(&g->mutex);
    if (g->job == job)
        end(g);
    pthread_mutex_unlock(&g->mutex);
}

void eng_guard_disarm(const eng_job *job)
{
    if (!job->guard->forks.forked)
        guard_end(job->guard, job);
}

/* ---- the guard's thread ---- */

/* Answer a page fault: a writer waits for this address.  The mutex is held. */
static void answer(eng_guard *g, uint64_t address)
{
    const uint32_t u = (uint32_t)((address - g->protection.address) / UNIT_BYTES);
    unit *at = &g->units[u];
    if (g->job != NULL && at->pending == 0)
        at->has_changed =
            1; /* a block that was staged may be written now: if the unit is protected again, it is not clean */
    if (g->job == NULL || g->has_given_up || at->pending == 0) {
        unprotect(g, u, u + 1);
        return;
    }
    if (!at->is_wanted) {
        at->is_wanted = 1;
        if (g->waiting_count++ == 0)
            g->progress_ns = thread_now_ns();
    }
    if (!at->is_listed) {
        at->is_listed = 1;
        g->wanted[g->wanted_count] = u;
        __atomic_store_n(&g->wanted_count, g->wanted_count + 1, __ATOMIC_RELEASE);
    }
    if (g->wake_fd >= 0)
        thread_wake(g->wake_fd);
}

/* Let all writers go on if the pipeline stages nothing: the save fails, and training goes on.  Returns whether a writer
 * still waits.  The mutex is held. */
static int keep_patience(eng_guard *g)
{
    const int is_waiting = g->waiting_count > 0 && !g->has_given_up;
    if (!is_waiting || thread_now_ns() - g->progress_ns < PATIENCE_NS)
        return is_waiting;
    g->has_given_up = 1;
    unprotect(g, 0, g->unit_count);
    return 0;
}

static void *watch(void *argument)
{
    eng_guard *g = argument;
    struct pollfd ready[] = {{.fd = g->protection.uffd, .events = POLLIN},
                             {.fd = g->forks.descriptors[DESCRIPTOR_STOP], .events = POLLIN}};
    uint64_t address;
    int is_waiting = 0, found;
    while (ready[1].revents == 0) {
        poll(ready, 2, is_waiting ? POLL_MS : -1);
        pthread_mutex_lock(&g->mutex);
        found = 0;
        while (g->protection.uffd >= 0 && (found = protection_next_fault(&g->protection, &address)) > 0)
            answer(g, address);
        if (found < 0)
            give_up(g); /* a writer may wait that nobody can name */
        is_waiting = keep_patience(g);
        if (g->protection.uffd < 0)
            ready[0].fd = -1; /* which poll(2) ignores */
        pthread_mutex_unlock(&g->mutex);
    }
    return NULL;
}

/* ---- opening and closing ---- */

static int start_thread(eng_guard *g)
{
    forks_lock();
    const int stop_fd = eventfd(0, EFD_CLOEXEC);
    g->forks.descriptors[DESCRIPTOR_STOP] = stop_fd;
    forks_unlock();
    if (stop_fd < 0)
        return -errno;
    const int result = thread_start(&g->thread, "engine-guard", watch, g);
    g->has_thread = result == 0;
    return result;
}

static int open_protection(eng_guard *g, uint64_t address, uint64_t nbytes, uint32_t *refused)
{
    forks_lock();
    const int result = protection_open(&g->protection, address, nbytes, g->kind == ENG_GUARD_DETECT, refused);
    g->forks.descriptors[DESCRIPTOR_UFFD] = g->protection.uffd;
    g->forks.descriptors[DESCRIPTOR_PAGEMAP] = g->protection.pagemap;
    forks_unlock();
    return result;
}

int eng_guard_open(uint32_t kind, uint64_t address, uint64_t nbytes, uint32_t *refused, eng_guard **guard)
{
    *refused = ENG_REFUSED_RESOURCES;
    const uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
    if (kind > ENG_GUARD_DETECT || nbytes == 0 || address % page_bytes != 0 || nbytes % page_bytes != 0)
        return -EINVAL;
    eng_guard *g = calloc(1, sizeof *g);
    if (g == NULL)
        return -ENOMEM;
    g->kind = kind;
    g->wake_fd = -1;
    g->protection.uffd = g->protection.pagemap = -1;
    g->unit_count = (uint32_t)((nbytes + UNIT_BYTES - 1) / UNIT_BYTES);
    pthread_mutex_init(&g->mutex, NULL);
    forks_lock();
    forks_add(&g->forks);
    forks_unlock();
    g->units = calloc(g->unit_count, sizeof *g->units);
    g->wanted = calloc(g->unit_count, sizeof *g->wanted);
    g->unit_starts = calloc((size_t)g->unit_count + 1, sizeof *g->unit_starts);
    int result = g->units == NULL || g->wanted == NULL || g->unit_starts == NULL ? -ENOMEM : 0;
    if (result == 0)
        result = open_protection(g, address, nbytes, refused);
    if (result == 0 && kind == ENG_GUARD_COW)
        result = start_thread(g);
    if (result < 0) {
        eng_guard_free(&g);
        return result;
    }
    *refused = ENG_REFUSED_NOTHING;
    *guard = g;
    return 0;
}

void eng_guard_free(eng_guard **guard)
{
    eng_guard *g = *guard;
    *guard = NULL;
    if (g == NULL)
        return;
    if (!g->forks.forked) {
        if (g->has_thread) {
            thread_wake(g->forks.descriptors[DESCRIPTOR_STOP]);
            pthread_join(g->thread, NULL);
        }
        close_protection(g);
        forks_lock();
        forks_close(&g->forks.descriptors[DESCRIPTOR_STOP]);
        forks_remove(&g->forks);
        forks_unlock();
        pthread_mutex_destroy(&g->mutex);
    }
    free(g->units);
    free(g->wanted);
    free(g->unit_starts);
    free(g->unit_blocks);
    free(g->clean);
    free(g);
}
