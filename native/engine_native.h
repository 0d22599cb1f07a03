/*
 * engine_native.h: the C interface of the native pipeline, read by the C compiler and by cffi alike.
 * (cffi drops the lines that begin with '#', so constants are enumerators.)
 *
 * Theory of operation.  A pipeline is one POSIX thread that owns a fixed set of staging slots and one way of moving
 * them: an io_uring, or a few threads that call pread and pwrite.  A job is one save (ENG_WRITE) or one restore
 * (ENG_READ): arrays of blocks and extents that the thread works through.  A write copies each block's extents from their
 * sources into a slot, hashing them on the way, and writes the slot at the block's file offset.  A read reads each block
 * into a slot, and copies its extents out only if the block verifies.
 *
 * Threads.  Between eng_open and eng_free every function may be called from any thread, also beside and after
 * eng_close; eng_free is called once, with no other call under way.  Only the pipeline's own thread touches the ring
 * (IORING_SETUP_SINGLE_ISSUER demands it).  Helper threads, if there are any, copy and hash blocks for it.
 *
 * Ownership.  The caller owns the eng_job and everything it points to.  It keeps all of it, the sources' memory and the
 * file descriptors alive and unchanged until ENG_DONE is reached.  The pipeline owns the slots.  It allocates nothing
 * after eng_open, except when it replaces a broken ring.
 *
 * Errors.  Functions return 0 or a negative errno.  A job's first failure is latched in `failure`, `error` and
 * `failed_block`; the rest of the job is dropped, what is in flight is drained, and then ENG_DONE is reached.
 */
#ifndef ENGINE_NATIVE_H
#define ENGINE_NATIVE_H

#include <stdint.h>

enum {
    ENG_VERSION = 6, /* of this interface, raised with every change of it; io/binding.py has the same number */
    ENG_ALIGNMENT = 4096,    /* of slots, block offsets and written lengths; plan.ALIGNMENT is the same number */
    ENG_JOBS_MAX = 64,       /* jobs in one pipeline at a time: max_async is at most 32, and restores come on top */
    /* Files of one job that have a place in a ring's table of registered files.  A block of a further file names its
     * descriptor, which the kernel then looks up for each operation: some 50 ns of the millisecond that 4 MiB take.  The
     * table is registered when the ring is opened and counts against RLIMIT_NOFILE, so it stays at 512. */
    ENG_JOB_PLACES = 8,
    ENG_NO_PLACE = -1,
    /* Threads that stage.  One copies and hashes some 15 GB/s, so 16 take more than a socket's memory gives. */
    ENG_STAGING_THREADS_MAX = 16,
    ENG_STAGING_BLOCKS_MAX = 32, /* blocks that are with helper threads at a time: two each */
    /* Of the memory that a trainer and a monitor share, in front of the slots: a huge page, so that the slots begin on
     * one. */
    ENG_SHARED_HEADER_BYTES = 2097152,
    ENG_DIMS_MAX = 8 /* dimensions of a strided source, after merging those that continue each other */
};

/* Ways of moving blocks.  If the kernel refuses a part of a way, eng_open fails; the caller chooses another way. */
enum {
    ENG_RING_REGISTERED = 0, /* io_uring, slots and files registered with it */
    ENG_RING_PLAIN = 1, /* io_uring, nothing registered */
    ENG_THREADS = 2, /* pread(2) and pwrite(2) on threads of the pipeline */
    ENG_SHARED = 3 /* writes only: posted to a monitor, another process, through shared memory */
};

/* What eng_open or eng_guard_open was refused. */
enum {
    ENG_REFUSED_NOTHING = 0,
    ENG_REFUSED_RESOURCES = 1, /* the slots' memory, the eventfd, a thread */
    ENG_REFUSED_RING = 2, /* io_uring_setup(2) */
    ENG_REFUSED_BUFFERS = 3, /* io_uring_register(2) of the slots */
    ENG_REFUSED_FILES = 4, /* io_uring_register(2) of a table of files */
    ENG_REFUSED_USERFAULTFD = 5, /* userfaultfd(2) */
    ENG_REFUSED_PROTECTION = 6, /* the features of UFFDIO_API: the kernel is too old */
    ENG_REFUSED_SCAN = 7, /* PAGEMAP_SCAN */
    ENG_REFUSED_RANGE = 8 /* UFFDIO_REGISTER of the memory */
};

