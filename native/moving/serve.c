/*
 * serve.c: the monitor's end of the shared memory: one thread that writes what a trainer posts.
 *
 * Theory of operation.  The thread takes posts, checks each one, starts it on an inner eng_io_table (a ring that has the
 * shared slots registered, or threads), and answers with its result.  It sleeps on the trainer's eventfd, or in the inner
 * reap(), which that descriptor ends, too.  Short writes and passing errors go back to the trainer, whose pipeline tries again.
 *
 * The monitor's other threads admit a file before the trainer hears of its number, and withdraw it before they close it.
 * So a trainer, however wrong, writes to files of its saves only, and only up to their ends.  One that breaks the rules of
 * the ring itself has corrupt memory, and is not served any more: its socket is shut down, which fails its writes as the
 * end of this process does, and by which this process ends.
 *
 * A ring that fails is replaced: every write in flight fails, and the next post gets a new one.  Writes only read from
 * slots, so one that the old ring still has may at most write nonsense to a file of a save that has failed.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "moving/posix.h"
#include "moving/ring.h"
#include "moving/shared.h"
#include "pipeline/forks.h"
#include "pipeline/thread.h"

/* As in pipeline.c: refusals of the submission itself in a row, 1 ms apart. */
enum { REFUSALS_MAX = 100, REAP_MAX = 64 };

enum { DESCRIPTOR_POST = 0, DESCRIPTOR_WAKE = 1, DESCRIPTOR_RING = 2, DESCRIPTOR_PEER = 3 };

enum serve_state { SERVE_OPENING, SERVE_OPEN, SERVE_STOPPING, SERVE_STOPPED };

/* A file that may be written. */
typedef struct {
    int32_t fd;
    uint32_t moving_count;
    uint64_t end;
} admitted;

struct eng_serve {
    eng_config config;
    eng_mapping memory;
    shared_header *header; /* its begin */
    uint8_t *slots;
    /* The thread's own. */
    eng_io_table io;
    ring *ring;
    posix *posix;
    int32_t *slot_fds; /* of the write of each slot; -1: none */
    uint32_t moving_count, refusal_count;
    uint32_t post_head, done_tail; /* our own copies */
    int answered;                  /* since the trainer was woken */
    int broken;                    /* errno that broke the inner table, until it is replaced */
    int mistrusted;                /* the trainer broke the rules of the ring: nothing is taken any more */
    /* Guarded by the mutex. */
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    admitted *files;
    uint32_t file_count, file_capacity;
    enum serve_state state;
    int open_error;
    forks_owner forks;
    pthread_t thread;
    int has_thread;
};

static int post_fd(const eng_serve *s)
{
    return s->forks.descriptors[DESCRIPTOR_POST];
}

/* ---- files ---- */

/* The mutex is held. */
static admitted *find_file(eng_serve *s, int32_t fd)
{
    for (uint32_t i = 0; i < s->file_count; i++)
        if (s->files[i].fd == fd)
            return &s->files[i];
    return NULL;
}

int eng_serve_admit(eng_serve *s, int32_t fd, uint64_t end)
{
    int result = 0;
    pthread_mutex_lock(&s->mutex);
    if (s->file_count == s->file_capacity) {
        const uint32_t capacity = s->file_capacity == 0 ? 16 : 2 * s->file_capacity;
        admitted *files = realloc(s->files, capacity * sizeof *files);
        if (files != NULL) {
            s->files = files;
            s->file_capacity = capacity;
        }
    }
    if (s->file_count < s->file_capacity)
        s->files[s->file_count++] = (admitted){fd, 0, end};
    else
        result = -ENOMEM;
    pthread_mutex_unlock(&s->mutex);
    return result;
}

void eng_serve_withdraw(eng_serve *s, int32_t fd)
{
    pthread_mutex_lock(&s->mutex);
    admitted *file = find_file(s, fd);
    if (file != NULL)
        file->end = 0; /* nothing more is begun */
    while (file != NULL && file->moving_count > 0) {
        pthread_cond_wait(&s->changed, &s->mutex);
        file = find_file(s, fd); /* the table may have moved */
    }
    if (file != NULL)
        *file = s->files[--s->file_count];
    pthread_mutex_unlock(&s->mutex);
}

