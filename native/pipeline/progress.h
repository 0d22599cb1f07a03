/*
 * progress.h: which blocks of a job are begun, its milestones, its failure and its end.
 *
 * A job ends in progress_settle, when it has failed or every block is begun, and it has no slot any more.
 */
#ifndef PROGRESS_H
#define PROGRESS_H

#include "pipeline/pipeline.h"

/* Set the state of a block, for all threads. */
void progress_set_state(eng_job *job, uint32_t block, uint8_t state);

/* Set milestones, and wake those that wait for them. */
void progress_reach(struct eng_pipeline *p, eng_job *job, uint32_t milestones);

/* Move `next` to a block to begin, and `clean_next` to a deferred one, once `next` has come to the end. */
void progress_advance(struct eng_pipeline *p, uint32_t entry_index);

/* Whether every block of a write is staged. */
int progress_all_staged(const entry *e);

/* Note the milestones that the staging of a write has reached. */
void progress_note_staged(struct eng_pipeline *p, uint32_t entry_index);

/* Fail a job: the first failure is latched, and its slots that wait are freed. */
void progress_fail(struct eng_pipeline *p, uint32_t entry_index, uint32_t kind, int error, uint32_t block);

/* A job has failed: once no helper copies from its sources, they are the caller's again. */
void progress_give_up_sources(struct eng_pipeline *p, entry *e);

/* Release a job that has nothing left to do.  Its memory is the caller's again once ENG_DONE is reached. */
void progress_settle(struct eng_pipeline *p, uint32_t entry_index);

/* Register a job's files in the ring's table, or unregister them.  Returns 0, or the refusal. */
int progress_set_files(const struct eng_pipeline *p, uint32_t entry_index, int is_there);

#endif