/* Kinds of guard: guarding/guard.c describes them. */
enum { ENG_GUARD_COW = 0, ENG_GUARD_DETECT = 1 };

/* Directions of a job. */
enum { ENG_WRITE = 0, ENG_READ = 1 };

/* States of a block, as in eng_job.states.  A block that was read, verified and copied out is ENG_WRITTEN.  One that
 * eng_release has not been given yet is ENG_WITHHELD. */
enum { ENG_PENDING = 0, ENG_STAGED = 1, ENG_WRITTEN = 2, ENG_FAILED = 3, ENG_WITHHELD = 4 };

/* Milestones of a job, to wait for; bits of eng_job.milestones.  A failed job reaches the first two at once,
 * because it will not look at its sources again, as soon as no helper thread copies one of its blocks. */
enum { ENG_URGENT = 1, ENG_ALL_STAGED = 2, ENG_DONE = 4 };

/* Kinds of failure. */
enum {
    ENG_NO_FAILURE = 0,
    ENG_IO_FAILURE = 1, /* the kernel refused a read or write: `error` is the errno */
    ENG_SHORT_FAILURE = 2, /* a read or write moved nothing, or too little to continue: the file ends early */
    ENG_CHECKSUM_FAILURE = 3, /* a block that was read does not match its hash */
    ENG_TORN_FAILURE = 4, /* a source changed while it was being staged */
    ENG_INVALID_FAILURE = 5, /* the job contradicts itself */
    ENG_ABORTED_FAILURE = 6 /* eng_abort or eng_close was called: `error` is its argument */
};

/* Memory that bytes come from or go to.  With ndim 0 it is plain memory.  Otherwise it is a strided tensor, serialised
 * in row-major order; strides are in elements.  Either way it holds `nbytes`, and no extent may reach beyond. */
typedef struct {
    uint64_t address;
    uint64_t nbytes;
    uint32_t itemsize;
    uint32_t ndim;
    int64_t shape[8];
    int64_t stride[8];
} eng_source;

/* A run contiguous in its source and in its block. */
typedef struct {
    uint64_t source_offset;
    uint32_t block_offset;
    uint32_t nbytes;
    uint32_t source;
    uint32_t reserved;
} eng_extent;

/* One write or read.  nbytes are the stored bytes, at most the slot size. */
typedef struct {
    uint64_t file_offset;
    uint32_t nbytes;
    uint32_t file;
    uint32_t extent_start;
    uint32_t extent_count;
} eng_block;

/* The content hash of a block: XXH3-128 without a seed, in canonical form (XXH128_canonicalFromHash, highest byte
 * first). */
typedef struct {
    uint8_t digest[16];
} eng_hash;

/* Watches a range of memory while a save reads it. */
typedef struct eng_guard eng_guard;

typedef struct {
    /* Set by the caller before eng_submit. */
    uint32_t direction;
    /* Hash every source before ENG_URGENT, and fail if a block that is staged has another hash.  Not with a guard. */
    uint32_t checked;
    uint32_t source_count;
    uint32_t extent_count;
    uint32_t block_count;
    uint32_t urgent_count; /* ENG_URGENT is reached when this many blocks, the first of `order`, are staged */
    uint32_t file_count;
    /* Of a write without urgent blocks: the blocks at the end of `order` that may not begin.  All are withheld at first,
     * or none; eng_release lowers the number. */
    uint32_t withheld_count;
    const eng_source *sources;
    const eng_extent *extents;
    const eng_block *blocks;
    uint32_t *order; /* block indices in the order to work through them; eng_release writes those of withheld blocks */
    eng_hash *checksums; /* one a block: a write stores them, a read compares with them */
    uint8_t *states; /* one a block, ENG_PENDING at first, or ENG_WITHHELD; may be read at any time */
    eng_guard *guard; /* of a write: armed with the job, and watches all its sources that may change; or NULL */
    const eng_hash *previous; /* the checksums of the job that the guard was armed with before, if it had the same
                               * blocks and extents; or NULL */

    /* Set by the pipeline.  Final once ENG_DONE is reached. */
    uint32_t milestones;
    uint32_t failure;
    int32_t error;
    uint32_t failed_block;
    uint64_t submitted_ns; /* CLOCK_MONOTONIC, as Python's time.monotonic_ns() */
    uint64_t staged_ns;
    uint64_t done_ns;
    uint64_t
        copying_ns; /* time spent copying between sources and slots, of all threads; of a write, with the checksums */
    uint64_t hashing_ns; /* time spent on the checksums of a read */
    uint64_t io_bytes; /* bytes that completions reported */
    uint64_t skipped_bytes; /* bytes not written because the file holds them already; whole blocks with padding */
    uint64_t clean_bytes; /* those of them not copied either, because the guard saw no write */
    uint32_t retry_count; /* short, interrupted or refused operations that were tried again */
    uint32_t reserved_end;
} eng_job;

