/* Preloaded into a program: each sync of a file takes SLOWER_SYNC_MS milliseconds longer, as on another disk. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <time.h>

static int slower(const char *name, int fd)
{
    int (*sync)(int);
    const char *given = getenv("SLOWER_SYNC_MS");
    double milliseconds = given == NULL ? 0 : strtod(given, NULL);
    struct timespec left = {(time_t)(milliseconds / 1000), 0};
    int result, error;

    *(void **)&sync = dlsym(RTLD_NEXT, name);
    result = sync(fd);
    error = errno;
    left.tv_nsec = (long)((milliseconds - 1000 * (double)left.tv_sec) * 1e6);
    while (nanosleep(&left, &left) != 0 && errno == EINTR) {
    }
    errno = error;
    return result;
}

int fsync(int fd)
{
    return slower("fsync", fd);
}

int fdatasync(int fd)
{
    return slower("fdatasync", fd);
}
