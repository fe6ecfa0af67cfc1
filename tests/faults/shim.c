/* Faults at the n-th operation on the files below a folder, for `LD_PRELOAD`.
 *
 * An operation is an open, write, fsync, truncation, rename, unlink, mkdir or rmdir of the process that called
 * `faults_arm`. At the `at`-th one, counted from 1, happens what `action` says; with 0 nothing, and `faults_count` tells
 * how many there were. With a log, each is a line "number kind path".
 *
 * What a power loss leaves is modelled from what was synced. The content that a file got since its last fsync is cut
 * off, or zeros; and what was renamed or removed since the last fsync of the folder may not have been.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, KILL, NO_SPACE, IO_ERROR, NO_ACCESS, QUOTA, SHORT, LOST_NAMES, ZEROS, CUT, TERMINATE, HANG_UP, INTERRUPT };
enum { OPEN = 1, CREATE = 2, WRITE = 4, SYNC = 8, TRUNCATE = 16, RENAME = 32, REMOVE = 64, MAKE = 128 };
#define TAKES_SPACE (CREATE | WRITE | MAKE)
#define TAKES_RIGHTS (OPEN | CREATE | RENAME | REMOVE | MAKE)
#define FDS 65536
#define MOST 20000

static char under[PATH_MAX], side[256];
static long at, count;
static int action, done, log_fd = -1;
static unsigned char watched[FDS];
static struct { dev_t device; ino_t inode; off_t synced; int dirty; } files[MOST];
static int file_count;
static struct { int kind, open; char from[512], to[512], kept[512]; } names[MOST];
static int name_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name, type, ...) \
    static type (*real_##name)(__VA_ARGS__); \
    if (!real_##name) *(void **)&real_##name = dlsym(RTLD_NEXT, #name)

void faults_arm(const char *folder, long number, int what, const char *kept, const char *log) {
    memset(watched, 0, sizeof watched);
    count = done = file_count = name_count = 0;
    snprintf(side, sizeof side, "%s", kept);
    at = number; action = what;
    if (log_fd >= 0) close(log_fd);
    log_fd = *log ? open(log, O_WRONLY | O_CREAT | O_TRUNC, 0644) : -1;
    snprintf(under, sizeof under, "%s", folder);
}

long faults_count(void) { return count; }

/* The absolute path of `path` as seen from the folder `dir`; 1 if it lies below `under`. */
static int below(int dir, const char *path, char *found) {
    if (!*under || !path) return 0;
    if (*path == '/') snprintf(found, PATH_MAX, "%s", path);
    else {
        char start[PATH_MAX], link[64];
        if (dir == AT_FDCWD) { if (!getcwd(start, sizeof start)) return 0; }
        else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
            ssize_t length = readlink(link, start, sizeof start - 1);
            if (length < 0) return 0;
            start[length] = 0;
        }
        if (snprintf(found, PATH_MAX, "%s/%s", start, path) >= PATH_MAX) return 0;
    }
    size_t length = strlen(under);
    return !strncmp(found, under, length) && (found[length] == '/' || !found[length]);
}

static int of_fd(int fd, char *found) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, found, PATH_MAX - 1);
    found[length < 0 ? 0 : length] = 0;
    return length;
}

static int is_watched(int fd) {
    struct stat info;
    return *under && fd >= 0 && fd < FDS && watched[fd] && !fstat(fd, &info)
           && (S_ISREG(info.st_mode) || S_ISDIR(info.st_mode));
}

static int entry(struct stat *info, off_t synced) {
    for (int i = 0; i < file_count; i++)
        if (files[i].inode == info->st_ino && files[i].device == info->st_dev) return i;
    if (file_count == MOST) abort();
    files[file_count].inode = info->st_ino; files[file_count].device = info->st_dev;
    files[file_count].synced = synced; files[file_count].dirty = 0;
    return file_count++;
}

static int spoil(const char *path, const struct stat *info, int flag, struct FTW *walk) {
    if (flag != FTW_F) return 0;
    for (int i = 0; i < file_count; i++) {
        if (files[i].inode != info->st_ino || files[i].device != info->st_dev || !files[i].dirty) continue;
        if (action == ZEROS) { truncate(path, files[i].synced); truncate(path, info->st_size); }
        else truncate(path, files[i].synced < info->st_size ? files[i].synced : info->st_size);
    }
    return 0;
}

static void lose_power(void) {
    char folder[PATH_MAX];
    int what = action;
    snprintf(folder, sizeof folder, "%s", under);
    *under = 0; /* from here on nothing is watched */
    if (what == LOST_NAMES)
        for (int i = name_count - 1; i >= 0; i--) {
            if (!names[i].open) continue;
            if (names[i].kind == RENAME) {
                rename(names[i].to, names[i].from);
                if (*names[i].kept) rename(names[i].kept, names[i].to);
            } else if (*names[i].kept) rename(names[i].kept, names[i].from);
            else mkdir(names[i].from, 0777);
        }
    nftw(folder, spoil, 32, FTW_PHYS);
    kill(getpid(), SIGKILL);
}

