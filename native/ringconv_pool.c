/* One pool for the process. Its threads wait for a new `turn`: spinning for some microseconds, as
 * the tasks of a convolution follow each other closely, then asleep. Every thread takes notice of
 * every turn, also of those that have no part for it. After a fork the child has none of the
 * threads and begins anew. */
#define _GNU_SOURCE
#include "ringconv_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>

enum { SPINS = 4000 };

static pthread_mutex_t owner = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t asleep = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static atomic_uint turn;
static atomic_int left, sleepers;
static int workers; /* belongs to the owner, like the following */
static int parts_now;
static pool_task *task_now;
static void *context_now;
static unsigned first_turn[POOL_MOST];

static void relax(int spins)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (spins > SPINS)
        sched_yield();
}

static void *work(void *argument)
{
    unsigned *start = argument, seen = *start;
    int part = (int)(start - first_turn) + 1;
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load(&turn) == seen; i++)
            relax(0);
        if (atomic_load(&turn) == seen) {
            pthread_mutex_lock(&asleep);
            atomic_fetch_add(&sleepers, 1);
            while (atomic_load(&turn) == seen)
                pthread_cond_wait(&wake, &asleep);
            atomic_fetch_sub(&sleepers, 1);
            pthread_mutex_unlock(&asleep);
        }
        seen++;
        if (part < parts_now)
            task_now(context_now, part, parts_now);
        atomic_fetch_sub(&left, 1);
    }
    return NULL;
}

static void begin_anew(void)
{
    pthread_mutex_init(&owner, NULL);
    pthread_mutex_init(&asleep, NULL);
    pthread_cond_init(&wake, NULL);
    atomic_store(&left, 0);
    atomic_store(&sleepers, 0);
    workers = 0;
}

/* Signals are for the threads that were there before. */
static void start_workers(int count)
{
    static bool registered;
    sigset_t all, before;
    if (!registered)
        registered = pthread_atfork(NULL, NULL, begin_anew) == 0;
    if (!registered)
        return;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (; workers < count; workers++) {
        pthread_t thread;
        first_turn[workers] = atomic_load(&turn);
        if (pthread_create(&thread, NULL, work, &first_turn[workers]))
            break;
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

int pool_take(int threads)
{
    if (threads <= 1 || pthread_mutex_trylock(&owner))
        return 1;
    threads = threads > POOL_MOST ? POOL_MOST : threads;
    if (workers < threads - 1)
        start_workers(threads - 1);
    if (workers == 0) {
        pthread_mutex_unlock(&owner);
        return 1;
    }
    return workers < threads - 1 ? workers + 1 : threads;
}

void pool_run(int parts, pool_task *task, void *context)
{
    if (parts == 1) {
        task(context, 0, 1);
        return;
    }
    parts_now = parts;
    task_now = task;
    context_now = context;
    atomic_store(&left, workers);
    atomic_fetch_add(&turn, 1);
    if (atomic_load(&sleepers)) {
        pthread_mutex_lock(&asleep);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&asleep);
    }
    task(context, 0, parts);
    for (int spins = 0; atomic_load(&left); spins++)
        relax(spins);
}

void pool_give(int threads)
{
    if (threads > 1)
        pthread_mutex_unlock(&owner);
}
