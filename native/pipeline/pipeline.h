/*
 * pipeline.h: the structures that both halves of a pipeline share.
 *
 * pipeline.c is the slot state machine, with slots.c (the lists of slots) and progress.c (the life of a job): it runs on
 * the pipeline's thread only, and blocks in reap only.  service.c is the thread and the functions of engine_native.h,
 * which other threads call.  They reach the machine only through the inbox half of an entry.
 *
 * Locks.  `mutex` guards the inbox half of every entry, changes of `state`, and the broadcasts of `changed`.  All else
 * belongs to the thread, or is a single word written atomically (a job's states and milestones, `dirty`, `abandons`,
 * `state`).
 */
#ifndef PIPELINE_H
#define PIPELINE_H

#include <pthread.h>

#include "engine_native.h"
#include "moving/posix.h"
#include "moving/ring.h"
#include "moving/shared.h"
#include "pipeline/forks.h"
#include "staging/stager.h"

/* A slot is in SLOT_STAGED if and only if it is in `waiting`, and in SLOT_MOVED if and only if it is in
 * `unverified`.  Between two calls of the functions below it is in SLOT_STAGING if and only if it is in `helped`. */
enum slot_state { SLOT_FREE, SLOT_STAGING, SLOT_STAGED, SLOT_MOVING, SLOT_MOVED };

typedef struct {
    enum slot_state state;
    uint32_t entry;
    uint32_t block;
    uint32_t done_bytes;      /* of this block; a multiple of ENG_ALIGNMENT until the block is complete */
    uint32_t retry_count;
    int hashes_only;          /* the first hash of a block of a checked job: it is not written */
} slot;

/* Some of the slots, in order of arrival. */
typedef struct {
    uint32_t *slots;
    uint32_t count;
} slot_list;

typedef struct {
    /* The inbox, guarded by the mutex. */
    eng_job *job;             /* NULL: the entry is free */
    int submitted, attached, aborted, released;
    uint32_t withheld_count;  /* of the job when it was submitted */
    int32_t abort_error;
    const int32_t *fds;
    const eng_hash *known;    /* hashes of the files' blocks where `is_known` is set; or NULL */
    const uint8_t *is_known;
    /* The thread's own. */
    int has_files, failed;
    uint32_t limit;           /* blocks of order that may begin: the others are withheld */
    uint32_t next;            /* index into order of the next block to begin */
    uint32_t clean_next;      /* the same for the clean blocks, which `next` passes over */
    uint32_t hashed_next;     /* the same for the first hash of a checked job */
    uint32_t hashed_count;    /* blocks that have it */
    uint32_t urgent_next;     /* index into order of the first urgent block that is not staged */
    uint32_t slot_count;      /* slots this job holds */
    uint32_t helped_count;    /* of these, in `helped` */
    uint32_t unverified_count; /* of these, in `unverified` */
    uint64_t turn;            /* the number of its last turn; 0 before the first */
} entry;

/* A pipeline's life.  It goes forward only; from OPENING it goes straight to CLOSED if the kernel refuses something.
 * In CLOSED the thread has released everything but the struct itself. */
enum service_state { SERVICE_OPENING, SERVICE_OPEN, SERVICE_CLOSING, SERVICE_CLOSED };

enum { DESCRIPTOR_WAKE = 0, DESCRIPTOR_RING = 1, DESCRIPTOR_POST = 2, DESCRIPTOR_PEER = 3 };

struct eng_pipeline {
    eng_config config;
    eng_io_table io;
    ring *ring;               /* at most one of these three is set: the mover behind `io` */
    posix *posix;
    stager *stager;           /* helper threads; NULL: none */
    shared *shared;
    uint8_t *memory;
    slot *slots;
    uint32_t *free_slots;
    uint32_t free_count;
    slot_list waiting;        /* staged, and their jobs have no files yet */
    slot_list unverified;     /* read, and to be verified */
    slot_list helped;         /* with the helper threads, to be staged or verified */
    uint32_t moving_count;    /* operations in flight */
    uint32_t reading_count;   /* of these, the reads */
    uint32_t refusal_count;
    int broken;               /* errno that broke the ring, until it is replaced */
    entry entries[ENG_JOBS_MAX];
    uint32_t queue[ENG_JOBS_MAX]; /* entries in order of arrival */
    uint32_t queue_count;
    uint64_t turn;            /* how many turns there have been */
    pthread_t thread;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    forks_owner forks;        /* the descriptors: DESCRIPTOR_... */
    int dirty;                /* something is in the inbox */
    int abandons;             /* the jobs are aborted, and nothing that a monitor has waits for it */
    enum service_state state; /* changed with the mutex held */
    int open_error;           /* negative errno of a failed set-up; valid once it is closed */
    int has_thread;           /* to be joined */
};

/* Take one entry's inbox: a new job, its files, an abort. */
void pipeline_accept(struct eng_pipeline *p, uint32_t entry_index);

/* Replace a broken ring, and its slots, which the kernel may still access.  Returns 0 or an errno.  In service.c, which
 * opens rings. */
int service_replace_ring(struct eng_pipeline *p);

/* Abort the jobs that have no files, or blocks that are withheld: the pipeline is closing, and will get neither. */
void pipeline_cancel_incomplete(struct eng_pipeline *p);

/* Continue with the blocks that helper threads are done with, and do a few pieces of work, of the jobs whose turn it is.
 * Returns their number. */
uint32_t pipeline_work(struct eng_pipeline *p);

/* Submit started operations and reap completed ones; with `wait`, sleep until one completes. */
void pipeline_reap(struct eng_pipeline *p, uint32_t wait);

#endif