/* Count an operation; what to fail with, 0 to go on, -1 for a short write. */
static int step(int kind, const char *name, const char *path) {
    int result = 0;
    pthread_mutex_lock(&lock);
    count++;
    if (log_fd >= 0) dprintf(log_fd, "%ld %s %s\n", count, name, path);
    if (at && count >= at) {
        int here = action;
        int sticky = here == NO_SPACE || here == QUOTA;
        int fits = here == NO_ACCESS ? kind & TAKES_RIGHTS : sticky ? kind & TAKES_SPACE : here == SHORT ? kind & WRITE : 1;
        if (fits && (sticky || !done)) {
            done = 1;
            if (here == KILL) kill(getpid(), SIGKILL);
            if (here >= LOST_NAMES && here <= CUT) lose_power();
            if (here >= TERMINATE) kill(getpid(), here == TERMINATE ? SIGTERM : here == HANG_UP ? SIGHUP : SIGINT);
            result = here == NO_SPACE ? ENOSPC : here == QUOTA ? EDQUOT : here == NO_ACCESS ? EACCES : here == IO_ERROR ? EIO : here == SHORT ? -1 : 0;
        }
    }
    pthread_mutex_unlock(&lock);
    return result;
}
#define TRY(kind, name, path) do { int failed = step(kind, name, path); if (failed > 0) { errno = failed; return -1; } } while (0)

static int opened(int fd, int flags) {
    struct stat info;
    if (fd >= 0 && fd < FDS) watched[fd] = 1;
    if (fd >= 0 && (flags & O_ACCMODE) != O_RDONLY && !fstat(fd, &info) && S_ISREG(info.st_mode)) {
        int i = entry(&info, info.st_size);
        if (flags & O_TRUNC || !info.st_size) { files[i].synced = 0; files[i].dirty = 1; }
    }
    return fd;
}

static int open_at(int (*real)(int, const char *, int, ...), int dir, const char *path, int flags, mode_t mode) {
    char found[PATH_MAX];
    if (!below(dir, path, found)) {
        int fd = real(dir, path, flags, mode);
        if (fd >= 0 && fd < FDS) watched[fd] = 0;
        return fd;
    }
    TRY(flags & O_CREAT ? CREATE : OPEN, flags & O_CREAT ? "create" : "open", found);
    return opened(real(dir, path, flags, mode), flags);
}
#define OPENER(name) \
    int name(const char *path, int flags, ...) { \
        REAL(openat, int, int, const char *, int, ...); \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        return open_at(real_openat, AT_FDCWD, path, flags, mode); }