/* The seam for faults and simulation: every read and write goes through this table, whose functions are called
 * on the pipeline's thread only. */
typedef struct {
    uint32_t slot; /* comes back in the completion; at most one operation a slot is under way */
    uint32_t direction;
    int32_t fd;
    int32_t place; /* of the file, as given to set_files, or ENG_NO_PLACE */
    uint32_t nbytes;
    uint64_t file_offset;
    uint8_t *address;
} eng_io;

typedef struct {
    uint32_t slot;
    int32_t result; /* bytes moved, or a negative errno */
} eng_completion;

typedef struct {
    void *context;
    /* Put `count` files into the places from `first` on; -1 takes a file out again.  May be NULL. */
    int (*set_files)(void *context, uint32_t first, const int32_t *fds, uint32_t count);
    int (*start)(void *context, const eng_io *io); /* queue one operation */
    /* Submit the queued operations; with wait, block until one completes or the pipeline is woken.  Returns the number of
     * completions stored, or a negative errno. */
    int (*reap)(void *context, eng_completion *completions, uint32_t capacity, uint32_t wait);
} eng_io_table;

/* What a trainer and its monitor share; eng_open and eng_serve_open take duplicates. */
typedef struct {
    int32_t memory_fd; /* a memfd of ENG_SHARED_HEADER_BYTES and the slots, sealed against shrinking */
    int32_t post_fd; /* an eventfd that does not block: the trainer wakes the monitor */
    int32_t wake_fd; /* the same the other way round */
    int32_t peer_fd; /* this process's end of a stream socket, whose other end only the other process has */
} eng_shared;

typedef struct {
    uint32_t slot_count;
    uint32_t slot_bytes; /* a multiple of ENG_ALIGNMENT */
    uint32_t way;
    uint32_t staging_threads; /* threads that copy and hash, the pipeline's own among them; at least 1 */
    uint32_t refused; /* set by eng_open when it fails */
    const eng_io_table *io; /* NULL: as `way` says */
    const eng_shared *shared; /* of ENG_SHARED and of eng_serve_open; else NULL.  Only read while they open. */
} eng_config;

typedef struct eng_pipeline eng_pipeline;

/* Map the slots, start the thread, set up the way.  Blocks until the thread runs or has failed. */
int eng_open(eng_config *config, eng_pipeline **pipeline);

/* Refuse new jobs, end the jobs that there are, and stop the thread, which releases slots and descriptors.  With `error`
 * 0 the jobs are drained, except those that lack files or withhold blocks, which are aborted with ECANCELED; otherwise
 * all are aborted with `error`, and those of ENG_SHARED end without waiting for the monitor.  Returns 1 when that is done,
 * 0 if timeout_ns passed first: closing then continues, and another call waits for it, or aborts what is still drained.
 * In a forked child it does nothing and returns 1. */
int eng_close(eng_pipeline *pipeline, int32_t error, uint64_t timeout_ns);

/* Close, aborting with ECANCELED, free the pipeline, and set the pointer to NULL.  Does nothing if it is NULL. */
void eng_free(eng_pipeline **pipeline);

/* Queue a job.  Staging of a write begins at once; nothing is written or read before eng_attach.  Returns 0, -EAGAIN if
 * no entry became free within timeout_ns, -ECANCELED if the job was aborted before, or -ESHUTDOWN. */
int eng_submit(eng_pipeline *pipeline, eng_job *job, uint64_t timeout_ns);

/* Give a job its `file_count` files.  For a write, `known` may hold one hash for each block of the files, valid where
 * `is_known` is not 0.  A block whose hash equals the known one becomes ENG_WRITTEN without I/O, and is counted in
 * skipped_bytes.  Both may be NULL.  The caller keeps all three arrays until ENG_DONE.  Returns 0, -ESRCH if the job has
 * ended, or -ESHUTDOWN. */
int eng_attach(eng_pipeline *pipeline, eng_job *job, const int32_t *fds, const eng_hash *known,
               const uint8_t *is_known);