/* ---- the inner table ---- */

static void close_inner(eng_serve *s)
{
    if (s->posix != NULL)
        posix_close(s->posix);
    s->posix = NULL;
    if (s->ring == NULL)
        return;
    if (!s->broken)
        ring_unregister(s->ring);
    forks_lock();
    s->forks.descriptors[DESCRIPTOR_RING] = -1;
    ring_close(s->ring);
    forks_unlock();
    s->ring = NULL;
}

static int open_inner(eng_serve *s)
{
    if (s->config.io != NULL) {
        s->io = *s->config.io;
        return 0;
    }
    if (s->config.way == ENG_THREADS)
        return posix_open(&s->config, post_fd(s), &s->posix, &s->io);
    forks_lock();
    int result = ring_open(&s->config, post_fd(s), &s->ring, &s->io);
    if (result == 0)
        s->forks.descriptors[DESCRIPTOR_RING] = ring_fd(s->ring);
    forks_unlock();
    if (result == 0)
        result = ring_register(s->ring, &s->config, s->slots);
    if (result < 0)
        close_inner(s);
    return result;
}

/* ---- posts and answers ---- */

static void answer(eng_serve *s, uint32_t slot, int32_t result)
{
    s->header->done[s->done_tail % SHARED_ENTRIES] = (eng_completion){slot, result};
    __atomic_store_n(&s->header->done_tail, ++s->done_tail, __ATOMIC_RELEASE);
    s->answered = 1;
}

static void wake_trainer(eng_serve *s)
{
    if (s->answered)
        thread_wake(s->forks.descriptors[DESCRIPTOR_WAKE]);
    s->answered = 0;
}

/* Count a write that its file admits: 0, or a negative errno. */
static int enter_file(eng_serve *s, const shared_post *post)
{
    pthread_mutex_lock(&s->mutex);
    admitted *file = find_file(s, post->fd);
    const int admits = file != NULL && post->nbytes <= file->end && post->file_offset <= file->end - post->nbytes;
    if (admits)
        file->moving_count++;
    pthread_mutex_unlock(&s->mutex);
    return admits ? 0 : -EBADF;
}

static void leave_file(eng_serve *s, int32_t fd)
{
    pthread_mutex_lock(&s->mutex);
    admitted *file = find_file(s, fd); /* it is there: withdrawing waits for this */
    if (file != NULL && --file->moving_count == 0)
        pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->mutex);
}

static void finish(eng_serve *s, uint32_t slot, int32_t result)
{
    leave_file(s, s->slot_fds[slot]);
    s->slot_fds[slot] = -1;
    s->moving_count--;
    answer(s, slot, result);
}

/* Whether a post is within its slot, aligned, and the only one of its slot. */
static int is_valid(const eng_serve *s, const shared_post *post)
{
    if (post->nbytes == 0 || post->nbytes > s->config.slot_bytes)
        return 0;
    if (post->slot_offset > s->config.slot_bytes - post->nbytes || s->slot_fds[post->slot] >= 0)
        return 0;
    return (post->nbytes | post->slot_offset | post->file_offset) % ENG_ALIGNMENT == 0;
}

/* Start one write: 0, or a negative errno. */
static int begin(eng_serve *s, const shared_post *post)
{
    if (!is_valid(s, post))
        return -EINVAL;
    if (s->broken)
        s->broken = s->config.io != NULL ? s->broken : -open_inner(s);
    if (s->broken)
        return -s->broken;
    int result = enter_file(s, post);
    if (result < 0)
        return result;
    const eng_io io = {
        .slot = post->slot,
        .direction = ENG_WRITE,
        .fd = post->fd,
        .place = ENG_NO_PLACE,
        .nbytes = post->nbytes,
        .file_offset = post->file_offset,
        .address = s->slots + (size_t)post->slot * s->config.slot_bytes + post->slot_offset,
    };
    result = s->io.start(s->io.context, &io);
    if (result < 0) {
        leave_file(s, post->fd);
        return result;
    }
    s->slot_fds[post->slot] = post->fd;
    s->moving_count++;
    return 0;
}