OPENER(open)
OPENER(open64)
#define OPENER_AT(name) \
    int name(int dir, const char *path, int flags, ...) { \
        REAL(name, int, int, const char *, int, ...); \
        va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
        return open_at(real_##name, dir, path, flags, mode); }
OPENER_AT(openat)
OPENER_AT(openat64)

static FILE *open_stream(FILE *(*real)(const char *, const char *), const char *path, const char *mode) {
    char found[PATH_MAX];
    if (!below(AT_FDCWD, path, found)) return real(path, mode);
    int writes = strpbrk(mode, "wa+") != NULL, failed = step(writes ? CREATE : OPEN, writes ? "create" : "open", found);
    if (failed > 0) { errno = failed; return NULL; }
    FILE *stream = real(path, mode);
    if (stream) opened(fileno(stream), *mode == 'w' ? O_WRONLY | O_TRUNC : writes ? O_WRONLY : O_RDONLY);
    return stream;
}
FILE *fopen(const char *path, const char *mode) { REAL(fopen, FILE *, const char *, const char *); return open_stream(real_fopen, path, mode); }
FILE *fopen64(const char *path, const char *mode) { REAL(fopen64, FILE *, const char *, const char *); return open_stream(real_fopen64, path, mode); }

static int before_write(int fd) {
    char path[PATH_MAX];
    struct stat info;
    of_fd(fd, path);
    int failed = step(WRITE, "write", path);
    if (failed <= 0 && !fstat(fd, &info)) files[entry(&info, info.st_size)].dirty = 1;
    return failed;
}
#define WRITER(name, params, all, half, ...) \
    ssize_t name params { \
        REAL(name, ssize_t, __VA_ARGS__); \
        int failed = is_watched(fd) ? before_write(fd) : 0; \
        if (failed > 0) { errno = failed; return -1; } \
        return failed ? real_##name half : real_##name all; }
WRITER(write, (int fd, const void *data, size_t size), (fd, data, size), (fd, data, (size + 1) / 2), int, const void *, size_t)
WRITER(pwrite, (int fd, const void *data, size_t size, off_t place), (fd, data, size, place), (fd, data, (size + 1) / 2, place), int, const void *, size_t, off_t)
WRITER(pwrite64, (int fd, const void *data, size_t size, off64_t place), (fd, data, size, place), (fd, data, (size + 1) / 2, place), int, const void *, size_t, off64_t)
WRITER(writev, (int fd, const struct iovec *parts, int number), (fd, parts, number), (fd, parts, 1), int, const struct iovec *, int)
WRITER(sendfile, (int fd, int from, off_t *place, size_t size), (fd, from, place, size), (fd, from, place, (size + 1) / 2), int, int, off_t *, size_t)
WRITER(sendfile64, (int fd, int from, off64_t *place, size_t size), (fd, from, place, size), (fd, from, place, (size + 1) / 2), int, int, off64_t *, size_t)

size_t fwrite(const void *data, size_t size, size_t number, FILE *stream) { /* of numpy: glibc's own write is not seen */
    REAL(fwrite, size_t, const void *, size_t, size_t, FILE *);
    int failed = is_watched(fileno(stream)) ? before_write(fileno(stream)) : 0;
    if (failed > 0) { errno = failed; return 0; }
    return real_fwrite(data, size, number, stream);
}

static int synced(int fd, int (*real)(int)) {
    char path[PATH_MAX];
    struct stat info;
    if (!is_watched(fd)) return real(fd);
    of_fd(fd, path);
    TRY(SYNC, "fsync", path);
    if (fstat(fd, &info)) return real(fd);
    if (S_ISDIR(info.st_mode)) {
        for (int i = 0; i < name_count; i++)
            for (int end = 0; end < 2; end++) {
                const char *name = end ? names[i].to : names[i].from;
                size_t length = strrchr(name, '/') ? strrchr(name, '/') - name : 0;
                if (length == strlen(path) && !strncmp(name, path, length)) names[i].open = 0;
            }
    } else {
        int i = entry(&info, info.st_size);
        files[i].synced = info.st_size; files[i].dirty = 0;
    }
    return 0; /* the disk of the machine itself is left alone */
}
int fsync(int fd) { REAL(fsync, int, int); return synced(fd, real_fsync); }
int fdatasync(int fd) { REAL(fdatasync, int, int); return synced(fd, real_fdatasync); }

static int truncated(int fd, off_t size, int (*real)(int, off_t)) {
    char path[PATH_MAX];
    struct stat info;
    if (!is_watched(fd)) return real(fd, size);
    of_fd(fd, path);
    TRY(TRUNCATE, "truncate", path);
    if (!fstat(fd, &info)) {
        int i = entry(&info, info.st_size);
        files[i].dirty = 1;
        if (size < files[i].synced) files[i].synced = size;
    }
    return real(fd, size);
}
int ftruncate(int fd, off_t size) { REAL(ftruncate, int, int, off_t); return truncated(fd, size, real_ftruncate); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64, int, int, off64_t); return truncated(fd, size, real_ftruncate64); }

/* Remember a change of names, with a link to the file that it takes the name from. */
static void note(int kind, const char *from, const char *to, const char *lost) {
    struct stat info;
    if (action != LOST_NAMES) return;
    if (name_count == MOST) abort();
    names[name_count].kind = kind; names[name_count].open = 1; *names[name_count].kept = 0;
    snprintf(names[name_count].from, 512, "%s", from);
    snprintf(names[name_count].to, 512, "%s", to);
    if (!lstat(lost, &info) && S_ISREG(info.st_mode)) {
        snprintf(names[name_count].kept, 512, "%s/%d", side, name_count);
        if (link(lost, names[name_count].kept)) *names[name_count].kept = 0;
    }
    name_count++;
}

int renameat2(int from_dir, const char *from, int to_dir, const char *to, unsigned int flags) {
    REAL(renameat2, int, int, const char *, int, const char *, unsigned int);
    char old[PATH_MAX], new[PATH_MAX];
    int here = below(from_dir, from, old) | below(to_dir, to, new);
    if (!here) return real_renameat2(from_dir, from, to_dir, to, flags);
    TRY(RENAME, "rename", new);
    note(RENAME, old, new, new);
    return real_renameat2(from_dir, from, to_dir, to, flags);
}
int renameat(int from_dir, const char *from, int to_dir, const char *to) { return renameat2(from_dir, from, to_dir, to, 0); }
int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }

int unlinkat(int dir, const char *path, int flags) {
    REAL(unlinkat, int, int, const char *, int);
    char found[PATH_MAX];
    if (!below(dir, path, found)) return real_unlinkat(dir, path, flags);
    TRY(REMOVE, flags & AT_REMOVEDIR ? "rmdir" : "unlink", found);
    struct stat info;
    if (!lstat(found, &info)) note(REMOVE, found, "", found);
    return real_unlinkat(dir, path, flags);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int dir, const char *path, mode_t mode) {
    REAL(mkdirat, int, int, const char *, mode_t);
    char found[PATH_MAX];
    if (!below(dir, path, found)) return real_mkdirat(dir, path, mode);
    TRY(MAKE, "mkdir", found);
    return real_mkdirat(dir, path, mode);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
