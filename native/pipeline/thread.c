/*
 * thread.c: starting threads, and reading the clock (thread.h says for whom).
 */
#include "pipeline/thread.h"

#include <signal.h>
#include <stddef.h>
#include <time.h>

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

uint64_t thread_now_ns(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}
