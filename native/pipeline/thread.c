/*
 * thread.c: starting threads, waking them, and reading the clock (thread.h says for whom).
 */
#include "pipeline/thread.h"

#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

int thread_start(pthread_t *thread, const char *name, void *(*run)(void *), void *argument)
{
    /* The program's own threads take signals: a handler must not run here or interrupt a wait.  Crash signals stay
     * unblocked, so that the program's crash handler runs. */
    static const int CRASHES[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP};
    sigset_t blocked, before;
    sigfillset(&blocked);
    for (size_t i = 0; i < sizeof CRASHES / sizeof *CRASHES; i++)
        sigdelset(&blocked, CRASHES[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    const int result = pthread_create(thread, NULL, run, argument);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (result == 0)
        pthread_setname_np(*thread, name);
    return -result;
}

void thread_wake(int wake_fd)
{
    const uint64_t one = 1;
    /* EAGAIN: it has as many wakes as it can count, all of them perhaps from the other process that shares it.  It is
     * readable, which is all that a wake is for. */
    if (write(wake_fd, &one, sizeof one) < 0 && errno != EAGAIN)
        abort(); /* it is no eventfd: a descriptor was closed that was ours */
}

uint64_t thread_now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}
