/*
 * files.c: calls on a file besides reading and writing it.
 *
 * Alignment: for O_DIRECT a file system may need more than the device's logical block (open(2), NOTES).  statx(2)
 * reports it since Linux 6.1.  With older headers or an older kernel it is unknown.
 *
 * Allocation: fallocate(2), not posix_fallocate(3).  If the file system has no fallocate, the latter writes a byte to
 * every block, and O_DIRECT refuses those writes.
 */
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

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

void eng_close_file(int32_t *fd)
{
    if (*fd < 0)
        return;
    close(*fd); /* not again after EINTR: Linux has closed it (close(2), NOTES) */
    *fd = -1;   /* last: a child that is forked before this closes its copy */
}
