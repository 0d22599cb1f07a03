/*
 * posix.h: pread(2) and pwrite(2) on a few threads behind a pipeline, as an eng_io_table, for hosts without io_uring.
 *
 * Opened, used and closed on the pipeline's thread.  A file that is open with O_DIRECT bypasses the page cache.
 */
#ifndef POSIX_H
#define POSIX_H

#include "engine_native.h"

typedef struct posix posix;

/* Start the threads.  `wake_fd` is an eventfd: reap() returns when it becomes readable, by a completion or by another
 * thread. */
int posix_open(const eng_config *config, int wake_fd, posix **posix, eng_io_table *table);

/* Join the threads.  No operation may be in flight. */
void posix_close(posix *posix);

#endif
