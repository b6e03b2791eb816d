/* A few threads that share the parts of a task. */
#ifndef PI_SYSTEM_RINGCONV_POOL_H
#define PI_SYSTEM_RINGCONV_POOL_H

enum { POOL_MOST = 64 };

/* Must be prepared for any `parts` >= 1; the parts run at once, in any order. */
typedef void pool_task(void *context, int part, int parts);

/* Up to `threads` threads, the caller among them, until pool_give; 1 while others have the pool or
 * where no thread can be had. Threads are started when first wanted, and kept. */
int pool_take(int threads);

/* Run all `parts` parts (at most what pool_take gave), one of them here; returns after the last. */
void pool_run(int parts, pool_task *task, void *context);

void pool_give(int threads);

#endif
