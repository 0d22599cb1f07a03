/*
 * forks.h: what a forked child does with the descriptors of pipelines and guards.
 *
 * A forked child has none of our threads.  A ring that it inherits keeps the slots' memory pinned for as long as the
 * child lives, and a userfaultfd keeps the arena registered.  So the child closes its copies of all our descriptors at
 * the fork.  The lock is held across a fork, and by every owner while a descriptor or a mapping is made and noted, or
 * forgotten and closed.  So a child finds in the list exactly the descriptors that it has inherited, and no mapping
 * that a fork would copy.
 */
#ifndef FORKS_H
#define FORKS_H

enum { FORKS_DESCRIPTORS_MAX = 4 };

/* One owner of descriptors, in the list from forks_add to forks_remove. */
typedef struct forks_owner {
    struct forks_owner *next;
    int descriptors[FORKS_DESCRIPTORS_MAX]; /* -1: not open; changed with the lock held */
    int forked; /* this process is a fork of the one that called forks_add */
} forks_owner;

void forks_lock(void);
void forks_unlock(void);

/* Put an owner without descriptors into the list; the lock is held. */
void forks_add(forks_owner *owner);

/* Take an owner out of the list, if it is there; the lock is held. */
void forks_remove(forks_owner *owner);

/* A duplicate of a descriptor, closed on exec, or -1; the lock is held until it is noted. */
int forks_duplicate(int descriptor);

/* Close a descriptor, if it is open, and note that; the lock is held. */
void forks_close(int *descriptor);

#endif
