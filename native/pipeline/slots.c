/*
 * slots.c: taking and freeing slots, and the lists of those that wait (slots.h).
 */
#include "pipeline/slots.h"

#include <stdlib.h>
#include <string.h>

uint8_t *slots_memory(const eng_pipeline *p, uint32_t index)
{
    return p->memory + (size_t)index * p->config.slot_bytes;
}

static void append(slot_list *list, uint32_t index)
{
    list->slots[list->count++] = index;
}

void slots_remove(uint32_t *indices, uint32_t *count, uint32_t index)
{
    uint32_t at = 0;
    while (at < *count && indices[at] != index)
        at++;
    if (at == *count)
        abort(); /* the list and the states disagree: going on could corrupt memory */
    (*count)--;
    memmove(&indices[at], &indices[at + 1], (*count - at) * sizeof *indices);
}

void slots_await_files(eng_pipeline *p, uint32_t index)
{
    p->slots[index].state = SLOT_STAGED;
    append(&p->waiting, index);
}

void slots_await_verification(eng_pipeline *p, uint32_t index)
{
    p->slots[index].state = SLOT_MOVED;
    p->entries[p->slots[index].entry].unverified_count++;
    append(&p->unverified, index);
}

uint32_t slots_take(eng_pipeline *p, uint32_t entry_index, uint32_t block)
{
    const uint32_t index = p->free_slots[--p->free_count];
    p->slots[index] = (slot){.state = SLOT_STAGING, .entry = entry_index, .block = block};
    p->entries[entry_index].slot_count++;
    return index;
}

void slots_leave_unverified(eng_pipeline *p, uint32_t index)
{
    slots_remove(p->unverified.slots, &p->unverified.count, index);
    p->entries[p->slots[index].entry].unverified_count--;
}

void slots_free(eng_pipeline *p, uint32_t index)
{
    if (p->slots[index].state == SLOT_STAGED)
        slots_remove(p->waiting.slots, &p->waiting.count, index);
    if (p->slots[index].state == SLOT_MOVED)
        slots_leave_unverified(p, index);
    p->entries[p->slots[index].entry].slot_count--;
    p->slots[index].state = SLOT_FREE;
    p->free_slots[p->free_count++] = index;
}

uint32_t slots_helped(const eng_pipeline *p, uint32_t entry_index, uint32_t block)
{
    for (uint32_t at = 0; at < p->helped.count; at++) {
        const slot *s = &p->slots[p->helped.slots[at]];
        if (s->entry == entry_index && s->block == block && !s->hashes_only)
            return p->helped.slots[at];
    }
    return NO_SLOT;
}

void slots_enter_helped(eng_pipeline *p, uint32_t index)
{
    append(&p->helped, index);
    p->entries[p->slots[index].entry].helped_count++;
}

void slots_leave_helped(eng_pipeline *p, uint32_t index)
{
    slots_remove(p->helped.slots, &p->helped.count, index);
    p->entries[p->slots[index].entry].helped_count--;
}