static void distrust(eng_serve *s)
{
    s->mistrusted = 1;
    shutdown(s->forks.descriptors[DESCRIPTOR_PEER], SHUT_RDWR); /* if it fails, the socket has ended */
}

static void take_posts(eng_serve *s)
{
    const uint32_t tail = __atomic_load_n(&s->header->post_tail, __ATOMIC_ACQUIRE);
    if (!s->mistrusted && tail - s->post_head > SHARED_ENTRIES)
        distrust(s);
    while (s->post_head != tail && !s->mistrusted) {
        shared_post post;
        memcpy(&post, &s->header->posts[s->post_head % SHARED_ENTRIES], sizeof post);
        __atomic_store_n(&s->header->post_head, ++s->post_head, __ATOMIC_RELEASE);
        if (post.slot >= s->config.slot_count) {
            distrust(s);
            return;
        }
        const int result = begin(s, &post);
        if (result < 0)
            answer(s, post.slot, result);
    }
}

/* ---- the thread ---- */

static void break_down(eng_serve *s, int error)
{
    s->broken = error;
    s->refusal_count = 0;
    for (uint32_t slot = 0; slot < s->config.slot_count; slot++)
        if (s->slot_fds[slot] >= 0)
            finish(s, slot, -error);
    close_inner(s);
}

static void sleep_until_posted(const eng_serve *s)
{
    struct pollfd readable = {.fd = post_fd(s), .events = POLLIN};
    uint64_t wakes;
    poll(&readable, 1, -1); /* an error is a spurious wake */
    if (read(post_fd(s), &wakes, sizeof wakes) < 0 && errno != EAGAIN)
        abort();
}

static void reap(eng_serve *s)
{
    static const struct timespec PAUSE = {0, 1000000};
    eng_completion completions[REAP_MAX];
    const int count = s->io.reap(s->io.context, completions, REAP_MAX, 1);

    for (int i = 0; i < count; i++)
        if (completions[i].slot < s->config.slot_count && s->slot_fds[completions[i].slot] >= 0)
            finish(s, completions[i].slot, completions[i].result);
        else
            abort(); /* an unexpected completion: our memory may be corrupt */
    if (count >= 0) {
        s->refusal_count = 0;
        return;
    }
    const int passing = count == -EINTR || count == -EAGAIN || count == -EBUSY || count == -ENOMEM;
    if (!passing || ++s->refusal_count > REFUSALS_MAX)
        break_down(s, -count);
    else if (count != -EINTR)
        nanosleep(&PAUSE, NULL);
}

static int is_stopping(eng_serve *s)
{
    return __atomic_load_n(&s->state, __ATOMIC_ACQUIRE) == SERVE_STOPPING;
}

static void enter_state(eng_serve *s, enum serve_state state)
{
    pthread_mutex_lock(&s->mutex);
    __atomic_store_n(&s->state, state, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->mutex);
}

static void *run(void *argument)
{
    eng_serve *s = argument;
    s->open_error = open_inner(s);
    enter_state(s, s->open_error < 0 ? SERVE_STOPPED : SERVE_OPEN);
    if (s->open_error < 0)
        return NULL;
    while (!is_stopping(s) || s->moving_count > 0) {
        if (!is_stopping(s))
            take_posts(s);
        wake_trainer(s); /* of posts that were refused at once */
        if (s->moving_count > 0)
            reap(s);
        else if (!is_stopping(s))
            sleep_until_posted(s);
        wake_trainer(s);
    }
    close_inner(s);
    enter_state(s, SERVE_STOPPED);
    return NULL;
}

/* ---- calls of other threads ---- */

static int take_descriptors(eng_serve *s)
{
    forks_lock();
    forks_add(&s->forks);
    s->forks.descriptors[DESCRIPTOR_POST] = forks_duplicate(s->config.shared->post_fd);
    s->forks.descriptors[DESCRIPTOR_WAKE] = forks_duplicate(s->config.shared->wake_fd);
    s->forks.descriptors[DESCRIPTOR_PEER] = forks_duplicate(s->config.shared->peer_fd);
    const int opened =
        post_fd(s) >= 0 && s->forks.descriptors[DESCRIPTOR_WAKE] >= 0 && s->forks.descriptors[DESCRIPTOR_PEER] >= 0;
    const int result = opened ? 0 : -errno;
    forks_unlock();
    return result;
}

