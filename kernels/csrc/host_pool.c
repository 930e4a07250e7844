/* Memory for torch's CUDAPluggableAllocator that lies on the host, pinned and mapped into the device's address space.
 *
 * Pages are taken from the system and registered with the driver piece by piece, so that a long wait shows progress. The
 * driver is found at run time: nothing but a C compiler is needed to build this. With unified addressing (every 64-bit
 * Linux) a registered page has the same address on the device. The system takes everything back when the process ends.
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

#define PORTABLE_AND_MAPPED (0x01 | 0x02) /* CU_MEMHOSTREGISTER_PORTABLE, CU_MEMHOSTREGISTER_DEVICEMAP */
#define PIECE ((size_t)1 << 30)

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t held;
static char error[256];

static void *driver(const char *name) {
  static void *library;
  if (!library) library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  return library ? dlsym(library, name) : NULL;
}

static void release(char *start, size_t registered, size_t size) {
  unregister_fn unregister = (unregister_fn)driver("cuMemHostUnregister");
  for (size_t at = 0; at < registered; at += PIECE) unregister(start + at);
  munmap(start, size);
}

/* The bytes that are held now. */
size_t rc_topk_host_pool_bytes(void) { return held; }

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
  char *start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) {
    snprintf(error, sizeof error, "the system has no %zd bytes of memory", size);
    return NULL;
  }
  madvise(start, size, MADV_HUGEPAGE); /* faster to pin; the system may decline */
  for (size_t at = 0; at < (size_t)size; at += PIECE) {
    size_t piece = (size_t)size - at < PIECE ? (size_t)size - at : PIECE;
    int code = reg(start + at, piece, PORTABLE_AND_MAPPED);
    if (code) {
      snprintf(error, sizeof error, "the driver could not pin bytes %zu to %zu of %zd (CUresult %d)", at, at + piece,
               size, code);
      release(start, at, size);
      return NULL;
    }
    if (at / PIECE % 16 == 15) fprintf(stderr, "rc_topk: pinned %zu of %zd GiB\n", (at >> 30) + 1, size >> 30);
  }
  pthread_mutex_lock(&lock);
  held += size;
  pthread_mutex_unlock(&lock);
  return start;
}

void rc_topk_host_pool_free(void *start, ssize_t size, int device, void *stream) {
  (void)device, (void)stream;
  release(start, size, size);
  pthread_mutex_lock(&lock);
  held -= size;
  pthread_mutex_unlock(&lock);
}
