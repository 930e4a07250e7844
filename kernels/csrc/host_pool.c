/* Memory for torch's CUDAPluggableAllocator that lies on the host, pinned and mapped into the device's address space.
 *
 * Pages are taken from the system by several threads, since clearing them is most of the wait, and then registered with
 * the driver in one piece, so that copies may cross any of it. The driver is found at run time: nothing but a C compiler
 * is needed to build this. With unified addressing (every 64-bit Linux) a registered page has the same address on the
 * device. The system takes everything back when the process ends.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/types.h>

typedef int (*register_fn)(void *, size_t, unsigned int);
typedef int (*unregister_fn)(void *);
typedef struct {
  char *start;
  size_t size;
} span;

#define PORTABLE_AND_MAPPED (0x01 | 0x02) /* CU_MEMHOSTREGISTER_PORTABLE, CU_MEMHOSTREGISTER_DEVICEMAP */
#define PAGE ((size_t)4096)
#define PIECE ((size_t)1 << 30) /* taken at a time */
#define THREADS 16
#define GIB(bytes) ((double)(bytes) / (1 << 30))

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t held, limit;
static char error[256];

static void *driver(const char *name) {
  static void *library;
  if (!library) library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  return library ? dlsym(library, name) : NULL;
}

static void *touch(void *of) {
  span s = *(span *)of;
  for (size_t at = 0; at < s.size; at += PAGE) ((volatile char *)s.start)[at] = 0;
  return NULL;
}

static void touch_by_all(char *start, size_t size) {
  pthread_t threads[THREADS];
  span spans[THREADS];
  size_t share = (size / THREADS / PAGE + 1) * PAGE;
  int running = 0;
  for (size_t at = 0; at < size; at += share) {
    span s = {start + at, size - at < share ? size - at : share};
    spans[running] = s;
    if (pthread_create(&threads[running], NULL, touch, &spans[running]))
      touch(&s);
    else
      running++;
  }
  while (running) pthread_join(threads[--running], NULL);
}

/* The bytes that are held now. */
size_t rc_topk_host_pool_bytes(void) { return held; }

/* Hold at most so many bytes from now on; 0 at first. Pinned memory cannot be swapped: whoever calls knows what is left. */
void rc_topk_host_pool_limit(size_t bytes) { limit = bytes; }

/* Why the last allocation failed; empty if none did. */
const char *rc_topk_host_pool_error(void) { return error; }

/* NULL, and the reason in rc_topk_host_pool_error, if there is not that much. */
void *rc_topk_host_pool_alloc(ssize_t size, int device, void *stream) {
  (void)device, (void)stream;
  register_fn reg = (register_fn)driver("cuMemHostRegister_v2");
  if (!reg) {
    snprintf(error, sizeof error, "libcuda.so.1 has no cuMemHostRegister: %s", dlerror());
    return NULL;
  }
  if (held + size > limit) {
    snprintf(error, sizeof error, "%.1f GiB are wanted on top of %.1f, and the host can spare %.1f in all", GIB(size),
             GIB(held), GIB(limit));
    return NULL;
  }
  char *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) {
    snprintf(error, sizeof error, "the system has no %zd bytes of memory", size);
    return NULL;
  }
  madvise(start, size, MADV_HUGEPAGE); /* faster to pin; the system may decline */
  for (size_t at = 0; at < (size_t)size; at += PIECE) {
    touch_by_all(start + at, (size_t)size - at < PIECE ? (size_t)size - at : PIECE);
    if (at / PIECE % 16 == 15) fprintf(stderr, "rc_topk: %zu of %.1f GiB taken\n", at / PIECE + 1, GIB(size));
  }
  int code = reg(start, size, PORTABLE_AND_MAPPED);
  if (code) {
    snprintf(error, sizeof error, "the driver could not pin %zd bytes (CUresult %d)", size, code);
    munmap(start, size);
    return NULL;
  }
  madvise(start, size, MADV_DONTFORK); /* a child would be given a copy of all of it */
  pthread_mutex_lock(&lock);
  held += size;
  pthread_mutex_unlock(&lock);
  return start;
}

void rc_topk_host_pool_free(void *start, ssize_t size, int device, void *stream) {
  (void)device, (void)stream;
  ((unregister_fn)driver("cuMemHostUnregister"))(start);
  munmap(start, size);
  pthread_mutex_lock(&lock);
  held -= size;
  pthread_mutex_unlock(&lock);
}
