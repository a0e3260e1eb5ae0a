// A disk that is full: from the call number FULL_FROM on, FULL_COUNT calls that would take room below the directory FULL_BELOW fail with
// ENOSPC; of the first, if it writes, half gets there. How many calls there were is written to FULL_TOLD. See full_disk.py.
//
//     cc -shared -fPIC -O1 -o full_disk.so full_disk.c -ldl        LD_PRELOAD=./full_disk.so homeroom ...

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls;
static long from, count;
static const char *below;

__attribute__((constructor)) static void begin(void) {
    below = getenv("FULL_BELOW");
    from = getenv("FULL_FROM") ? atol(getenv("FULL_FROM")) : -1;
    count = getenv("FULL_COUNT") ? atol(getenv("FULL_COUNT")) : 0;
}

__attribute__((destructor)) static void end(void) {
    const char *told = getenv("FULL_TOLD");
    FILE *file = told ? fopen(told, "w") : NULL;
    if (!file) return;
    below = NULL;
    fprintf(file, "%ld\n", atomic_load(&calls));
    fclose(file);
}

// 0: there is room; 1: the first call that finds none; 2: a later one.
static int full(void) {
    long call = atomic_fetch_add(&calls, 1);
    if (from < 0 || call < from || call >= from + count) return 0;
    return call == from ? 1 : 2;
}

static int is_below(const char *path) {
    if (!below || !path) return 0;
    return path[0] != '/' || strncmp(path, below, strlen(below)) == 0;
}

static int is_fd_below(int fd) {
    char link[64], path[4096];
    if (!below || fd < 3) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0 || path[0] != '/') return 0;
    path[length] = 0;
    return is_below(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define REFUSE return errno = ENOSPC, -1

ssize_t write(int fd, const void *bytes, size_t length) {
    int how = is_fd_below(fd) ? full() : 0;
    if (how == 2 || (how == 1 && length < 2)) REFUSE;
    return REAL(write)(fd, bytes, how == 1 ? length / 2 : length);
}

ssize_t writev(int fd, const struct iovec *parts, int number) {
    if (is_fd_below(fd) && full()) REFUSE;
    return REAL(writev)(fd, parts, number);
}

int fsync(int fd) {
    if (is_fd_below(fd) && full()) REFUSE;
    return REAL(fsync)(fd);
}

int fdatasync(int fd) {
    if (is_fd_below(fd) && full()) REFUSE;
    return REAL(fdatasync)(fd);
}

int rename(const char *old, const char *new) {
    if (is_below(new) && full()) REFUSE;
    return REAL(rename)(old, new);
}

int mkdir(const char *path, mode_t mode) {
    if (is_below(path) && full()) REFUSE;
    return REAL(mkdir)(path, mode);
}

int linkat(int a, const char *old, int b, const char *new, int flags) {
    if (is_below(new) && full()) REFUSE;
    return REAL(linkat)(a, old, b, new, flags);
}

// One that is there already takes no room.
#define OPEN(name)                                                        \
    int name(const char *path, int flags, ...) {                          \
        va_list more;                                                     \
        va_start(more, flags);                                            \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more);                                                     \
        if (flags & O_CREAT && is_below(path) && access(path, F_OK) && full()) REFUSE; \
        return REAL(name)(path, flags, mode);                             \
    }
OPEN(open)
OPEN(open64)
