#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/matrix_unit.h"

namespace flash_attn::cpu {
namespace {

std::vector<const Kernels*> runnable_levels() {
  std::vector<const Kernels*> levels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // and F16C, which came first
#if !defined(FLASH_ATTN_WITHOUT_AVX512)
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  // A pair's dot product runs at the rate of a multiply-add on AMD (Zen 4 on); on Intel at a quarter of it, measured on Emerald
  // Rapids: bfloat16 attention took twice the time of float32. There the level is only for who asks.
  const bool fast_dot_product = __builtin_cpu_is("amd");
  if (avx512_bf16 && has_matrix_unit()) levels.push_back(&avx512_amx_kernels);
  if (avx512_bf16 && fast_dot_product) levels.push_back(&avx512_bf16_kernels);
  if (avx512) levels.push_back(&avx512_kernels);
  if (avx512_bf16 && !fast_dot_product) levels.push_back(&avx512_bf16_kernels);
#endif
  if (avx2) levels.push_back(&avx2_kernels);
#elif defined(__aarch64__)
  levels.push_back(&neon_kernels);
#endif
  levels.push_back(&baseline_kernels);
#if defined(FLASH_ATTN_TILE_LEVELS)
  levels.push_back(&avx2_tiles_kernels);
  levels.push_back(&avx512_tiles_kernels);
  levels.push_back(&avx512_bf16_tiles_kernels);
  levels.push_back(&avx512_amx_tiles_kernels);
#endif
  return levels;
}

const std::vector<const Kernels*>& levels() {
  static const std::vector<const Kernels*> found = runnable_levels();
  return found;
}

const Kernels* find_level(const char* name) {
  for (const Kernels* level : levels()) {
    if (std::strcmp(level->name, name) == 0) return level;
  }
  return nullptr;
}

std::atomic<const Kernels*> forced_level{nullptr};

}  // namespace

int isa_level_count() { return static_cast<int>(levels().size()); }
const Kernels& isa_level(int index) { return *levels().at(static_cast<std::size_t>(index)); }
const char* isa_level_name(int index) { return isa_level(index).name; }

const Kernels& kernels() {
  if (const Kernels* forced = forced_level) return *forced;
  if (const char* name = std::getenv("FLASH_ATTENTION_MLX_ISA"); name && *name) {
    if (const Kernels* level = find_level(name)) return *level;
    std::string known;
    for (const Kernels* level : levels()) known += std::string(known.empty() ? "" : ", ") + level->name;
    throw std::invalid_argument("FLASH_ATTENTION_MLX_ISA is '" + std::string(name) + "'; this machine runs " + known);
  }
  return *levels().front();
}

const char* isa_level_name() { return kernels().name; }

bool force_isa_level_for_testing(const char* name) {
  const Kernels* level = name ? find_level(name) : nullptr;
  forced_level = level;
  return !name || level;
}

}  // namespace flash_attn::cpu
