/*
 * posix.c: blocks moved by threads that call pread(2) and pwrite(2), behind the eng_io_table of posix.h.
 *
 * Theory of operation.  The pipeline's thread appends an operation to a list.  A worker removes it, moves the bytes and
 * appends the result to another list, from which the pipeline's thread takes it.  One mutex guards both lists.  A
 * worker with a result wakes the pipeline through its eventfd, so that reap() sleeps on one descriptor, as with a ring.
 * There is at most one operation a slot, so neither list can be full.
 */
#include "moving/posix.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pipeline/thread.h"

/* The number of blocks in flight: the smaller of the two depths at which `make bench` runs fio with blocks of 4 MiB.
 *  Each block is many requests of the drive's own, and each further thread costs a stack. */
enum { WORKER_COUNT = 4 };

struct posix {
    pthread_mutex_t mutex;
    pthread_cond_t queued;
    eng_io *operations;          /* a ring of slot_count */
    eng_completion *completions; /* the same */
    uint32_t capacity;
    uint32_t operation_start, operation_count;
    uint32_t completion_start, completion_count;
    int stopping;
    int wake_fd;
    uint32_t worker_count;       /* how many have been started */
    pthread_t workers[WORKER_COUNT];
};

/* ---- the workers ---- */

static int32_t move(const eng_io *io)
{
    const off_t offset = (off_t)io->file_offset;
    const ssize_t moved = io->direction == ENG_WRITE ? pwrite(io->fd, io->address, io->nbytes, offset)
                                                     : pread(io->fd, io->address, io->nbytes, offset);
    return moved < 0 ? -errno : (int32_t)moved; /* a slot is far smaller than 2 GiB */
}

static void *work(void *argument)
{
    posix *posix = argument;

    pthread_mutex_lock(&posix->mutex);
    for (;;) {
        while (posix->operation_count == 0 && !posix->stopping)
            pthread_cond_wait(&posix->queued, &posix->mutex);
        if (posix->operation_count == 0)
            break;
        const eng_io io = posix->operations[posix->operation_start];
        posix->operation_start = (posix->operation_start + 1) % posix->capacity;
        posix->operation_count--;
        pthread_mutex_unlock(&posix->mutex);
        const eng_completion completion = {io.slot, move(&io)};
        pthread_mutex_lock(&posix->mutex);
        posix->completions[(posix->completion_start + posix->completion_count++) % posix->capacity] = completion;
        thread_wake(posix->wake_fd);
    }
    pthread_mutex_unlock(&posix->mutex);
    return NULL;
}

/* ---- the table ---- */

static int posix_start(void *context, const eng_io *io)
{
    posix *posix = context;
    pthread_mutex_lock(&posix->mutex);
    posix->operations[(posix->operation_start + posix->operation_count++) % posix->capacity] = *io;
    pthread_cond_signal(&posix->queued);
    pthread_mutex_unlock(&posix->mutex);
    return 0;
}

static uint32_t take(posix *posix, eng_completion *completions, uint32_t capacity)
{
    uint32_t count = 0;
    pthread_mutex_lock(&posix->mutex);
    while (count < capacity && posix->completion_count > 0) {
        completions[count++] = posix->completions[posix->completion_start];
        posix->completion_start = (posix->completion_start + 1) % posix->capacity;
        posix->completion_count--;
    }
    pthread_mutex_unlock(&posix->mutex);
    return count;
}

static int posix_reap(void *context, eng_completion *completions, uint32_t capacity, uint32_t wait)
{
    posix *posix = context;
    struct pollfd readable = {.fd = posix->wake_fd, .events = POLLIN};
    uint64_t wakes;

    uint32_t count = take(posix, completions, capacity);
    if (count > 0 || !wait)
        return (int)count;
    poll(&readable, 1, -1); /* an error is a spurious wake */
    if (read(posix->wake_fd, &wakes, sizeof wakes) < 0 && errno != EAGAIN)
        abort();
    return (int)take(posix, completions, capacity);
}

/* ---- opening and closing ---- */

static int start_workers(posix *posix)
{
    char name[16]; /* pthread_setname_np(3) */
    for (uint32_t i = 0; i < WORKER_COUNT; i++) {
        const int result = pthread_create(&posix->workers[i], NULL, work, posix);
        if (result != 0)
            return -result;
        posix->worker_count++;
        snprintf(name, sizeof name, "engine-move-%u", i);
        pthread_setname_np(posix->workers[i], name);
    }
    return 0;
}

int posix_open(const eng_config *config, int wake_fd, posix **opened, eng_io_table *table)
{
    posix *posix = calloc(1, sizeof *posix);
    if (posix == NULL)
        return -ENOMEM;
    posix->operations = calloc(config->slot_count, sizeof *posix->operations);
    posix->completions = calloc(config->slot_count, sizeof *posix->completions);
    posix->capacity = config->slot_count;
    posix->wake_fd = wake_fd;
    pthread_mutex_init(&posix->mutex, NULL);
    pthread_cond_init(&posix->queued, NULL);
    const int result = posix->operations == NULL || posix->completions == NULL ? -ENOMEM : start_workers(posix);
    if (result < 0) {
        posix_close(posix);
        return result;
    }
    *opened = posix;
    *table = (eng_io_table){posix, NULL, posix_start, posix_reap};
    return 0;
}

void posix_close(posix *posix)
{
    pthread_mutex_lock(&posix->mutex);
    posix->stopping = 1;
    pthread_cond_broadcast(&posix->queued);
    pthread_mutex_unlock(&posix->mutex);
    for (uint32_t i = 0; i < posix->worker_count; i++)
        pthread_join(posix->workers[i], NULL);
    pthread_cond_destroy(&posix->queued);
    pthread_mutex_destroy(&posix->mutex);
    free(posix->operations);
    free(posix->completions);
    free(posix);
}
