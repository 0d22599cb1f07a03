/*
 * ring.c: one io_uring, set up as this kernel allows, behind the eng_io_table of ring.h.
 *
 * Setup requests the flags that suit one thread that submits and reaps, and drops those that the kernel does not know
 * (io_uring_setup(2): an unknown flag is EINVAL).  A registered ring has its slots as fixed buffers, which saves
 * pinning pages for every write, and its files in a table.  If RLIMIT_MEMLOCK or RLIMIT_NOFILE forbids that, opening
 * fails, and the caller may try a plain ring.  No SQPOLL (a polling kernel thread steals a core from training), no
 * IOPOLL (needs poll queues that few hosts configure, and would not see the eventfd).
 */
#include "moving/ring.h"

#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* user_data of the poll on the wake descriptor; slot indices are far below. */
static const uint64_t WAKE = UINT64_MAX;

struct ring {
    struct io_uring uring;
    int wake_fd;
    int wake_armed;
    int registered;
};

/* Names from linux/io_uring.h that liburing 2.1 of Ubuntu 22.04 lacks. */
#ifndef IORING_SETUP_SUBMIT_ALL
#define IORING_SETUP_SUBMIT_ALL (1U << 7)
#endif
#ifndef IORING_SETUP_COOP_TASKRUN
#define IORING_SETUP_COOP_TASKRUN (1U << 8)
#endif
#ifndef IORING_SETUP_TASKRUN_FLAG
#define IORING_SETUP_TASKRUN_FLAG (1U << 9)
#endif
#ifndef IORING_SQ_TASKRUN
#define IORING_SQ_TASKRUN (1U << 2)
#endif
#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1U << 13)
#endif

/* From the preferred set to the one that every kernel since 5.1 accepts.  SINGLE_ISSUER and DEFER_TASKRUN came with 6.0
 * and 6.1, COOP_TASKRUN and TASKRUN_FLAG with 5.19, SUBMIT_ALL with 5.18, CQSIZE with 5.5. */
enum { COOPERATIVE = IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG };
static const uint32_t SETUP_FLAGS[] = {
    IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | COOPERATIVE | IORING_SETUP_SUBMIT_ALL
        | IORING_SETUP_CQSIZE,
    COOPERATIVE | IORING_SETUP_SUBMIT_ALL | IORING_SETUP_CQSIZE,
    IORING_SETUP_SUBMIT_ALL | IORING_SETUP_CQSIZE,
    IORING_SETUP_CQSIZE,
    0,
};

static int setup(ring *ring, const eng_config *config)
{
    /* One operation a slot and one poll: the queue can never be full. */
    const uint32_t entries = config->slot_count + 1;
    int result = -EINVAL;

    for (size_t i = 0; i < sizeof SETUP_FLAGS / sizeof *SETUP_FLAGS && result == -EINVAL; i++) {
        struct io_uring_params params;
        memset(&params, 0, sizeof params);
        params.flags = SETUP_FLAGS[i];
        params.cq_entries = 2 * entries; /* a stale poll and a fresh one may both be pending */
        result = io_uring_queue_init_params(entries, &ring->uring, &params);
    }
    return result;
}

static int register_slots(ring *ring, const eng_config *config, uint8_t *slots)
{
    struct iovec *vectors = calloc(config->slot_count, sizeof *vectors);
    if (vectors == NULL)
        return -ENOMEM;
    for (uint32_t i = 0; i < config->slot_count; i++) {
        vectors[i].iov_base = slots + (size_t)i * config->slot_bytes;
        vectors[i].iov_len = config->slot_bytes;
    }
    const int result = io_uring_register_buffers(&ring->uring, vectors, config->slot_count);
    free(vectors);
    return result;
}

static int ring_set_files(void *context, uint32_t first, const int32_t *fds, uint32_t count)
{
    ring *ring = context;
    for (uint32_t done = 0; done < count;) { /* one call, unless a file is refused: the next call returns its error */
        const int result = io_uring_register_files_update(&ring->uring, first + done, fds + done, count - done);
        if (result <= 0)
            return result < 0 ? result : -EIO;
        done += (uint32_t)result;
    }
    return 0;
}

static int ring_start(void *context, const eng_io *io)
{
    ring *ring = context;
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring->uring);
    if (sqe == NULL)
        return -EBUSY;
    const int placed = ring->registered && io->place != ENG_NO_PLACE;
    const int fd = placed ? io->place : io->fd;
    if (io->direction == ENG_WRITE) {
        if (ring->registered)
            io_uring_prep_write_fixed(sqe, fd, io->address, io->nbytes, io->file_offset, (int)io->slot);
        else
            io_uring_prep_write(sqe, fd, io->address, io->nbytes, io->file_offset);
    } else {
        if (ring->registered)
            io_uring_prep_read_fixed(sqe, fd, io->address, io->nbytes, io->file_offset, (int)io->slot);
        else
            io_uring_prep_read(sqe, fd, io->address, io->nbytes, io->file_offset);
    }
    if (placed)
        io_uring_sqe_set_flags(sqe, IOSQE_FIXED_FILE);
    sqe->user_data = io->slot;
    return 0;
}

