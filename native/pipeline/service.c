/*
 * service.c: the pipeline's thread, and the calls that other threads make to it.
 *
 * One round of the thread: empty the inbox; do a few pieces of work, each of which stages, reads or verifies a block;
 * submit all started operations in one call, and reap the completed ones.  The thread sleeps only if there was no work.
 * Helper threads stage and verify other blocks meanwhile, and wake it as a completed operation does.
 */
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "guarding/guard.h"
#include "pipeline/pipeline.h"
#include "pipeline/thread.h"

/* The size on x86-64, and on aarch64 with pages of 4 KiB. */
static const size_t HUGE_PAGE_BYTES = 2 << 20;

static int wake_fd(const eng_pipeline *p)
{
    return p->forks.descriptors[DESCRIPTOR_WAKE];
}

/* Put a pipeline on the list of forks.h, with its first descriptor.  Returns 0 or a negative errno. */
static int list_pipeline(eng_pipeline *p)
{
    forks_lock();
    forks_add(&p->forks);
    const eng_shared *shared = p->config.shared;
    int *descriptors = p->forks.descriptors;
    if (shared != NULL) {
        descriptors[DESCRIPTOR_POST] = forks_duplicate(shared->post_fd);
        descriptors[DESCRIPTOR_PEER] = forks_duplicate(shared->peer_fd);
    }
    descriptors[DESCRIPTOR_WAKE] =
        shared == NULL ? eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK) : forks_duplicate(shared->wake_fd);
    const int opened = shared == NULL || (descriptors[DESCRIPTOR_POST] >= 0 && descriptors[DESCRIPTOR_PEER] >= 0);
    const int result = wake_fd(p) < 0 || !opened ? -errno : 0;
    forks_unlock();
    return result;
}

static void close_descriptors(eng_pipeline *p)
{
    forks_lock();
    forks_close(&p->forks.descriptors[DESCRIPTOR_WAKE]);
    forks_close(&p->forks.descriptors[DESCRIPTOR_POST]);
    forks_close(&p->forks.descriptors[DESCRIPTOR_PEER]);
    forks_unlock();
}

static void unlist_pipeline(eng_pipeline *p)
{
    forks_lock();
    forks_remove(&p->forks);
    forks_unlock();
}

/* ---- the thread ---- */

static void accept_inbox(eng_pipeline *p)
{
    if (!__atomic_exchange_n(&p->dirty, 0, __ATOMIC_ACQ_REL))
        return;
    /* Read before the aborts that come with it, so that jobs fail by those and not by the writes. */
    const int abandons = __atomic_load_n(&p->abandons, __ATOMIC_ACQUIRE);
    for (uint32_t i = 0; i < ENG_JOBS_MAX; i++)
        pipeline_accept(p, i);
    if (abandons)
        shared_abandon(p->shared);
}

/* The mutex is held, so that the thread does not close the descriptor meanwhile. */
static void wake(eng_pipeline *p)
{
    if (p->state == SERVICE_CLOSED)
        return;
    /* The flag first: the thread empties the descriptor and then looks at the flag. */
    __atomic_store_n(&p->dirty, 1, __ATOMIC_RELEASE);
    thread_wake(wake_fd(p));
}

static void sleep_until_woken(eng_pipeline *p)
{
    struct pollfd readable = {.fd = wake_fd(p), .events = POLLIN};
    uint64_t wakes;
    poll(&readable, 1, -1); /* an error is a spurious wake */
    if (read(wake_fd(p), &wakes, sizeof wakes) < 0 && errno != EAGAIN)
        abort();
}

static void close_ring(eng_pipeline *p)
{
    if (p->ring == NULL)
        return;
    if (!p->broken)
        ring_unregister(p->ring);
    forks_lock();
    p->forks.descriptors[DESCRIPTOR_RING] = -1;
    ring_close(p->ring);
    forks_unlock();
    p->ring = NULL;
}

static int open_ring(eng_pipeline *p)
{
    forks_lock();
    int result = ring_open(&p->config, wake_fd(p), &p->ring, &p->io);
    if (result == 0)
        p->forks.descriptors[DESCRIPTOR_RING] = ring_fd(p->ring);
    forks_unlock();
    if (result == 0)
        result = ring_register(p->ring, &p->config, p->memory);
    if (result < 0)
        close_ring(p);
    return result;
}

