// flash_attn_ceilings [--threads N] [--no-read]: prints JSON, GFLOP/s of multiply-adds for every level of this processor, and
// GB/s read from so many bytes of memory.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

#include "ceilings/measure.h"

int main(int argc, char** argv) {
  using namespace flash_attn::ceilings;
  int threads = static_cast<int>(std::thread::hardware_concurrency());
  bool measure_read = true;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--threads") == 0 && i + 1 < argc) {
      threads = std::atoi(argv[++i]);
    } else if (std::strcmp(argv[i], "--no-read") == 0) {
      measure_read = false;
    } else {
      std::fprintf(stderr, "usage: flash_attn_ceilings [--threads N] [--no-read]\n");
      return 2;
    }
  }
  if (threads < 1) {
    std::fprintf(stderr, "flash_attn_ceilings: --threads must be at least 1\n");
    return 2;
  }

  std::printf("{\"threads\": %d, \"gflops\": {", threads);
  const char* separator = "";
  const Level* reader = nullptr;
  for (const Level* level : runnable_levels()) {
    std::printf("%s\"%s\": %.1f", separator, level->name, multiply_add_gflops(*level, threads));
    separator = ", ";
    if (level->read) reader = level;
  }
  std::printf("}");
  if (measure_read) {
    const ReadRate read = read_rate(*reader, threads);
    std::printf(", \"read_gbs\": %.2f, \"read_bytes\": %lld", read.gigabytes_per_second, static_cast<long long>(read.bytes));
  }
  std::printf("}\n");
}
