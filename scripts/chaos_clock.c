/* A wall clock that jumps: preloaded, it adds the seconds in the file LOCKSTEP_CHAOS_CLOCK (one int64) to
   CLOCK_REALTIME. CLOCK_MONOTONIC stays, as it does when an administrator or NTP sets the clock. Deadlines on the
   wall clock are given to the kernel on its own clock.

       cc -shared -fPIC -o clock.so chaos_clock.c */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const int64_t none;
static const volatile int64_t *jump = &none;

__attribute__((constructor)) static void find_file(void) {
    const char *path = getenv("LOCKSTEP_CHAOS_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *shared = mmap(NULL, sizeof *jump, PROT_READ, MAP_SHARED, file, 0);
    if (shared != MAP_FAILED) jump = shared;
    close(file);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += *jump;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int failed = syscall(SYS_gettimeofday, now, zone);
    if (!failed && now) now->tv_sec += *jump;
    return failed;
}

time_t time(time_t *now) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (now) *now = found.tv_sec;
    return found.tv_sec;
}

/* A deadline may be on either clock; the machine has not been up for thirty years. */
static struct timespec on_kernel_clock(const struct timespec *deadline) {
    struct timespec own = *deadline;
    if (own.tv_sec > 1000000000) own.tv_sec -= *jump;
    if (own.tv_sec < 0) own.tv_sec = 0;
    return own;
}

int pthread_cond_timedwait(pthread_cond_t *restrict condition, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict deadline) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    if (!real) *(void **)&real = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    struct timespec own = on_kernel_clock(deadline);
    return real(condition, mutex, &own);
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict deadline) {
    static int (*real)(sem_t *, const struct timespec *);
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec own = on_kernel_clock(deadline);
    return real(semaphore, &own);
}

int sem_clockwait(sem_t *restrict semaphore, clockid_t clock, const struct timespec *restrict deadline) {
    static int (*real)(sem_t *, clockid_t, const struct timespec *);
    if (!real) *(void **)&real = dlsym(RTLD_NEXT, "sem_clockwait");
    struct timespec own = on_kernel_clock(deadline);
    return real(semaphore, clock, clock == CLOCK_REALTIME ? &own : deadline);
}
