#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <stdexcept>

namespace metal_shim {
namespace {

std::size_t page_bytes() {
  static const std::size_t bytes = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

void protect(char* address, std::size_t bytes, int protection) {
  if (bytes != 0 && mprotect(address, bytes, protection) != 0) throw std::runtime_error("mprotect failed");
}

}  // namespace

GuardedMemory::GuardedMemory() : mapped_bytes_(slots, 0) {
  void* reserved = mmap(nullptr, slots * slot_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) throw std::runtime_error("cannot reserve address space for the buffers");
  base_ = static_cast<char*>(reserved);
}

GuardedMemory::~GuardedMemory() { munmap(base_, slots * slot_bytes); }

void GuardedMemory::place(const std::vector<Buffer>& buffers) {
  if (buffers.size() > 31) throw Fault(FaultKind::compile, "more than 31 buffers");
  addresses_.resize(buffers.size());
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    const Buffer& buffer = buffers[i];
    char* end = base_ + i * slot_bytes + slot_bytes / 2;
    // Vectors of 16 bytes are the largest: the address modulo 16 is what it would be on a GPU.
    const std::size_t slack = (reinterpret_cast<std::uintptr_t>(end) - buffer.bytes - buffer.offset) % 16;
    char* start = end - slack - buffer.bytes;
    const std::size_t used = slack + buffer.bytes + buffer.before;
    const std::size_t mapped = (used + page_bytes() - 1) / page_bytes() * page_bytes();
    char* const first = end - mapped;
    char* const previous = end - mapped_bytes_[i];
    protect(previous, mapped_bytes_[i], PROT_NONE);
    protect(first, mapped, PROT_READ | PROT_WRITE);
    mapped_bytes_[i] = mapped;
    std::memset(first, 0xFF, mapped - used);
    std::memset(start + buffer.bytes, 0xFF, slack);
    if (buffer.writable) {
      std::memset(start, 0xFF, buffer.bytes);
    } else {
      std::memcpy(start - buffer.before, static_cast<char*>(buffer.data) - buffer.before, buffer.bytes + buffer.before);
      protect(first, mapped, PROT_READ);
    }
    addresses_[i] = start;
  }
}

void GuardedMemory::copy_back(const std::vector<Buffer>& buffers) const {
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    if (buffers[i].writable) std::memcpy(buffers[i].data, addresses_[i], buffers[i].bytes);
  }
}

std::string GuardedMemory::describe(const void* address, const std::vector<Buffer>& buffers) const {
  const int slot = slot_of(address);
  if (slot < 0 || slot >= static_cast<int>(buffers.size())) return "in no buffer: a wild pointer, or the end of the stack";
  const Buffer& buffer = buffers[slot];
  const std::ptrdiff_t offset = static_cast<const char*>(address) - static_cast<const char*>(addresses_[slot]);
  return "buffer " + buffer.name + ", byte " + std::to_string(offset) + " of " + std::to_string(buffer.bytes);
}

GuardedMemory& guarded_memory() {
  static GuardedMemory memory;
  return memory;
}

}  // namespace metal_shim
