/* Preloaded (LD_PRELOAD) into a process under test: its N-th change to the file system kills it or fails.
 *
 * It counts the calls that change something at a path below the armed root: opening for writing, making directories,
 * writing, syncing, renaming and removing, from Python and from C++ libraries alike. `faults_arm` is called by ctypes.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static atomic_int armed, count, at, lasting, error_number;

/* Call `nth` (from 1) fails with errno `error`; if error is 0, it kills the process. lasts: all later calls do too. */
void faults_arm(const char *directory, int nth, int error, int lasts) {
    strncpy(root, directory, sizeof root - 1);
    count = 0;
    at = nth;
    error_number = error;
    lasting = lasts;
    armed = 1;
}

/* Returns how many calls were counted. */
int faults_disarm(void) {
    armed = 0;
    return count;
}

static int faulty(const char *path) {
    if (!armed || strncmp(path, root, strlen(root)) != 0) return 0;
    int number = ++count;
    if (number != at && !(lasting && at > 0 && number > at)) return 0;
    if (error_number == 0) kill(getpid(), SIGKILL);
    errno = error_number;
    return 1;
}

static int faulty_file(int file) {
    char link[64], path[PATH_MAX];
    if (!armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return faulty(path);
}

/* Python's rmtree works with names below an open directory. */
static int faulty_at(int directory, const char *path) {
    return path[0] == '/' || directory == AT_FDCWD ? faulty(path) : faulty_file(directory);
}

/* Removing works on a full disk: such calls can kill the process, but they do not fail. */
static int killed(int directory, const char *path) {
    return error_number == 0 && faulty_at(directory, path);
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define WRAP(type, name, parameters, test, arguments) \
    type name parameters { REAL(name); return (test) ? -1 : real arguments; }

WRAP(ssize_t, write, (int f, const void *b, size_t n), faulty_file(f), (f, b, n))
WRAP(ssize_t, pwrite, (int f, const void *b, size_t n, off_t o), faulty_file(f), (f, b, n, o))
WRAP(ssize_t, pwrite64, (int f, const void *b, size_t n, off64_t o), faulty_file(f), (f, b, n, o))
WRAP(ssize_t, writev, (int f, const struct iovec *v, int n), faulty_file(f), (f, v, n))
WRAP(int, fsync, (int f), faulty_file(f), (f))
WRAP(int, fdatasync, (int f), faulty_file(f), (f))
WRAP(int, ftruncate, (int f, off_t n), faulty_file(f), (f, n))
WRAP(int, mkdir, (const char *p, mode_t m), faulty(p), (p, m))
WRAP(int, rmdir, (const char *p), killed(AT_FDCWD, p), (p))
WRAP(int, unlink, (const char *p), killed(AT_FDCWD, p), (p))
WRAP(int, unlinkat, (int d, const char *p, int f), killed(d, p), (d, p, f))
WRAP(int, rename, (const char *a, const char *b), faulty(b), (a, b))
WRAP(int, renameat, (int d, const char *a, int e, const char *b), faulty(b), (d, a, e, b))
WRAP(int, renameat2, (int d, const char *a, int e, const char *b, unsigned f), faulty(b), (d, a, e, b, f))

#define OPEN(name, parameters, arguments, test) \
    int name parameters { \
        REAL(name); \
        mode_t mode = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); } \
        if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && (test)) return -1; \
        return real arguments; \
    }
OPEN(open, (const char *path, int flags, ...), (path, flags, mode), faulty(path))
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), faulty(path))
OPEN(openat, (int d, const char *path, int flags, ...), (d, path, flags, mode), faulty_at(d, path))
OPEN(openat64, (int d, const char *path, int flags, ...), (d, path, flags, mode), faulty_at(d, path))
