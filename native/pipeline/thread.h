/*
 * thread.h: threads of our own beside a program's, how they are woken, and their clock.
 */
#ifndef THREAD_H
#define THREAD_H

#include <pthread.h>
#include <stdint.h>

/* Start a thread that takes none of the program's signals.  `name` has at most 15 characters (pthread_setname_np(3)).
 * Returns 0 or a negative errno. */
int thread_start(pthread_t *thread, const char *name, void *(*run)(void *), void *argument);

/* Make an eventfd readable, so that the thread that polls it wakes. */
void thread_wake(int wake_fd);

/* CLOCK_MONOTONIC in nanoseconds. */
uint64_t thread_now_ns(void);

#endif
