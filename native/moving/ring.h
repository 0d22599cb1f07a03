/*
 * ring.h: the io_uring behind a pipeline, as an eng_io_table.
 *
 * Opened, used and closed on the pipeline's thread.  user_data of every operation is a slot index and never a pointer,
 * so no completion, however wrong, is dereferenced.
 */
#ifndef RING_H
#define RING_H

#include "engine_native.h"

typedef struct ring ring;

/* Set up a ring.  Records in `config` what the kernel refused.  `wake_fd` is an eventfd: when it becomes readable,
 * reap() returns. */
int ring_open(eng_config *config, int wake_fd, ring **ring, eng_io_table *table);

/* Register the `slot_count` slots of config->slot_bytes each, and a table of files, if config->way says so.  Records in
 * `config` what the kernel refused. */
int ring_register(ring *ring, eng_config *config, uint8_t *slots);

/* Unregister buffers and files now.  Closing the ring does not do so while a forked child has its descriptor.  No
 * operation may be in flight. */
void ring_unregister(ring *ring);

void ring_close(ring *ring);

/* The ring's descriptor, for a forked child to close. */
int ring_fd(const ring *ring);

#endif
