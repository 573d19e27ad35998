// Threads of a GPU as fibers. The lanes of a simdgroup form a ring: each runs until it arrives at an operation of the whole
// simdgroup and hands over to the next; the last to arrive does the operation and goes on at once. Simdgroups form a ring in
// the same way at barriers of the threadgroup. So an operation costs one switch a lane.
#pragma once

#include <boost/context/detail/fcontext.hpp>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "metal_shim.h"
#include "msl/abi.h"

namespace metal_shim {

using Kernel = void (*)(const Thread&);

struct Simdgroup;

struct Fiber {
  boost::context::detail::fcontext_t context = nullptr;
  Fiber* next = nullptr;  // the lane after this
  Simdgroup* simdgroup = nullptr;
  Thread thread{};
};

/// What a lane is waiting at.
struct Meeting {
  Op op;
  const char* name;
  int line;
  std::uint32_t memory;  // barriers
  bool operator==(const Meeting& other) const {
    return op == other.op && line == other.line && memory == other.memory && name == other.name;
  }
};

struct Simdgroup {
  Simdgroup* next = nullptr;
  Fiber* resume = nullptr;  // the lane to go on with
  std::uint32_t lanes = 0;
  std::uint32_t arrived = 0;
  std::uint32_t finished = 0;
  std::uint32_t epoch = 0;  // barriers of this simdgroup alone, so far
  Meeting meeting{};
  const Fiber* first_to_arrive = nullptr;

  alignas(64) unsigned char given[lanes_per_simdgroup][largest_exchange];
  alignas(64) unsigned char taken[lanes_per_simdgroup][largest_exchange];
  std::uint32_t source[lanes_per_simdgroup];
  alignas(64) float a[64], b[64], c[64], d[64];  // row-major, 8 x 8
};

struct ThreadgroupArray {
  const char* name;
  int line;
  std::size_t offset, bytes;
};

struct Threadgroup {
  std::vector<Simdgroup> simdgroups;
  std::uint32_t arrived = 0;
  std::uint32_t finished = 0;
  std::uint32_t epoch = 0;  // barriers so far
  const Simdgroup* first_to_arrive = nullptr;
  std::vector<ThreadgroupArray> arrays;
  std::size_t allocated = 0;  // bytes, without the gaps
};

constexpr std::size_t threadgroup_memory_limit = 32768;
constexpr std::size_t arena_gap = 2048;                            // poison between the arrays
constexpr std::size_t arena_bytes = 4 * threadgroup_memory_limit;  // gaps included

/// The one launch in progress.
struct Execution {
  const Launch* launch = nullptr;
  Kernel kernel = nullptr;
  Report* report = nullptr;
  Mode mode = Mode::fast;
  std::uint32_t threadgroup_number = 0;
  Threadgroup threadgroup;
  std::vector<Fiber> fibers;
  Fiber main;
  Fiber* current = nullptr;  // main between threadgroups
  char* arena = nullptr;
};

extern Execution execution;

/// All threadgroups of `execution.launch`, one after the other. Returns early where a fault has been recorded.
void run_grid(void* const* buffers);

/// "thread (3, 0, 0) of threadgroup (1, 0, 0)".
std::string describe(const Thread&);

/// Back to run_grid's caller, for good.
[[noreturn]] void leave_fibers();

}  // namespace metal_shim