static int open_way(eng_pipeline *p)
{
    if (p->config.io != NULL) {
        p->io = *p->config.io;
        return 0;
    }
    if (p->config.way == ENG_SHARED) {
        shared_header *header = (shared_header *)(p->memory - ENG_SHARED_HEADER_BYTES);
        const int *descriptors = p->forks.descriptors;
        return shared_open(&p->config, header, descriptors[DESCRIPTOR_POST], wake_fd(p), descriptors[DESCRIPTOR_PEER],
                           &p->shared, &p->io);
    }
    if (p->config.way == ENG_THREADS)
        return posix_open(&p->config, wake_fd(p), &p->posix, &p->io);
    return open_ring(p);
}

static int open_stager(eng_pipeline *p)
{
    if (p->config.staging_threads <= 1)
        return 0;
    return stager_open(p->config.staging_threads - 1, wake_fd(p), &p->stager);
}

/* Map memory that begins on a huge page boundary: a kernel aligns only some mappings itself, or none. */
static uint8_t *map_aligned(size_t nbytes)
{
    const size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE), whole_bytes = (nbytes + page_bytes - 1) & -page_bytes;
    const int protection = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS;
    uint8_t *mapped = mmap(NULL, whole_bytes + HUGE_PAGE_BYTES, protection, flags, -1, 0);
    if (mapped == MAP_FAILED)
        return MAP_FAILED;
    const size_t before_bytes = -(uintptr_t)mapped % HUGE_PAGE_BYTES;
    if (before_bytes > 0)
        munmap(mapped, before_bytes);
    munmap(mapped + before_bytes + whole_bytes, HUGE_PAGE_BYTES - before_bytes);
    return mapped + before_bytes;
}

/* Map the slots that a monitor maps too, behind their header.  A forked child gets neither. */
static uint8_t *map_shared(const eng_pipeline *p)
{
    eng_mapping mapping;
    if (eng_map_shared(p->config.shared->memory_fd, shared_bytes(&p->config), &mapping) < 0)
        return MAP_FAILED;
    madvise(mapping.address, ENG_SHARED_HEADER_BYTES, MADV_DONTFORK);
    return mapping.address + ENG_SHARED_HEADER_BYTES;
}

/* Map the slots; all are free. */
static int map_slots(eng_pipeline *p)
{
    const size_t nbytes = (size_t)p->config.slot_count * p->config.slot_bytes;
    forks_lock();
    p->memory = p->config.way == ENG_SHARED ? map_shared(p) : map_aligned(nbytes);
    if (p->memory != MAP_FAILED) /* a fork must not copy slots that the kernel is writing from */
        madvise(p->memory, nbytes, MADV_DONTFORK);
    forks_unlock();
    if (p->memory == MAP_FAILED)
        return -ENOMEM;
    madvise(p->memory, nbytes, MADV_HUGEPAGE); /* pinning and copying are cheaper in huge pages */
    memset(p->slots, 0, p->config.slot_count * sizeof *p->slots);
    for (p->free_count = 0; p->free_count < p->config.slot_count; p->free_count++)
        p->free_slots[p->free_count] = p->config.slot_count - 1 - p->free_count;
    return 0;
}

/* Unmap the slots, and release their addresses unless the kernel may still use them.
 *
 * A broken ring may have reads in flight.  Pinned memory is not reused until they end.  But a read that has not begun,
 * or that goes through the page cache, would write to the next mapping at the same address.  So the addresses of a
 * broken ring's slots stay reserved, and are never mapped again. */
