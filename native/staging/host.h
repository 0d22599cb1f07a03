/*
 * host.h: staging between host memory and slots.  Called by the pipeline's thread only.
 *
 * A job has been validated before it comes here: extents lie inside their block, and the extents of a write cover it
 * without gaps.
 */
#ifndef HOST_H
#define HOST_H

#include "engine_native.h"

/* The seed of a block's checksum: a block in the wrong file, at the wrong offset or of another checkpoint does
 * not verify. */
uint64_t host_block_seed(uint64_t seed, uint32_t file, uint64_t file_offset);

/* Copy a block's extents from their sources into `slot`, and zero the padding up to ENG_ALIGNMENT.  Returns the checksum
 * of what is in the slot, whatever was written to the sources meanwhile. */
uint64_t host_gather(const eng_job *job, const eng_block *block, uint8_t *slot);

/* The checksum of the stored bytes of a block that was read into `slot`. */
uint64_t host_checksum(const eng_job *job, const eng_block *block, const uint8_t *slot);

/* Copy a block's extents from `slot` out to their sources. */
void host_scatter(const eng_job *job, const eng_block *block, const uint8_t *slot);

#endif
