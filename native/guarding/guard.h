/*
 * guard.h: what the pipeline asks of a guard.  engine_native.h has the calls of Python.
 *
 * All but guard_watch are called by the pipeline's thread, for the job that the guard was armed with.
 */
#ifndef GUARD_H
#define GUARD_H

#include "engine_native.h"

/* Let the guard wake the pipeline through this eventfd when a writer waits for a block. */
void guard_attach(eng_guard *guard, int wake_fd);

/* Watch the sources of withheld blocks from now on, and make the blocks pending.  Called by the thread that releases
 * them, with the pipeline's mutex held.  Returns 0, -ESRCH if the job has ended, or what the kernel refused. */
int guard_watch(eng_guard *guard, const eng_job *job, const uint32_t *blocks, uint32_t count);

/* Whether nothing was written to a block's sources since the job before, so that it has the same bytes. */
int guard_is_clean(const eng_guard *guard, uint32_t block);

/* Whether the pipeline's thread can stage a pending block now, and not another thread already does. */
typedef int (*guard_claim)(void *context, uint32_t block);

/* A block, still pending, that a writer waits for and that can be claimed: 1, or 0 if there is none. */
int guard_wanted(eng_guard *guard, guard_claim claim, void *context, uint32_t *block);

/* A block has been copied.  Its sources may change again, and a writer that waits for them goes on.
 * `is_unchanged`: it has the bytes that the job before found.  Returns 0, or an errno if its sources may have been
 * written before they were copied: EBUSY, or ETIMEDOUT if the guard had to let writers go on. */
int guard_release(eng_guard *guard, uint32_t block, int is_unchanged);

/* A clean block need not be copied. */
void guard_skip(eng_guard *guard, uint32_t block);

/* The job has ended, or will not read its sources again: every writer goes on.  May be called again. */
void guard_end(eng_guard *guard, const eng_job *job);

#endif
