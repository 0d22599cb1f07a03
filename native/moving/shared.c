/*
 * shared.c: the trainer's end of the shared memory, behind the eng_io_table of shared.h.
 *
 * Theory of operation.  start() appends a post.  reap() writes once to the monitor's eventfd for all posts since the last
 * call, and takes completions.  It sleeps on two descriptors: the pipeline's eventfd, which the monitor writes to, and a
 * socket whose other end only the monitor has, so that POLLHUP means that the monitor has ended.  Then every write in
 * flight completes with EPIPE, and so does every later one: a pipeline of a dead monitor fails its jobs, and is closed.
 * A pipeline that is closed with an error does not wait for a monitor that lives, which may be stopped (SIGSTOP): it
 * abandons its writes in the same way.  Their slots stay the monitor's, in a mapping of its own.
 *
 * An eventfd is written without asking whether the other side sleeps: that takes about a microsecond, and a block of
 * 4 MiB takes a thousand.  So there is no flag that could lose a wake.
 */
#include "moving/shared.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "pipeline/thread.h"

struct shared {
    shared_header *header;
    uint8_t *slots;
    uint8_t *in_flight; /* one a slot */
    uint32_t slot_count, slot_bytes;
    uint32_t post_tail, done_head; /* our own copies: the shared ones are only written */
    int post_fd, wake_fd, peer_fd;
    int posted; /* since the monitor was woken */
    int dead; /* nothing more comes from the monitor, or is waited for */
};

size_t shared_bytes(const eng_config *config)
{
    return ENG_SHARED_HEADER_BYTES + (size_t)config->slot_count * config->slot_bytes;
}

int eng_map_shared(int32_t fd, uint64_t nbytes, eng_mapping *mapping)
{
    struct stat status;
    /* A file that could shrink would end this process by SIGBUS. */
    const int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || fstat(fd, &status) < 0)
        return -errno;
    if (!(seals & F_SEAL_SHRINK) || (uint64_t)status.st_size < nbytes)
        return -EINVAL;
    void *mapped = mmap(NULL, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED)
        return -errno;
    *mapping = (eng_mapping){mapped, nbytes};
    return 0;
}

void eng_unmap_shared(eng_mapping *mapping)
{
    if (mapping->address != NULL)
        munmap(mapping->address, mapping->nbytes);
    mapping->address = NULL;
}

static int start(void *context, const eng_io *io)
{
    shared *shared = context;
    if (io->direction != ENG_WRITE)
        return -EOPNOTSUPP;
    if (shared->dead)
        return -EPIPE;
    const size_t offset = (size_t)(io->address - shared->slots) - (size_t)io->slot * shared->slot_bytes;
    shared->header->posts[shared->post_tail % SHARED_ENTRIES] =
        (shared_post){io->slot, io->fd, (uint32_t)offset, io->nbytes, io->file_offset};
    __atomic_store_n(&shared->header->post_tail, ++shared->post_tail, __ATOMIC_RELEASE);
    shared->in_flight[io->slot] = 1;
    shared->posted = 1;
    return 0;
}

/* The completions that are there; of writes that are in flight only.  Any other one is not the monitor's. */
static uint32_t take(shared *shared, eng_completion *completions, uint32_t capacity)
{
    const uint32_t tail = __atomic_load_n(&shared->header->done_tail, __ATOMIC_ACQUIRE);
    uint32_t count = 0;
    if (tail - shared->done_head > SHARED_ENTRIES)
        shared->dead = 1;
    while (count < capacity && shared->done_head != tail && !shared->dead) {
        eng_completion done;
        memcpy(&done, &shared->header->done[shared->done_head % SHARED_ENTRIES], sizeof done);
        __atomic_store_n(&shared->header->done_head, ++shared->done_head, __ATOMIC_RELEASE);
        if (done.slot >= shared->slot_count || !shared->in_flight[done.slot]) {
            shared->dead = 1;
            break;
        }
        shared->in_flight[done.slot] = 0;
        completions[count++] = done;
    }
    return count;
}

/* The writes in flight of a dead monitor, failed. */
static uint32_t fail_rest(shared *shared, eng_completion *completions, uint32_t capacity)
{
    uint32_t count = 0;
    for (uint32_t slot = 0; slot < shared->slot_count && count < capacity; slot++)
        if (shared->in_flight[slot]) {
            shared->in_flight[slot] = 0;
            completions[count++] = (eng_completion){slot, -EPIPE};
        }
    return count;
}

static void wake_monitor(shared *shared)
{
    if (shared->posted)
        thread_wake(shared->post_fd);
    shared->posted = 0;
}

static int reap(void *context, eng_completion *completions, uint32_t capacity, uint32_t wait)
{
    shared *shared = context;
    struct pollfd waited[2] = {{.fd = shared->wake_fd, .events = POLLIN}, {.fd = shared->peer_fd}};
    uint64_t wakes;

    wake_monitor(shared);
    uint32_t count = take(shared, completions, capacity);
    if (count == 0 && wait && !shared->dead) {
        const int ready = poll(waited, 2, -1); /* an error is a spurious wake */
        if (read(shared->wake_fd, &wakes, sizeof wakes) < 0 && errno != EAGAIN)
            abort();
        count = take(shared, completions, capacity);
        if (ready > 0 && waited[1].revents != 0) /* POLLHUP: it asks for no other event */
            shared->dead = 1;
    }
    if (count == 0 && shared->dead)
        count = fail_rest(shared, completions, capacity);
    return (int)count;
}

int shared_open(const eng_config *config, shared_header *header, int post_fd, int wake_fd, int peer_fd, shared **opened,
                eng_io_table *table)
{
    shared *shared = calloc(1, sizeof *shared);
    if (shared == NULL)
        return -ENOMEM;
    *shared = (struct shared){
        .header = header,
        .slots = (uint8_t *)header + ENG_SHARED_HEADER_BYTES,
        .in_flight = calloc(config->slot_count, 1),
        .slot_count = config->slot_count,
        .slot_bytes = config->slot_bytes,
        .post_fd = post_fd,
        .wake_fd = wake_fd,
        .peer_fd = peer_fd,
    };
    if (shared->in_flight == NULL) {
        free(shared);
        return -ENOMEM;
    }
    *opened = shared;
    *table = (eng_io_table){shared, NULL, start, reap};
    return 0;
}

void shared_abandon(shared *shared)
{
    shared->dead = 1;
}

void shared_close(shared *shared)
{
    free(shared->in_flight);
    free(shared);
}
