// flash_attn_ceilings [--threads N] [--level NAME]... [--no-read]: prints JSON, GFLOP/s of multiply-adds for the named levels,
// or every level, of this processor, and GB/s read from so many bytes of memory and of its last-level cache. With --bursts-of
// BYTES: for every line of input reads so many bytes of memory and prints GB/s.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "ceilings/measure.h"

int main(int argc, char** argv) {
  using namespace flash_attn::ceilings;
  int threads = static_cast<int>(std::thread::hardware_concurrency());
  bool measure_read = true;
  long long burst_bytes = 0;
  std::vector<std::string> wanted;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--threads") == 0 && i + 1 < argc) {
      threads = std::atoi(argv[++i]);
    } else if (std::strcmp(argv[i], "--level") == 0 && i + 1 < argc) {
      wanted.emplace_back(argv[++i]);
    } else if (std::strcmp(argv[i], "--no-read") == 0) {
      measure_read = false;
    } else if (std::strcmp(argv[i], "--bursts-of") == 0 && i + 1 < argc) {
      burst_bytes = std::atoll(argv[++i]);
    } else {
      std::fprintf(stderr, "usage: flash_attn_ceilings [--threads N] [--level NAME]... [--no-read] [--bursts-of BYTES]\n");
      return 2;
    }
  }
  if (threads < 1) {
    std::fprintf(stderr, "flash_attn_ceilings: --threads must be at least 1\n");
    return 2;
  }

  const Level* reader = nullptr;
  for (const Level* level : runnable_levels()) {
    if (level->read) reader = level;
  }
  if (burst_bytes > 0) {
    ReadWalk walk = memory_walk(*reader, threads, burst_bytes);
    while (std::getchar() != EOF) {
      std::printf("%.2f\n", walk.best_gigabytes_per_second(1));
      std::fflush(stdout);
    }
    return 0;
  }
  std::printf("{\"threads\": %d, \"gflops\": {", threads);
  const char* separator = "";
  for (const Level* level : runnable_levels()) {
    if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), level->name) == wanted.end()) continue;
    std::printf("%s\"%s\": %.1f", separator, level->name, multiply_add_gflops(*level, threads));
    separator = ", ";
  }
  std::printf("}");
  if (measure_read) {
    const ReadRate memory = memory_read_rate(*reader, threads);
    const ReadRate cache = cache_read_rate(*reader, threads);
    std::printf(", \"read_gbs\": %.2f, \"read_bytes\": %lld", memory.gigabytes_per_second,
                static_cast<long long>(memory.bytes));
    std::printf(", \"cache_gbs\": %.2f, \"cache_bytes\": %lld", cache.gigabytes_per_second,
                static_cast<long long>(cache.bytes));
  }
  std::printf("}\n");
}
