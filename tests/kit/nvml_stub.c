/* A stand-in for NVIDIA's libnvidia-ml.so.1: answers nvidia-ml-py's calls from the text file that NVML_STATE names.
 * Line 1: driver version, CUDA version (12080). Each further line is a GPU, memory in MiB, energy in mJ, "-" for no process:
 *   uuid total free utilisation energy pid:MiB,pid:MiB name with spaces
 * Utilisation or energy -1: this GPU cannot say. No file: the driver is not loaded. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, SMALL = 7, NO_DRIVER = 9, MOST = 8 };
typedef struct { char uuid[80], name[96], processes[200]; unsigned long long total, free; long long busy, energy; } Gpu;
static Gpu gpu[MOST];
static unsigned count;
static char version[80];
static int cuda;

static int load(void) { /* reads the file anew, so that the numbers may change while somebody looks */
  const char *path = getenv("NVML_STATE");
  FILE *file = path ? fopen(path, "r") : NULL;
  char line[600];
  unsigned n = 0;
  if (!file || !fgets(line, sizeof line, file) || sscanf(line, "%79s %d", version, &cuda) != 2) {
    if (file) fclose(file);
    return NO_DRIVER;
  }
  while (n < MOST && fgets(line, sizeof line, file)) {
    Gpu *g = &gpu[n];
    if (sscanf(line, "%79s %llu %llu %lld %lld %199s %95[^\n]", g->uuid, &g->total, &g->free, &g->busy, &g->energy, g->processes, g->name) == 7) n++;
  }
  count = n;
  fclose(file);
  return OK;
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; return load(); }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { return code == NO_DRIVER ? "Driver Not Loaded" : "Not Supported"; }
int nvmlSystemGetDriverVersion(char *to, unsigned size) { snprintf(to, size, "%s", version); return OK; }
int nvmlSystemGetCudaDriverVersion(int *to) { *to = cuda; return OK; }
int nvmlDeviceGetCount_v2(unsigned *to) { *to = count; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Gpu **to) { *to = &gpu[index]; return index < count ? OK : INVALID; }
int nvmlDeviceGetName(Gpu *g, char *to, unsigned size) { snprintf(to, size, "%s", g->name); return OK; }
int nvmlDeviceGetUUID(Gpu *g, char *to, unsigned size) { snprintf(to, size, "%s", g->uuid); return OK; }
int nvmlDeviceGetMemoryInfo(Gpu *g, unsigned long long *to) { /* total, free, used */
  if (load()) return NO_DRIVER;
  to[0] = g->total << 20, to[1] = g->free << 20, to[2] = (g->total - g->free) << 20;
  return OK;
}
int nvmlDeviceGetUtilizationRates(Gpu *g, unsigned *to) { /* gpu, memory */
  if (load() || g->busy < 0) return NOT_SUPPORTED;
  to[0] = (unsigned)g->busy, to[1] = 0;
  return OK;
}
int nvmlDeviceGetTotalEnergyConsumption(Gpu *g, unsigned long long *to) {
  if (load() || g->energy < 0) return NOT_SUPPORTED;
  *to = (unsigned long long)g->energy;
  return OK;
}
typedef struct { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; } Process;
int nvmlDeviceGetComputeRunningProcesses_v3(Gpu *g, unsigned *size, Process *to) {
  unsigned n = 0, pid;
  unsigned long long mib;
  for (const char *at = g->processes; at && sscanf(at, "%u:%llu", &pid, &mib) == 2; n++) {
    if (to && n < *size) to[n] = (Process){pid, mib << 20, 0, 0};
    if ((at = strchr(at, ','))) at++;
  }
  int fits = n <= *size && (to || !n);
  *size = n;
  return fits ? OK : SMALL;
}
