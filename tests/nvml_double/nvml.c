/* A libnvidia-ml.so.1 that tells of GPUs from a text file ($NVML_DOUBLE), read anew at every call:
 *
 *   init CODE            what nvmlInit returns (0 is success)
 *   memory-v2 CODE       what nvmlDeviceGetMemoryInfo_v2 returns, if not success
 *   hangs init|memory    the call that sleeps for a minute
 *   gpu UUID TOTAL RESERVED USED MIG HANDLE-CODE MEMORY-CODE NAME...
 *
 * Sizes are in MiB. After nvmlShutdown every call answers "uninitialized", as the real one does.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, MOST = 16 };
static const unsigned long long MIB = 1024ULL * 1024ULL;

typedef struct { char uuid[80], name[80]; unsigned long long total, reserved, used; int mig, handle, memory; } gpu_t;
typedef struct { int init, memory_v2, hang_init, hang_memory, count; gpu_t gpus[MOST]; } facts_t;
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } memory_v2_t;

static int opened;

static facts_t facts(void) {
  facts_t told;
  char line[512], word[32];
  memset(&told, 0, sizeof told);
  FILE *file = fopen(getenv("NVML_DOUBLE"), "r");
  while (file && fgets(line, sizeof line, file)) {
    gpu_t *gpu = &told.gpus[told.count];
    sscanf(line, "init %d", &told.init);
    sscanf(line, "memory-v2 %d", &told.memory_v2);
    if (sscanf(line, "hangs %31s", word) == 1) *(strcmp(word, "init") ? &told.hang_memory : &told.hang_init) = 1;
    if (told.count < MOST && sscanf(line, "gpu %79s %llu %llu %llu %d %d %d %79[^\n]", gpu->uuid, &gpu->total,
        &gpu->reserved, &gpu->used, &gpu->mig, &gpu->handle, &gpu->memory, gpu->name) == 8) told.count++;
  }
  if (file) fclose(file);
  return told;
}

/* A handle is a number above 0: the place of the GPU in the file. */
static gpu_t gpu_of(void *handle) { return facts().gpus[(size_t)handle - 1]; }

int nvmlInitWithFlags(unsigned int flags) {
  facts_t told = facts();
  (void)flags;
  if (told.hang_init) sleep(60);
  opened += told.init == SUCCESS;
  return told.init;
}

int nvmlShutdown(void) {
  if (!opened) return UNINITIALIZED;
  opened--;
  fprintf(stderr, "nvmlShutdown\n");
  return SUCCESS;
}

const char *nvmlErrorString(int code) { (void)code; return "an error of the double"; }

int nvmlDeviceGetCount_v2(unsigned int *count) {
  *count = facts().count;
  return opened ? SUCCESS : UNINITIALIZED;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **handle) {
  facts_t told = facts();
  if (!opened) return UNINITIALIZED;
  if (index >= (unsigned int)told.count) return INVALID;
  *handle = (void *)(size_t)(index + 1);
  return told.gpus[index].handle;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
  facts_t told = facts();
  for (int index = 0; opened && index < told.count; index++)
    if (!strcmp(told.gpus[index].uuid, uuid)) return nvmlDeviceGetHandleByIndex_v2(index, handle);
  return opened ? NOT_FOUND : UNINITIALIZED;
}

static int text(const char *words, char *buffer, unsigned int length) {
  snprintf(buffer, length, "%s", words);
  return opened ? SUCCESS : UNINITIALIZED;
}

int nvmlDeviceGetUUID(void *handle, char *buffer, unsigned int length) {
  return text(gpu_of(handle).uuid, buffer, length);
}

int nvmlDeviceGetName(void *handle, char *buffer, unsigned int length) {
  return text(gpu_of(handle).name, buffer, length);
}

int nvmlDeviceGetMigMode(void *handle, unsigned int *current, unsigned int *pending) {
  *current = *pending = gpu_of(handle).mig > 0;
  return gpu_of(handle).mig < 0 ? NOT_SUPPORTED : SUCCESS;
}

static int memory_of(void *handle, gpu_t *gpu) {
  *gpu = gpu_of(handle);
  if (facts().hang_memory) sleep(60);
  return opened ? gpu->memory : UNINITIALIZED;
}

int nvmlDeviceGetMemoryInfo(void *handle, memory_t *memory) {
  gpu_t gpu;
  int code = memory_of(handle, &gpu);
  memory->total = gpu.total * MIB;
  memory->used = (gpu.used + gpu.reserved) * MIB; /* the first version counts what is reserved as used */
  memory->free = memory->total - memory->used;
  return code;
}

int nvmlDeviceGetMemoryInfo_v2(void *handle, memory_v2_t *memory) {
  gpu_t gpu;
  int code = memory_of(handle, &gpu);
  if (facts().memory_v2) return facts().memory_v2;
  if (memory->version != (sizeof *memory | 2 << 24)) return 25; /* argument version mismatch */
  memory->total = gpu.total * MIB;
  memory->reserved = gpu.reserved * MIB;
  memory->used = gpu.used * MIB;
  memory->free = memory->total - memory->used - memory->reserved;
  return code;
}
