// Where buffers live: each right against unmapped pages, in the middle of a slot of 64 GiB, so that an index of 32 bits that
// goes astray faults in every mode and its buffer is known.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "metal_shim.h"

namespace metal_shim {

class GuardedMemory {
 public:
  GuardedMemory();
  ~GuardedMemory();
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  /// Puts a copy of each buffer into its slot, outputs poisoned.
  void place(const std::vector<Buffer>&);
  void copy_back(const std::vector<Buffer>&) const;

  void* const* addresses() const { return addresses_.data(); }
  std::size_t size() const { return addresses_.size(); }

  /// The slot that an address lies in, or -1.
  int slot_of(const void* address) const {
    const std::uintptr_t offset = reinterpret_cast<std::uintptr_t>(address) - reinterpret_cast<std::uintptr_t>(base_);
    return offset < slots * slot_bytes ? static_cast<int>(offset / slot_bytes) : -1;
  }

  /// "buffer k: byte 4096 of 1024".
  std::string describe(const void* address, const std::vector<Buffer>&) const;

  const void* base() const { return base_; }

  static constexpr std::size_t slots = 64;
  static constexpr std::size_t slot_bytes = std::size_t{64} << 30;

 private:
  char* base_;
  std::vector<void*> addresses_;
  std::vector<std::size_t> mapped_bytes_;  // that each slot has open
};

/// That of all launches.
GuardedMemory& guarded_memory();

}  // namespace metal_shim
