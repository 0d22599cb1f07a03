/*
 * host.h: staging between host memory and slots.  Called by the pipeline's thread only.
 *
 * The job is already validated: extents lie inside their block, and the extents of a write cover it
 * without gaps.
 */
#ifndef HOST_H
#define HOST_H

#include "engine_native.h"

/* Copy a block's extents from their sources into `slot`, and zero the padding up to ENG_ALIGNMENT.  Returns the hash of
 * the bytes in the slot, even if the sources change during the call. */
eng_hash host_gather(const eng_job *job, const eng_block *block, uint8_t *slot);

/* Copy a block's extents from `slot` out to their sources. */
void host_scatter(const eng_job *job, const eng_block *block, const uint8_t *slot);

#endif