/* Let withheld blocks of a submitted write begin, after those that were released before.  The job's guard watches their
 * sources from here on, and none of the others.  All blocks are withheld at first, or none.  Returns 0, -ESRCH if the
 * job has ended, -EINVAL if a block is not withheld or named twice, or what the guard was refused: then the caller aborts
 * the job.  Not to be called by two threads at once for one job. */
int eng_release(eng_pipeline *pipeline, eng_job *job, const uint32_t *blocks, uint32_t count);

/* Fail a job: its operations in flight are drained, and then it is done.  A job that was never submitted is done at
 * once, and eng_submit refuses it; a job that is done stays as it is. */
void eng_abort(eng_pipeline *pipeline, eng_job *job, int32_t error);

/* Wait until a milestone is reached: 1 if it is, 0 if timeout_ns passed first, or -ESHUTDOWN if it never will be. */
int eng_wait(eng_pipeline *pipeline, const eng_job *job, uint32_t milestone, uint64_t timeout_ns);

/* 1 if a milestone has been reached.  Reads only the job. */
int eng_reached(const eng_job *job, uint32_t milestone);

/* Memory that is mapped; NULL if there is none. */
typedef struct {
    uint8_t *address;
    uint64_t nbytes;
} eng_mapping;

/* Map a memfd that is sealed against shrinking and has this many bytes at least.  Returns 0 or a negative errno. */
int eng_map_shared(int32_t fd, uint64_t nbytes, eng_mapping *mapping);

/* Unmap it, and set the address to NULL.  Does nothing if that is NULL.  A forked child has a mapping of its own. */
void eng_unmap_shared(eng_mapping *mapping);

/* In a monitor: a thread that writes what the trainer's pipeline posts. */
typedef struct eng_serve eng_serve;

/* Map the memory, start the thread, set up `way`, which is not ENG_SHARED.  As eng_open.  If the trainer breaks the rules
 * of the posts, nothing more is written, and the socket is shut down for both sides. */
int eng_serve_open(eng_config *config, eng_serve **serve);

/* Let the trainer write to a file, up to this offset.  Returns 0 or -ENOMEM. */
int eng_serve_admit(eng_serve *serve, int32_t fd, uint64_t end);

/* Let it write no more, and wait for the writes under way.  Does nothing to a file that was not admitted. */
void eng_serve_withdraw(eng_serve *serve, int32_t fd);

/* Take no more posts, wait for the writes under way, and stop the thread.  May be called again. */
void eng_serve_stop(eng_serve *serve);

/* The memory of a slot, valid until eng_serve_free; NULL if there is no such slot. */
const uint8_t *eng_serve_slot(eng_serve *serve, uint32_t slot);

/* Stop, release everything, and set the pointer to NULL.  Does nothing if it is NULL. */
void eng_serve_free(eng_serve **serve);

/* The alignment of offsets and lengths that O_DIRECT requires on an open file (statx(2), STATX_DIOALIGN).  0 if the
 * kernel does not report it, or the file has no direct I/O. */
uint32_t eng_direct_alignment(int32_t fd);

/* Reserve the blocks of a range of a file (fallocate(2)): 0 or a negative errno, -EOPNOTSUPP where the file system
 * cannot. */
int eng_allocate(int32_t fd, uint64_t offset, uint64_t nbytes);

/* Close a file, and then set its descriptor to -1.  Does nothing if it is negative. */
void eng_close_file(int32_t *fd);

/* Watch `nbytes` of anonymous private memory; both numbers are multiples of the page size.  Returns 0, or a negative
 * errno and in `refused` the step that failed. */
int eng_guard_open(uint32_t kind, uint64_t address, uint64_t nbytes, uint32_t *refused, eng_guard **guard);

/* Begin to watch for the guard of a job that is submitted next: a write to its sources from here on is caught, of a
 * withheld block from eng_release on.  The job
 * releases the guard when it ends, or when it is aborted.  Costs time in proportion to the extents.  Returns 0, -EBUSY
 * while another job reads the same memory, or another negative errno. */
int eng_guard_arm(const eng_job *job);

/* Let all writers go on: a job that was armed will not be submitted. */
void eng_guard_disarm(const eng_job *job);

/* Let all writers go on, free the guard, and set the pointer to NULL.  No armed job is left.  Of NULL: nothing. */
void eng_guard_free(eng_guard **guard);

/* The hash that a block of these stored bytes has. */
eng_hash eng_hash_bytes(const void *bytes, uint64_t nbytes);

#endif
