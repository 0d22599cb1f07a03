/*
 * protection.c: the calls of userfaultfd(2) and PAGEMAP_SCAN (protection.h says what they give).
 */
#include "guarding/protection.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "engine_native.h"

/* Newer than the headers of the distributions that we build on (Debian 12 has those of Linux 6.1). */
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13) /* Linux 6.4 */
#endif
#ifndef UFFD_FEATURE_WP_ASYNC
#define UFFD_FEATURE_WP_ASYNC (1 << 15) /* Linux 6.7, as is PAGEMAP_SCAN */
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00) /* Linux 6.1 */
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1 /* Linux 5.11 */
#endif

/* struct page_region and struct pm_scan_arg of linux/fs.h, under names of our own: a newer header has them, too. */
typedef struct {
    uint64_t start, end, categories;
} page_region;

typedef struct {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
} pm_scan_arg;

enum { SCAN_PROTECTS = 1, IS_WRITTEN = 2, REGIONS = 128 };
#define PAGEMAP_SCAN_CALL _IOWR('f', 16, pm_scan_arg)

/* A userfaultfd(2) that catches the kernel's own writes, too, such as read(2) into a parameter.  A process without the
 * privilege may be allowed the device.  A range whose faults nobody answers needs no privilege. */
static int open_userfaultfd(int is_async)
{
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd >= 0)
        return uffd;
    const int error = -errno;
    const int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device >= 0) {
        uffd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        close(device);
    }
    if (uffd < 0 && is_async)
        uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    return uffd >= 0 ? uffd : error;
}

static int prepare(protection *p, int is_async, uint32_t *refused)
{
    *refused = ENG_REFUSED_USERFAULTFD;
    if ((p->uffd = open_userfaultfd(is_async)) < 0)
        return p->uffd;
    /* Without WP_UNPOPULATED, pages that were never touched stay unprotected, and nothing says so. */
    struct uffdio_api api = {.api = UFFD_API};
    api.features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_UNPOPULATED;
    if (is_async)
        api.features |= UFFD_FEATURE_WP_ASYNC;
    *refused = ENG_REFUSED_PROTECTION;
    if (ioctl(p->uffd, UFFDIO_API, &api) != 0)
        return -errno;
    *refused = ENG_REFUSED_SCAN;
    if (is_async && (p->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)) < 0)
        return -errno;
    struct uffdio_register range = {.range = {p->address, p->nbytes}, .mode = UFFDIO_REGISTER_MODE_WP};
    *refused = ENG_REFUSED_RANGE;
    return ioctl(p->uffd, UFFDIO_REGISTER, &range) == 0 ? 0 : -errno;
}

static void ignore(void *context, uint64_t start, uint64_t end)
{
    (void)context;
    (void)start;
    (void)end;
}

int protection_open(protection *p, uint64_t address, uint64_t nbytes, int is_async, uint32_t *refused)
{
    *p = (protection){-1, -1, address, nbytes};
    int result = prepare(p, is_async, refused);
    if (result == 0 && is_async) {
        *refused = ENG_REFUSED_SCAN;
        result = protection_scan(p, address, nbytes, 0, ignore, NULL);
    }
    if (result < 0)
        protection_close(p);
    return result;
}

void protection_close(protection *p)
{
    struct uffdio_range range = {p->address, p->nbytes};
    if (p->uffd >= 0) {
        ioctl(p->uffd, UFFDIO_UNREGISTER, &range); /* a fork may hold the descriptor open for a moment */
        close(p->uffd);
    }
    if (p->pagemap >= 0)
        close(p->pagemap);
    p->uffd = p->pagemap = -1;
}

int protection_set(const protection *p, uint64_t address, uint64_t nbytes, int is_protected)
{
    struct uffdio_writeprotect change = {.range = {address, nbytes}};
    change.mode = is_protected ? UFFDIO_WRITEPROTECT_MODE_WP : 0;
    int result;
    do
        result = ioctl(p->uffd, UFFDIO_WRITEPROTECT, &change);
    while (result != 0 && (errno == EAGAIN || errno == EINTR));
    return result == 0 ? 0 : -errno;
}

int protection_next_fault(const protection *p, uint64_t *address)
{
    struct uffd_msg message;
    for (;;) {
        const ssize_t count = read(p->uffd, &message, sizeof message);
        if (count == sizeof message) {
            if (message.event != UFFD_EVENT_PAGEFAULT)
                continue;
            *address = message.arg.pagefault.address;
            return 1;
        }
        if (count < 0 && errno == EAGAIN)
            return 0;
        if (count >= 0 || errno != EINTR)
            return count < 0 ? -errno : -EIO;
    }
}

int protection_scan(const protection *p, uint64_t address, uint64_t nbytes, int protect, protection_visit visit,
                    void *context)
{
    page_region regions[REGIONS];
    pm_scan_arg arg = {.size = sizeof arg, .flags = protect ? SCAN_PROTECTS : 0, .start = address};
    arg.end = address + nbytes;
    arg.vec = (uint64_t)(uintptr_t)regions;
    arg.vec_len = REGIONS;
    arg.category_mask = arg.return_mask = IS_WRITTEN;
    while (arg.start < arg.end) {
        const int count = ioctl(p->pagemap, PAGEMAP_SCAN_CALL, &arg);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            return -errno;
        for (int i = 0; i < count; i++)
            visit(context, regions[i].start, regions[i].end);
        arg.start = arg.walk_end;
    }
    return 0;
}
