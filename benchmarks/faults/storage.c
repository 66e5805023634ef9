/* A preloaded library: the n-th file-system call of an armed stretch fails, or is the last thing the process does.

   A killed write has written half of its bytes, so that torn files occur too. Standard input, output and error pass. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, SYNC = 2, NAME = 4, OPEN = 8, KILL = -1 };

static long armed, calls, at, forever;
static int kinds, answer;

void faults_arm(long which, int error, int mask, int stays) {
    calls = 0, at = which, answer = error, kinds = mask, forever = stays, armed = 1;
}
long faults_disarm(void) {
    armed = 0;
    return calls;
}

/* 1: this call is to be killed; -1: it fails, errno is set; 0: it passes. */
static int due(int kind) {
    if (!armed || !(kinds & kind)) return 0;
    long number = __sync_add_and_fetch(&calls, 1);
    if (number != at && !(forever && number > at)) return 0;
    if (answer == KILL) return 1;
    errno = answer;
    return -1;
}
static void end(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define CHANGES(kind, type, name, params, args, ...) \
    type name params { \
        REAL(type, #name, __VA_ARGS__); \
        int hit = due(kind); \
        if (hit > 0) end(); \
        return hit < 0 ? -1 : real args; \
    }

#define WRITES(name, params, args, half, ...) \
    ssize_t name params { \
        REAL(ssize_t, #name, __VA_ARGS__); \
        int hit = fd > 2 ? due(WRITE) : 0; \
        if (hit > 0) { \
            if (real half) {} \
            end(); \
        } \
        return hit < 0 ? -1 : real args; \
    }

WRITES(write, (int fd, const void *b, size_t n), (fd, b, n), (fd, b, n / 2), int, const void *, size_t)
WRITES(pwrite, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o), (fd, b, n / 2, o), int, const void *, size_t, off_t)
WRITES(pwrite64, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o), (fd, b, n / 2, o), int, const void *, size_t, off64_t)
WRITES(writev, (int fd, const struct iovec *v, int n), (fd, v, n), (fd, v, n / 2), int, const struct iovec *, int)
CHANGES(SYNC, int, fsync, (int fd), (fd), int)
CHANGES(SYNC, int, fdatasync, (int fd), (fd), int)
CHANGES(NAME, int, rename, (const char *a, const char *b), (a, b), const char *, const char *)
CHANGES(NAME, int, renameat, (int f, const char *a, int g, const char *b), (f, a, g, b), int, const char *, int, const char *)
CHANGES(NAME, int, renameat2, (int f, const char *a, int g, const char *b, unsigned m), (f, a, g, b, m), int, const char *, int, const char *, unsigned)
CHANGES(NAME, int, link, (const char *a, const char *b), (a, b), const char *, const char *)
CHANGES(NAME, int, linkat, (int f, const char *a, int g, const char *b, int m), (f, a, g, b, m), int, const char *, int, const char *, int)
CHANGES(NAME, int, unlink, (const char *a), (a), const char *)
CHANGES(NAME, int, unlinkat, (int f, const char *a, int m), (f, a, m), int, const char *, int)
CHANGES(NAME, int, rmdir, (const char *a), (a), const char *)
CHANGES(NAME, int, mkdir, (const char *a, mode_t m), (a, m), const char *, mode_t)
CHANGES(NAME, int, mkdirat, (int f, const char *a, mode_t m), (f, a, m), int, const char *, mode_t)
CHANGES(NAME, int, ftruncate, (int fd, off_t n), (fd, n), int, off_t)
CHANGES(NAME, int, ftruncate64, (int fd, off64_t n), (fd, n), int, off64_t)

#define OPENS(name, before, given, ...) \
    int name(before const char *path, int flags, ...) { \
        REAL(int, #name, __VA_ARGS__, int, mode_t); \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        int hit = flags & (O_WRONLY | O_RDWR | O_CREAT) ? due(OPEN) : 0; \
        if (hit > 0) end(); \
        return hit < 0 ? -1 : real(given path, flags, mode); \
    }
#define COMMA ,
OPENS(open, , , const char *)
OPENS(open64, , , const char *)
OPENS(openat, int f COMMA, f COMMA, int, const char *)
OPENS(openat64, int f COMMA, f COMMA, int, const char *)
