/*
 * protection.h: write protection of a range of memory through userfaultfd(2), and the question which pages were written.
 *
 * Only the kernel's part is here; guard.c decides what to protect, and for how long.  A range is anonymous private
 * memory of this process.  Addresses and lengths are multiples of the page size.
 */
#ifndef PROTECTION_H
#define PROTECTION_H

#include <stdint.h>

typedef struct {
    int uffd;    /* userfaultfd(2); -1: closed */
    int pagemap; /* /proc/self/pagemap, for PAGEMAP_SCAN; -1: not needed */
    uint64_t address;
    uint64_t nbytes;
} protection;

/* Register a range.  With `is_async`, a write to a protected page goes on at once, and the page is noted as written.
 * Without, the writer waits until its page is unprotected.  Returns 0 or a negative errno, and in `refused` the step
 * that failed, an ENG_REFUSED_... of engine_native.h. */
int protection_open(protection *p, uint64_t address, uint64_t nbytes, int is_async, uint32_t *refused);

/* Unregister the range, which ends all protection and wakes every writer, and close the descriptors. */
void protection_close(protection *p);

/* Protect a part of the range, or unprotect it and wake its writers.  Returns 0 or a negative errno. */
int protection_set(const protection *p, uint64_t address, uint64_t nbytes, int is_protected);

/* The address of a page that a writer waits for: 1, or 0 if there is none, or a negative errno. */
int protection_next_fault(const protection *p, uint64_t *address);

/* Some pages were written, from `start` up to `end`. */
typedef void (*protection_visit)(void *context, uint64_t start, uint64_t end);

/* Name the pages of a part of the range that were written since they were protected; with `protect`, protect them
 * again in the same moment.  Only of an asynchronous range.  Returns 0 or a negative errno. */
int protection_scan(const protection *p, uint64_t address, uint64_t nbytes, int protect, protection_visit visit,
                    void *context);

#endif
