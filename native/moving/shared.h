/*
 * shared.h: the memory that a trainer and its monitor share, and the trainer's mover, which posts writes there.
 *
 * The memory is one memfd: a header of two rings, then the slots.  The trainer posts writes of slots to the first ring,
 * and the monitor answers in the second one (serve.c).  Each ring has one producer and one consumer, and each index is
 * written by one side.  At most one write a slot is under way, so neither ring can be full.
 *
 * The other process is not trusted with this one's memory: an index is masked or compared before it is used, and an entry
 * is copied once before it is looked at.
 */
#ifndef SHARED_H
#define SHARED_H

#include <stddef.h>

#include "engine_native.h"

/* Of each ring: options.SLOT_COUNT_MAX.  A power of two, so that indices may run over. */
enum { SHARED_ENTRIES = 1024 };

/* One write of a part of a slot. */
typedef struct {
    uint32_t slot;
    int32_t fd; /* a number of the monitor's table of descriptors */
    uint32_t slot_offset;
    uint32_t nbytes;
    uint64_t file_offset;
} shared_post;

/* Indices that different processes write are on different cache lines.  A head is written by the consumer. */
typedef struct {
    _Alignas(64) uint32_t post_tail;
    _Alignas(64) uint32_t post_head;
    _Alignas(64) uint32_t done_tail;
    _Alignas(64) uint32_t done_head;
    _Alignas(64) shared_post posts[SHARED_ENTRIES];
    eng_completion done[SHARED_ENTRIES];
} shared_header;

_Static_assert(sizeof(shared_header) <= ENG_SHARED_HEADER_BYTES, "the slots begin behind the header");

/* Bytes of a memfd with these slots. */
size_t shared_bytes(const eng_config *config);

typedef struct shared shared;

/* The trainer's mover.  `header` is mapped.  `wake_fd` is the pipeline's eventfd, which the monitor writes to.  Borrows
 * its descriptors. */
int shared_open(const eng_config *config, shared_header *header, int post_fd, int wake_fd, int peer_fd, shared **shared,
                eng_io_table *table);

/* Fail the writes in flight, and all later ones, with EPIPE: whether the monitor does them or not is not waited for. */
void shared_abandon(shared *shared);

void shared_close(shared *shared);

#endif