static int map_memory(eng_serve *s)
{
    const size_t nbytes = shared_bytes(&s->config);
    const int result = eng_map_shared(s->config.shared->memory_fd, nbytes, &s->memory);
    if (result < 0)
        return result;
    s->header = (shared_header *)s->memory.address;
    s->slot_fds = malloc(s->config.slot_count * sizeof *s->slot_fds);
    if (s->slot_fds == NULL)
        return -ENOMEM;
    memset(s->slot_fds, -1, s->config.slot_count * sizeof *s->slot_fds);
    madvise(s->header, nbytes, MADV_DONTFORK);
    s->slots = (uint8_t *)s->header + ENG_SHARED_HEADER_BYTES;
    return 0;
}

static int start_thread(eng_serve *s)
{
    const int result = thread_start(&s->thread, "engine-serve", run, s);
    if (result < 0)
        return result;
    s->has_thread = 1;
    pthread_mutex_lock(&s->mutex);
    while (s->state == SERVE_OPENING)
        pthread_cond_wait(&s->changed, &s->mutex);
    pthread_mutex_unlock(&s->mutex);
    return s->open_error;
}

int eng_serve_open(eng_config *config, eng_serve **serve)
{
    config->refused = ENG_REFUSED_RESOURCES;
    if (config->slot_count == 0 || config->slot_count > SHARED_ENTRIES || config->shared == NULL)
        return -EINVAL;
    if (config->slot_bytes == 0 || config->slot_bytes % ENG_ALIGNMENT != 0)
        return -EINVAL;
    eng_serve *s = calloc(1, sizeof *s);
    if (s == NULL)
        return -ENOMEM;
    s->config = *config;
    pthread_mutex_init(&s->mutex, NULL);
    pthread_cond_init(&s->changed, NULL);
    int result = take_descriptors(s);
    if (result == 0)
        result = map_memory(s);
    if (result == 0)
        result = start_thread(s);
    config->refused = result < 0 ? s->config.refused : ENG_REFUSED_NOTHING;
    if (result < 0) {
        eng_serve_free(&s);
        return result;
    }
    *serve = s;
    return 0;
}

const uint8_t *eng_serve_slot(eng_serve *s, uint32_t slot)
{
    return slot < s->config.slot_count ? s->slots + (size_t)slot * s->config.slot_bytes : NULL;
}

void eng_serve_stop(eng_serve *s)
{
    pthread_mutex_lock(&s->mutex);
    const int stops = s->state == SERVE_OPEN;
    if (stops)
        __atomic_store_n(&s->state, SERVE_STOPPING, __ATOMIC_RELEASE);
    if (stops)
        thread_wake(post_fd(s));
    while (s->has_thread && s->state != SERVE_STOPPED)
        pthread_cond_wait(&s->changed, &s->mutex);
    const int joins = s->has_thread; /* one caller joins, and the thread is about to end */
    s->has_thread = 0;
    pthread_mutex_unlock(&s->mutex);
    if (joins)
        pthread_join(s->thread, NULL);
}

void eng_serve_free(eng_serve **serve)
{
    eng_serve *s = *serve;
    *serve = NULL;
    if (s == NULL)
        return;
    if (!s->forks.forked) {
        eng_serve_stop(s);
        eng_unmap_shared(&s->memory);
        forks_lock();
        forks_close(&s->forks.descriptors[DESCRIPTOR_POST]);
        forks_close(&s->forks.descriptors[DESCRIPTOR_WAKE]);
        forks_close(&s->forks.descriptors[DESCRIPTOR_PEER]);
        forks_remove(&s->forks);
        forks_unlock();
        pthread_cond_destroy(&s->changed);
        pthread_mutex_destroy(&s->mutex);
    }
    free(s->slot_fds);
    free(s->files);
    free(s);
}
