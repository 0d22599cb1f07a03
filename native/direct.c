/*
 * direct.c: what O_DIRECT asks of a file.
 *
 * A file system may want more than a device's logical block (open(2), NOTES).  Since Linux 6.1 statx(2) tells;
 * headers older than that lack the field, and then we do not know, as on an older kernel.
 */
#include <fcntl.h>
#include <sys/stat.h>

#include "engine_native.h"

uint32_t eng_direct_alignment(int32_t fd)
{
#ifdef STATX_DIOALIGN
    struct statx status;
    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 && (status.stx_mask & STATX_DIOALIGN))
        return status.stx_dio_offset_align;
#else
    (void)fd;
#endif
    return 0;
}
