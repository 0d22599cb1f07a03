/*
 * job.h: the consistency check of a job.  The pipeline's thread checks a job before it touches a byte, so that no
 * job, even a wrong one, makes the pipeline read or write outside its slots.
 */
#ifndef JOB_H
#define JOB_H

#include "engine_native.h"

/* 1 if every index, offset and length of the job is in its range, for slots of `slot_bytes`, and it asks for nothing that
 * contradicts itself.  `withheld_count` is that of its submission: another thread may lower it meanwhile, and write those
 * parts of the order. */
int job_is_valid(const eng_job *job, uint32_t withheld_count, uint32_t slot_bytes);

#endif
