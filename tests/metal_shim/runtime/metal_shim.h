// Runs Metal text on this machine: compiles it as C++, one fiber a thread, and reports what a GPU would hide.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace metal_shim {

enum class Mode {
  fast,      // g++ -O2: numbers, divergence, wild addresses
  hooks,     // clang: every access checked for bounds, alignment, races and values never written, and counted
  sanitize,  // clang with AddressSanitizer, whose runtime the process must have been started with
};

/// What the kernel gets as [[buffer(n)]], in order. Kernels see a copy between unmapped pages. A writable one starts as 0xFF,
/// NaN in every float type, and is copied back after the run.
struct Buffer {
  std::string name;
  void* data;
  std::size_t bytes;
  bool writable;
  std::size_t before = 0;  // bytes in front of `data` that belong to it too: an array of negative strides
  std::size_t offset = 0;  // of `data` in its allocation, whose start is aligned as Metal's are
};

struct Launch {
  std::string text;      // what Apple's compiler would see after MLX's metal::utils()
  std::string function;  // of the kernel; an instance of a template by its arguments
  std::vector<Buffer> buffers;
  std::array<std::uint32_t, 3> grid;         // threads, as dispatchThreads takes it
  std::array<std::uint32_t, 3> threadgroup;  // clipped to the grid
  std::uint64_t seed = 0;                    // not 0: permutes lanes, simdgroups and threadgroups, and the fast functions err
};

struct Traffic {
  std::uint64_t read = 0;
  std::uint64_t written = 0;
};

/// Over all threads. Bytes and accesses are counted in Mode::hooks only.
struct Report {
  std::string function;
  std::uint64_t threadgroups = 0;
  std::uint64_t matrix_flops = 0;  // 8 * 8 * 8 * 2 for every simdgroup_multiply_accumulate
  std::uint64_t simd_ops = 0;      // shuffles and reductions, one for each simdgroup
  std::uint64_t barriers = 0;      // of threadgroups; all threadgroups together
  std::uint64_t threadgroup_bytes_allocated = 0;
  std::uint64_t accesses = 0;
  Traffic threadgroup_bytes;
  std::map<std::string, Traffic> device_bytes;  // by the buffer's name
};

enum class FaultKind {
  compile,             // the text is not Metal as the shim knows it
  out_of_bounds,       // outside every buffer and threadgroup array
  read_only,           // a write to an input
  misaligned,          // an address that its type does not allow
  divergence,          // lanes or simdgroups that do not meet at one operation
  shuffle,             // from a lane that is not there
  race,                // two threads, one of which writes, with no barrier between them
  uninitialised,       // a read of what nobody wrote
  unwritten,           // a part of an output that nobody wrote
  threadgroup_memory,  // more than 32 KB
  undefined,           // what C++ and Metal leave undefined: shifts, overflows, array indices
};

const char* name_of(FaultKind);

struct Fault : std::runtime_error {
  Fault(FaultKind kind, const std::string& message);
  FaultKind kind;
};

Report run(const Launch&, Mode);

/// Starts to compile a text, so that several compile at once; run() waits for its own.
void prepare(const std::string& text, const std::string& function, Mode);

/// The C++ that a compiler gets for the text. Lines are the text's.
std::string transpile(const std::string& text, const std::string& function);

/// How many buffers the kernel's parameters name.
std::size_t buffers_of(const std::string& text, const std::string& function);

}  // namespace metal_shim
