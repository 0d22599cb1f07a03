/*
 * stager.h: the copying and hashing of a block, on the thread of the caller or on helper threads.
 *
 * The pipeline's thread calls all of these.  It stages blocks itself, and gives others to helpers so that both stage at
 * the same time.  A helper touches the slot, the sources and the read-only part of the job; everything that follows from
 * a staged block is done by the pipeline's thread.
 */
#ifndef STAGER_H
#define STAGER_H

#include "engine_native.h"

/* One block in one slot, and what became of it. */
typedef struct {
    uint32_t slot;         /* comes back with the result; each slot is given at most once */
    uint32_t block;
    const eng_job *job;    /* validated */
    uint8_t *memory;       /* of the slot */
    eng_hash checksum;     /* result: of the bytes in the slot */
    int is_verified;       /* result of a read: the bytes have the checksum of the job, and were copied out */
    uint64_t copying_ns;   /* result: the times that the job counts under these names */
    uint64_t hashing_ns;
} staging;

/* Stage a block here.  Of a write: copy its extents into the slot, and hash them.  Of a read: hash the slot, and copy its
 * extents out if the hash is that of the job. */
void stage(staging *work);

typedef struct stager stager;

/* Start helper threads.  `wake_fd` is an eventfd, which becomes readable when a helper has a result.  Returns 0 or a
 * negative errno. */
int stager_open(uint32_t helper_count, int wake_fd, stager **stager);

/* Join the helpers.  They have no block. */
void stager_close(stager *stager);

/* Give a block to the helpers: 1, or 0 if they have enough. */
int stager_begin(stager *stager, const staging *work);

/* Take a block back that no helper has begun: 1, or 0 if one has. */
int stager_withdraw(stager *stager, uint32_t slot);

/* Take the results that there are, at most ENG_STAGING_BLOCKS_MAX.  Returns their number. */
uint32_t stager_poll(stager *stager, staging *results);

/* Take all blocks back: wait until no helper copies, and drop the results. */
void stager_drain(stager *stager);

#endif
