/*
 * files.c: what we ask of a file besides reading and writing it.
 *
 * Alignment: a file system may want more of O_DIRECT than a device's logical block (open(2), NOTES).  Since Linux
 * 6.1 statx(2) tells; headers older than that lack the field, and then we do not know, as on an older kernel.
 *
 * Allocation: fallocate(2) itself and not posix_fallocate(3), which writes a byte to every block where the file
 * system has no fallocate, and those writes O_DIRECT refuses.
 */
#include <errno.h>
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

int eng_allocate(int32_t fd, uint64_t offset, uint64_t nbytes)
{
    int result;
    do
        result = fallocate(fd, 0, (off_t)offset, (off_t)nbytes);
    while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : 0;
}
