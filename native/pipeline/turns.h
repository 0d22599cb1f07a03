/*
 * turns.h: which job works next, and on what.
 */
#ifndef TURNS_H
#define TURNS_H

#include "pipeline/pipeline.h"

/* The work on one block that the pipeline's thread does in one go. */
enum piece {
    PIECE_NONE,   /* the job can do nothing now */
    PIECE_HASH,   /* of a checked write: the first hash of a block */
    PIECE_STAGE,  /* copy a block into a slot */
    PIECE_CLEAN,  /* finish a block to which nothing was written, or stage it */
    PIECE_READ,   /* start the read of a block */
    PIECE_VERIFY  /* verify the oldest block of the job that was read, and copy it out */
};

/* Whether a job may take a free slot and hold it until its block is written. */
int turns_may_hold(const struct eng_pipeline *p, const entry *e);

/* The entry of the job that works next, with its piece; ENG_JOBS_MAX if no job can do anything. */
uint32_t turns_next(struct eng_pipeline *p, enum piece *piece);

#endif
