/*
 * posix.h: pread(2) and pwrite(2) on a few threads behind a pipeline, as an eng_io_table, for hosts without io_uring.
 *
 * Opened, used and closed on the pipeline's thread.  The files decide whether the page cache is in between: with
 * O_DIRECT it is not.
 */
#ifndef POSIX_H
#define POSIX_H

#include "engine_native.h"

typedef struct posix posix;

/* Start the threads.  `wake_fd` is an eventfd: whatever makes it readable, a completion or another thread, makes
 * reap() return. */
int posix_open(const eng_config *config, int wake_fd, posix **posix, eng_io_table *table);

/* Join the threads.  Nothing is under way any more. */
void posix_close(posix *posix);

#endif
