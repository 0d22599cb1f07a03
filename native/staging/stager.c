/*
 * stager.c: staging on helper threads, as stager.h specifies.
 *
 * Theory of operation.  The pipeline's thread appends a block to a queue.  A helper removes the oldest, stages it without
 * the mutex and appends the result to another list, then wakes the pipeline through its eventfd.  Each helper has room
 * for one block more than the one that it stages: the pipeline's thread stages blocks, too, and a helper that is done
 * earlier need not wait for it.  More would only delay blocks that the pipeline's thread could stage itself.
 */
#include "staging/stager.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pipeline/thread.h"
#include "staging/host.h"

enum { BLOCKS_EACH = 2 }; /* of a helper: one that it stages, and the next */

struct stager {
    pthread_mutex_t mutex;
    pthread_cond_t queued; /* a block, or the end */
    pthread_cond_t idle;   /* no helper stages */
    staging queue[ENG_STAGING_BLOCKS_MAX]; /* oldest first */
    staging results[ENG_STAGING_BLOCKS_MAX];
    uint32_t queue_count, active_count, result_count; /* together at most `capacity` */
    uint32_t capacity;
    int stopping;
    int wake_fd;
    uint32_t helper_count; /* how many have been started */
    pthread_t helpers[ENG_STAGING_THREADS_MAX];
};

/* ---- one block ---- */

static void stage_write(staging *work, const eng_block *block)
{
    const uint64_t start_ns = thread_now_ns();
    work->checksum = host_gather(work->job, block, work->memory);
    work->copying_ns = thread_now_ns() - start_ns;
}

static void stage_read(staging *work, const eng_block *block)
{
    const uint64_t start_ns = thread_now_ns();
    work->checksum = eng_hash_bytes(work->memory, block->nbytes);
    const uint64_t hashed_ns = thread_now_ns();
    work->hashing_ns = hashed_ns - start_ns;
    work->is_verified = memcmp(&work->checksum, &work->job->checksums[work->block], sizeof work->checksum) == 0;
    if (!work->is_verified)
        return;
    host_scatter(work->job, block, work->memory);
    work->copying_ns = thread_now_ns() - hashed_ns;
}

void stage(staging *work)
{
    const eng_block *block = &work->job->blocks[work->block];
    if (work->job->direction == ENG_WRITE)
        stage_write(work, block);
    else
        stage_read(work, block);
}

/* ---- the helpers ---- */

/* Remove a block from the queue.  The mutex is held. */
static staging take(stager *stager, uint32_t at)
{
    const staging work = stager->queue[at];
    stager->queue_count--;
    memmove(&stager->queue[at], &stager->queue[at + 1], (stager->queue_count - at) * sizeof work);
    return work;
}

static void *help(void *argument)
{
    stager *stager = argument;

    pthread_mutex_lock(&stager->mutex);
    for (;;) {
        while (stager->queue_count == 0 && !stager->stopping)
            pthread_cond_wait(&stager->queued, &stager->mutex);
        if (stager->queue_count == 0)
            break;
        staging work = take(stager, 0);
        stager->active_count++;
        pthread_mutex_unlock(&stager->mutex);
        stage(&work);
        pthread_mutex_lock(&stager->mutex);
        stager->results[stager->result_count++] = work;
        if (--stager->active_count == 0)
            pthread_cond_signal(&stager->idle);
        thread_wake(stager->wake_fd);
    }
    pthread_mutex_unlock(&stager->mutex);
    return NULL;
}

/* ---- the pipeline's side ---- */

int stager_begin(stager *stager, const staging *work)
{
    pthread_mutex_lock(&stager->mutex);
    const int has_room = stager->queue_count + stager->active_count + stager->result_count < stager->capacity;
    if (has_room) {
        stager->queue[stager->queue_count++] = *work;
        pthread_cond_signal(&stager->queued);
    }
    pthread_mutex_unlock(&stager->mutex);
    return has_room;
}

int stager_withdraw(stager *stager, uint32_t slot)
{
    int found = 0;
    pthread_mutex_lock(&stager->mutex);
    for (uint32_t at = 0; at < stager->queue_count && !found; at++)
        if (stager->queue[at].slot == slot) {
            take(stager, at);
            found = 1;
        }
    pthread_mutex_unlock(&stager->mutex);
    return found;
}

uint32_t stager_poll(stager *stager, staging *results)
{
    pthread_mutex_lock(&stager->mutex);
    const uint32_t count = stager->result_count;
    memcpy(results, stager->results, count * sizeof *results);
    stager->result_count = 0;
    pthread_mutex_unlock(&stager->mutex);
    return count;
}

void stager_drain(stager *stager)
{
    pthread_mutex_lock(&stager->mutex);
    stager->queue_count = 0;
    while (stager->active_count > 0)
        pthread_cond_wait(&stager->idle, &stager->mutex);
    stager->result_count = 0;
    pthread_mutex_unlock(&stager->mutex);
}

/* ---- opening and closing ---- */

static int start_helpers(stager *stager, uint32_t count)
{
    char name[16]; /* pthread_setname_np(3) */
    for (uint32_t i = 0; i < count; i++) {
        snprintf(name, sizeof name, "engine-stage-%u", i % 100);
        const int result = thread_start(&stager->helpers[i], name, help, stager);
        if (result < 0)
            return result;
        stager->helper_count++;
    }
    return 0;
}

int stager_open(uint32_t helper_count, int wake_fd, stager **opened)
{
    stager *stager = calloc(1, sizeof *stager);
    if (stager == NULL)
        return -ENOMEM;
    stager->wake_fd = wake_fd;
    stager->capacity = BLOCKS_EACH * helper_count;
    pthread_mutex_init(&stager->mutex, NULL);
    pthread_cond_init(&stager->queued, NULL);
    pthread_cond_init(&stager->idle, NULL);
    const int result = start_helpers(stager, helper_count);
    if (result < 0) {
        stager_close(stager);
        return result;
    }
    *opened = stager;
    return 0;
}

void stager_close(stager *stager)
{
    pthread_mutex_lock(&stager->mutex);
    stager->stopping = 1;
    pthread_cond_broadcast(&stager->queued);
    pthread_mutex_unlock(&stager->mutex);
    for (uint32_t i = 0; i < stager->helper_count; i++)
        pthread_join(stager->helpers[i], NULL);
    pthread_cond_destroy(&stager->idle);
    pthread_cond_destroy(&stager->queued);
    pthread_mutex_destroy(&stager->mutex);
    free(stager);
}