/* One-shot: a multishot poll would need a kernel of 5.13 and save one entry a wake. */
static void arm_wake(ring *ring)
{
    struct io_uring_sqe *sqe = ring->wake_armed ? NULL : io_uring_get_sqe(&ring->uring);
    if (sqe == NULL)
        return;
    io_uring_prep_poll_add(sqe, ring->wake_fd, POLLIN);
    sqe->user_data = WAKE;
    ring->wake_armed = 1;
}

/* Run the work that DEFER_TASKRUN has deferred, so that its completions appear (io_uring_enter(2),
 * IORING_ENTER_GETEVENTS).  The kernel sets a flag for such work (IORING_SETUP_TASKRUN_FLAG), and liburing's submission
 * runs it in the same call.  Only later work, or with liburing 2.1 all of it, needs this extra call. */
static int get_events(const ring *ring)
{
    if (!(__atomic_load_n(ring->uring.sq.kflags, __ATOMIC_RELAXED) & IORING_SQ_TASKRUN))
        return 0;
    const long result = syscall(__NR_io_uring_enter, ring->uring.ring_fd, 0, 0, IORING_ENTER_GETEVENTS, NULL, 0);
    return result < 0 ? -errno : 0;
}

static int ring_reap(void *context, eng_completion *completions, uint32_t capacity, uint32_t wait)
{
    ring *ring = context;
    struct io_uring_cqe *cqe;
    unsigned head, seen = 0;
    uint32_t count = 0;
    uint64_t wakes;

    arm_wake(ring);
    int result = wait ? io_uring_submit_and_wait(&ring->uring, 1) : io_uring_submit(&ring->uring);
    if (result >= 0 && !wait)
        result = get_events(ring);
    io_uring_for_each_cqe(&ring->uring, head, cqe) {
        if (count == capacity)
            break;
        seen++;
        if (cqe->user_data == WAKE) {
            ring->wake_armed = 0;
            /* Empty the descriptor, or the next poll would complete at once. */
            if (read(ring->wake_fd, &wakes, sizeof wakes) < 0 && errno != EAGAIN)
                abort();
        } else {
            completions[count].slot = (uint32_t)cqe->user_data;
            completions[count].result = cqe->res;
            count++;
        }
    }
    io_uring_cq_advance(&ring->uring, seen);
    /* Completions are returned first: an error of the submission is returned by the next call. */
    return count > 0 || result >= 0 ? (int)count : result;
}

int ring_register(ring *ring, eng_config *config, uint8_t *slots)
{
    if (!ring->registered)
        return 0;
    config->refused = ENG_REFUSED_BUFFERS;
    int result = register_slots(ring, config, slots);
    if (result < 0)
        return result;
    int32_t empty[ENG_JOBS_MAX * ENG_JOB_PLACES];
    memset(empty, -1, sizeof empty); /* -1 is an empty entry (io_uring_register(2)) */
    config->refused = ENG_REFUSED_FILES;
    result = io_uring_register_files(&ring->uring, empty, ENG_JOBS_MAX * ENG_JOB_PLACES);
    return result < 0 ? result : 0;
}

int ring_open(eng_config *config, int wake_fd, ring **opened, eng_io_table *table)
{
    ring *ring = calloc(1, sizeof *ring);
    if (ring == NULL)
        return -ENOMEM;
    config->refused = ENG_REFUSED_RING;
    const int result = setup(ring, config);
    if (result < 0) {
        free(ring);
        return result;
    }
    io_uring_ring_dontfork(&ring->uring);
    ring->wake_fd = wake_fd;
    ring->registered = config->way == ENG_RING_REGISTERED;
    *opened = ring;
    *table = (eng_io_table){ring, ring->registered ? ring_set_files : NULL, ring_start, ring_reap};
    return 0;
}

void ring_unregister(ring *ring)
{
    if (!ring->registered)
        return;
    /* ENXIO if either was never registered, which is harmless. */
    io_uring_unregister_buffers(&ring->uring);
    io_uring_unregister_files(&ring->uring);
}

void ring_close(ring *ring)
{
    io_uring_queue_exit(&ring->uring);
    free(ring);
}

int ring_fd(const ring *ring)
{
    return ring->uring.ring_fd;
}