static void unmap_slots(eng_pipeline *p)
{
    if (p->memory == MAP_FAILED)
        return;
    const size_t nbytes = (size_t)p->config.slot_count * p->config.slot_bytes;
    const int used = p->ring != NULL || p->config.io != NULL;
    if (p->config.way == ENG_SHARED)
        munmap(p->memory - ENG_SHARED_HEADER_BYTES, shared_bytes(&p->config));
    else if (p->broken && used) /* if this fails the slots stay mapped, which is as safe */
        mmap(p->memory, nbytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    else
        munmap(p->memory, nbytes);
    p->memory = MAP_FAILED;
}

int service_replace_ring(eng_pipeline *p)
{
    if (p->config.io != NULL || p->config.way == ENG_SHARED)
        return p->broken; /* the table is the caller's to repair */
    unmap_slots(p);
    close_ring(p);
    int result = map_slots(p);
    if (result == 0)
        result = open_way(p);
    p->broken = -result;
    return p->broken;
}

/* A thread that wakes after a long sleep preempts the thread that woke it: a caller of eng_submit is held up until some
 * of the arena is staged.  Under SCHED_BATCH the woken thread waits for its turn (sched(7)).  Beside a
 * training on every core, checkpoint() took 0.6 ms in some runs and 2 to 5 ms in others; with SCHED_BATCH it takes 0.6
 * ms.  If the kernel refuses the policy, the thread works without it.  A policy that the user chose stays. */
static void lower_priority(void)
{
    struct sched_param parameters;
    int policy;
    if (pthread_getschedparam(pthread_self(), &policy, &parameters) == 0 && policy == SCHED_OTHER)
        pthread_setschedparam(pthread_self(), SCHED_BATCH, &parameters);
}

static int is_closing(const eng_pipeline *p)
{
    return __atomic_load_n(&p->state, __ATOMIC_ACQUIRE) == SERVICE_CLOSING;
}

/* The mutex is held. */
static void enter_state(eng_pipeline *p, enum service_state state)
{
    __atomic_store_n(&p->state, state, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&p->changed);
}

/* Work until the pipeline is closing and every job has ended. */
static void serve(eng_pipeline *p)
{
    for (;;) {
        /* Read before the inbox: once this is true no job is submitted, and every attached job is in the inbox. */
        const int closing = is_closing(p);
        accept_inbox(p);
        if (closing)
            pipeline_cancel_incomplete(p);
        const int idle = pipeline_work(p) == 0;
        if (p->moving_count > 0)
            pipeline_reap(p, idle);
        else if (idle && p->queue_count == 0 && closing)
            break;
        else if (idle && (p->helped.count > 0 || !is_closing(p)))
            sleep_until_woken(p); /* not while closing, unless a helper will wake it: that of eng_close may be read */
    }
}

static void *run(void *argument)
{
    eng_pipeline *p = argument;
    lower_priority();
    int result = open_stager(p);
    if (result == 0)
        result = open_way(p);
    if (result == 0) {
        pthread_mutex_lock(&p->mutex);
        enter_state(p, SERVICE_OPEN);
        pthread_mutex_unlock(&p->mutex);
        serve(p);
    }
    if (p->stager != NULL)
        stager_close(p->stager);
    unmap_slots(p); /* here, because only this thread knows whether a broken ring has used them */
    close_ring(p);
    if (p->posix != NULL)
        posix_close(p->posix);
    if (p->shared != NULL)
        shared_close(p->shared);
    pthread_mutex_lock(&p->mutex);
    close_descriptors(p);
    p->open_error = result;
    enter_state(p, SERVICE_CLOSED);
    pthread_mutex_unlock(&p->mutex);
    return NULL;
}

/* ---- calls of other threads ---- */

static int start_thread(eng_pipeline *p)
{
    const int result = thread_start(&p->thread, "engine-io", run, p);
    if (result < 0)
        return result;
    p->has_thread = 1;
    pthread_mutex_lock(&p->mutex);
    while (p->state == SERVICE_OPENING)
        pthread_cond_wait(&p->changed, &p->mutex);
    const int error = p->open_error;
    pthread_mutex_unlock(&p->mutex);
    return error;
}

static int allocate_slots(eng_pipeline *p)
{
    p->slots = calloc(p->config.slot_count, sizeof *p->slots);
    p->free_slots = calloc(p->config.slot_count, sizeof *p->free_slots);
    p->unverified.slots = calloc(p->config.slot_count, sizeof *p->unverified.slots);
    p->waiting.slots = calloc(p->config.slot_count, sizeof *p->waiting.slots);
    p->helped.slots = calloc(p->config.slot_count, sizeof *p->helped.slots);
    const int listed = p->free_slots != NULL && p->unverified.slots != NULL && p->waiting.slots != NULL;
    return p->slots != NULL && listed && p->helped.slots != NULL ? 0 : -ENOMEM;
}

int eng_open(eng_config *config, eng_pipeline **pipeline)
{
    config->refused = ENG_REFUSED_RESOURCES;
    if (config->slot_count == 0 || config->slot_bytes == 0 || config->slot_bytes % ENG_ALIGNMENT != 0)
        return -EINVAL;
    if (config->staging_threads == 0 || config->staging_threads > ENG_STAGING_THREADS_MAX)
        return -EINVAL;
    if ((config->way == ENG_SHARED) != (config->shared != NULL))
        return -EINVAL;
    if (config->way == ENG_SHARED && config->slot_count > SHARED_ENTRIES)
        return -EINVAL;
    eng_pipeline *p = calloc(1, sizeof *p);
    if (p == NULL)
        return -ENOMEM;
    p->config = *config;
    p->memory = MAP_FAILED;
    pthread_mutex_init(&p->mutex, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&p->changed, &monotonic);
    pthread_condattr_destroy(&monotonic);
    int result = list_pipeline(p);
    if (result == 0)
        result = allocate_slots(p);
    if (result == 0)
        result = map_slots(p);
    if (result == 0)
        result = start_thread(p);
    config->refused = result < 0 ? p->config.refused : ENG_REFUSED_NOTHING;
    if (result < 0) {
        eng_free(&p);
        return result;
    }
    *pipeline = p;
    return 0;
}

/* Wait for a change until a time of thread_now_ns.  Returns 0 if that has passed.  The mutex is held. */
static int await_change(eng_pipeline *p, uint64_t until_ns)
{
    const struct timespec until = {(time_t)(until_ns / 1000000000u), (long)(until_ns % 1000000000u)};
    return pthread_cond_timedwait(&p->changed, &p->mutex, &until) != ETIMEDOUT;
}

static uint64_t deadline_ns(uint64_t timeout_ns)
{
    uint64_t until_ns;
    const int is_endless = __builtin_add_overflow(thread_now_ns(), timeout_ns, &until_ns) || until_ns > INT64_MAX;
    return is_endless ? INT64_MAX : until_ns;
}

static void abort_entry(entry *e, int32_t error)
{
    e->abort_error = error;
    e->aborted = 1;
}

int eng_close(eng_pipeline *p, int32_t error, uint64_t timeout_ns)
{
    const uint64_t until_ns = deadline_ns(timeout_ns);
    if (p->forks.forked)
        return 1; /* the thread is another process's, and the mutex may have been locked at the fork */
    pthread_mutex_lock(&p->mutex);
    if (p->state == SERVICE_OPEN)
        enter_state(p, SERVICE_CLOSING);
    for (uint32_t i = 0; i < ENG_JOBS_MAX && error != 0; i++)
        if (p->entries[i].job != NULL)
            abort_entry(&p->entries[i], error);
    if (error != 0 && p->config.way == ENG_SHARED)
        __atomic_store_n(&p->abandons, 1, __ATOMIC_RELEASE);
    wake(p);
    while (p->state != SERVICE_CLOSED && await_change(p, until_ns))
        ;
    const int closed = p->state == SERVICE_CLOSED;
    const int joins = closed && p->has_thread; /* only one caller joins, and the thread is about to end */
    if (joins)
        p->has_thread = 0;
    pthread_mutex_unlock(&p->mutex);
    if (joins)
        pthread_join(p->thread, NULL);
    return closed;
}

void eng_free(eng_pipeline **pipeline)
{
    eng_pipeline *p = *pipeline;
    *pipeline = NULL;
    if (p == NULL)
        return;
    if (!p->forks.forked) {
        if (p->has_thread)
            eng_close(p, ECANCELED, UINT64_MAX);
        unmap_slots(p); /* this and the descriptor are left only if there was no thread */
        close_descriptors(p);
        unlist_pipeline(p);
        pthread_cond_destroy(&p->changed);
        pthread_mutex_destroy(&p->mutex);
    }
    free(p->free_slots);
    free(p->unverified.slots);
    free(p->waiting.slots);
    free(p->helped.slots);
    free(p->slots);
    free(p);
}

/* The entry of a job, or NULL if it has ended.  For a job of NULL, a free entry.  The mutex is held. */
static entry *find(eng_pipeline *p, const eng_job *job)
{
    for (uint32_t i = 0; i < ENG_JOBS_MAX; i++)
        if (p->entries[i].job == job)
            return &p->entries[i];
    return NULL;
}

/* One try to submit a job.  The mutex is held. */
static int try_submit(eng_pipeline *p, eng_job *job)
{
    if (p->state != SERVICE_OPEN)
        return -ESHUTDOWN;
    if (eng_reached(job, ENG_DONE))
        return -ECANCELED;
    entry *e = find(p, NULL);
    if (e == NULL)
        return -EAGAIN;
    job->submitted_ns = thread_now_ns();
    e->job = job;
    e->submitted = 1;
    e->withheld_count = job->withheld_count;
    wake(p);
    return 0;
}

int eng_submit(eng_pipeline *p, eng_job *job, uint64_t timeout_ns)
{
    const uint64_t until_ns = deadline_ns(timeout_ns);
    int result;
    pthread_mutex_lock(&p->mutex);
    while ((result = try_submit(p, job)) == -EAGAIN && await_change(p, until_ns))
        ;
    pthread_mutex_unlock(&p->mutex);
    return result;
}

int eng_attach(eng_pipeline *p, eng_job *job, const int32_t *fds, const eng_hash *known, const uint8_t *is_known)
{
    pthread_mutex_lock(&p->mutex);
    const int closed = p->state == SERVICE_CLOSED;
    entry *e = find(p, job);
    if (e != NULL) {
        e->fds = fds;
        e->known = known;
        e->is_known = is_known;
        e->attached = 1;
        wake(p);
    }
    pthread_mutex_unlock(&p->mutex);
    return e != NULL ? 0 : closed ? -ESHUTDOWN : -ESRCH;
}

static int compare_indices(const void *left, const void *right)
{
    const uint32_t l = *(const uint32_t *)left, r = *(const uint32_t *)right;
    return (l > r) - (l < r);
}

/* Whether blocks are withheld, and none is named twice.  `sorted` has room for their indices. */
static int may_release(const eng_job *job, const uint32_t *blocks, uint32_t count, uint32_t *sorted)
{
    for (uint32_t i = 0; i < count; i++)
        if (blocks[i] >= job->block_count || __atomic_load_n(&job->states[blocks[i]], __ATOMIC_ACQUIRE) != ENG_WITHHELD)
            return 0;
    memcpy(sorted, blocks, count * sizeof *blocks);
    qsort(sorted, count, sizeof *sorted, compare_indices);
    for (uint32_t i = 1; i < count; i++)
        if (sorted[i] == sorted[i - 1])
            return 0;
    return 1;
}

/* Let blocks begin, of a job that has not ended.  The mutex is held, so it does not end meanwhile: its arrays are there. */
static int release(eng_pipeline *p, entry *e, const uint32_t *blocks, uint32_t count)
{
    eng_job *job = e->job;
    /* The end of the order, which the pipeline's thread does not read: here the blocks are checked, and then listed. */
    uint32_t *listed = &job->order[job->block_count - job->withheld_count];
    if (count > job->withheld_count || !may_release(job, blocks, count, listed))
        return -EINVAL;
    const int result = job->guard != NULL ? guard_watch(job->guard, job, blocks, count) : 0;
    if (result < 0)
        return result;
    for (uint32_t i = 0; i < count && job->guard == NULL; i++) /* else the guard has done so */
        __atomic_store_n(&job->states[blocks[i]], ENG_PENDING, __ATOMIC_RELEASE);
    memcpy(listed, blocks, count * sizeof *blocks);
    job->withheld_count -= count;
    e->released = 1;
    wake(p);
    return 0;
}

int eng_release(eng_pipeline *p, eng_job *job, const uint32_t *blocks, uint32_t count)
{
    if (count == 0)
        return 0;
    pthread_mutex_lock(&p->mutex);
    entry *e = find(p, job);
    const int result = e != NULL ? release(p, e, blocks, count) : -ESRCH;
    pthread_mutex_unlock(&p->mutex);
    return result;
}

/* End a job that the thread has not seen.  The mutex is held. */
static void abort_unsubmitted(eng_pipeline *p, eng_job *job, int32_t error)
{
    if (job->guard != NULL)
        guard_end(job->guard, job);
    job->failure = ENG_ABORTED_FAILURE;
    job->error = error;
    job->failed_block = UINT32_MAX;
    __atomic_fetch_or(&job->milestones, ENG_URGENT | ENG_ALL_STAGED | ENG_DONE, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&p->changed);
}

void eng_abort(eng_pipeline *p, eng_job *job, int32_t error)
{
    pthread_mutex_lock(&p->mutex);
    entry *e = find(p, job);
    if (e != NULL) {
        abort_entry(e, error);
        wake(p);
    } else if (job->submitted_ns == 0 && !eng_reached(job, ENG_DONE)) {
        abort_unsubmitted(p, job, error);
    }
    pthread_mutex_unlock(&p->mutex);
}

int eng_reached(const eng_job *job, uint32_t milestone)
{
    return (__atomic_load_n(&job->milestones, __ATOMIC_ACQUIRE) & milestone) != 0;
}

int eng_wait(eng_pipeline *p, const eng_job *job, uint32_t milestone, uint64_t timeout_ns)
{
    const uint64_t until_ns = deadline_ns(timeout_ns);
    int result;
    if (eng_reached(job, milestone))
        return 1;
    pthread_mutex_lock(&p->mutex);
    do {
        result = eng_reached(job, milestone) ? 1 : p->state == SERVICE_CLOSED ? -ESHUTDOWN : 0;
    } while (result == 0 && await_change(p, until_ns));
    pthread_mutex_unlock(&p->mutex);
    return result;
}
