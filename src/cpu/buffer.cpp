#include "cpu/buffer.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "cpu/large_results.h"

namespace flash_attn::cpu {
namespace {

// An address sanitizer should see every pass in blocks of its own size.
#if defined(__SANITIZE_ADDRESS__) || defined(FLASH_ATTN_FRESH_BUFFERS)
constexpr std::size_t kept_limit = 0;
#else
constexpr std::size_t kept_limit = std::size_t{96} << 20;
#endif

struct Block {
  float* memory;
  std::size_t bytes;
};

// Blocks between passes. Never waits: whoever finds the list in use (or locked for ever, in a forked child) goes to malloc.
class LeftOvers {
 public:
  // The smallest block that fits without wasting more than it holds; memory is null if there is none.
  Block take(std::size_t bytes) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return {};
    auto best = blocks_.end();
    for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
      const bool fits = block->bytes >= bytes && block->bytes / 2 <= bytes;
      if (fits && (best == blocks_.end() || block->bytes < best->bytes)) best = block;
    }
    if (best == blocks_.end()) return {};
    const Block found = *best;
    blocks_.erase(best);
    kept_ -= found.bytes;
    return found;
  }

  // The oldest make room.
  bool keep(const Block& block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || block.bytes > kept_limit) return false;
    while (kept_ + block.bytes > kept_limit) {
      std::free(blocks_.front().memory);
      kept_ -= blocks_.front().bytes;
      blocks_.erase(blocks_.begin());
    }
    blocks_.push_back(block);
    kept_ += block.bytes;
    return true;
  }

 private:
  std::mutex mutex_;
  std::vector<Block> blocks_;
  std::size_t kept_ = 0;
};

// Never destroyed: a pass may end after static destructors have run.
LeftOvers& left_overs() {
  static auto* const instance = new LeftOvers;
  return *instance;
}

}  // namespace

void ReleaseBuffer::operator()(float* memory) const {
  if (!left_overs().keep({memory, bytes})) std::free(memory);
}

Buffer allocate(std::int64_t floats) {
  constexpr std::size_t line = 64;
  const std::size_t bytes = std::max((static_cast<std::size_t>(floats) * sizeof(float) + line - 1) / line * line, line);
  if (const Block block = left_overs().take(bytes); block.memory) return Buffer(block.memory, {block.bytes});
  auto* memory = static_cast<float*>(std::aligned_alloc(line, bytes));
  if (!memory) throw std::bad_alloc();
  prefer_large_pages(memory, bytes);
  return Buffer(memory, {bytes});
}

}  // namespace flash_attn::cpu
