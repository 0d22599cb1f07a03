/*
 * job.h: is a job consistent with itself?  Checked on the pipeline's thread before a byte of it is touched, so
 * that no job, however wrong, makes the pipeline read or write outside its slots.
 */
#ifndef JOB_H
#define JOB_H

#include "engine_native.h"

/* 1 if every index, offset and length of the job lies where it must, for slots of `slot_bytes`. */
int job_is_valid(const eng_job *job, uint32_t slot_bytes);

#endif
