/*
 * forks.c: the list of owners, and the handlers that fork(2) runs (forks.h says why).
 */
#include "pipeline/forks.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

static pthread_mutex_t fork_mutex = PTHREAD_MUTEX_INITIALIZER;
static forks_owner *owners; /* guarded by fork_mutex */

void forks_lock(void)
{
    pthread_mutex_lock(&fork_mutex);
}

void forks_unlock(void)
{
    pthread_mutex_unlock(&fork_mutex);
}

void forks_add(forks_owner *owner)
{
    for (int i = 0; i < FORKS_DESCRIPTORS_MAX; i++)
        owner->descriptors[i] = -1;
    owner->next = owners;
    owners = owner;
}

void forks_remove(forks_owner *owner)
{
    for (forks_owner **at = &owners; *at != NULL; at = &(*at)->next)
        if (*at == owner) {
            *at = owner->next;
            break;
        }
}

int forks_duplicate(int descriptor)
{
    return fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
}

void forks_close(int *descriptor)
{
    if (*descriptor >= 0)
        close(*descriptor);
    *descriptor = -1;
}

static void after_fork_in_child(void)
{
    for (forks_owner *owner = owners; owner != NULL; owner = owner->next) {
        for (int i = 0; i < FORKS_DESCRIPTORS_MAX; i++)
            forks_close(&owner->descriptors[i]);
        owner->forked = 1;
    }
    owners = NULL;
    pthread_mutex_unlock(&fork_mutex);
}

/* When the module is loaded, and not in the first eng_open: another thread may be forking then, and that
 * fork would run none of these.  (Python forks under its import lock.) */
__attribute__((constructor)) static void watch_forks(void)
{
    if (pthread_atfork(forks_lock, forks_unlock, after_fork_in_child) != 0)
        abort(); /* no memory for a dozen bytes */
}
