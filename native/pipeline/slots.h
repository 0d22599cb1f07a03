/*
 * slots.h: the slots of a pipeline, and the lists of those that wait for something.
 *
 * A slot that changes its state enters or leaves a list of pipeline.h with it, and its job's counts follow.
 */
#ifndef SLOTS_H
#define SLOTS_H

#include "pipeline/pipeline.h"

static const uint32_t NO_SLOT = UINT32_MAX;

/* The memory of a slot. */
uint8_t *slots_memory(const struct eng_pipeline *p, uint32_t index);

/* Take a free slot, of which there is one, for a block that is staged now. */
uint32_t slots_take(struct eng_pipeline *p, uint32_t entry_index, uint32_t block);

/* Free a slot, also one that waits for files or for its verification. */
void slots_free(struct eng_pipeline *p, uint32_t index);

/* A block is staged, and its job has no files yet. */
void slots_await_files(struct eng_pipeline *p, uint32_t index);

/* A block was read, and is to be verified. */
void slots_await_verification(struct eng_pipeline *p, uint32_t index);

/* Its verification begins. */
void slots_leave_unverified(struct eng_pipeline *p, uint32_t index);

/* The slot of a block that is with the helpers to be staged, or NO_SLOT. */
uint32_t slots_helped(const struct eng_pipeline *p, uint32_t entry_index, uint32_t block);

/* A helper has a slot, or has it no more. */
void slots_enter_helped(struct eng_pipeline *p, uint32_t index);
void slots_leave_helped(struct eng_pipeline *p, uint32_t index);

/* Remove an index from a list of `*count` and keep the order of the rest. */
void slots_remove(uint32_t *indices, uint32_t *count, uint32_t index);

#endif
