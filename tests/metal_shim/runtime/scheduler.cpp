#include "scheduler.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>

#include "address_sanitizer.h"
#include "fault.h"
#include "hooks.h"

namespace metal_shim {

namespace ctx = boost::context::detail;

Execution execution;

namespace {

constexpr std::size_t stack_bytes = 256 << 10;
constexpr std::size_t largest_threadgroup = 1024;

/// Stacks of all fibers, with an unmapped page below each; their tops are staggered, or all would share one cache set.
char* stack_top(std::size_t index) {
  static char* const stacks = [] {
    const std::size_t bytes = largest_threadgroup * stack_bytes;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for stacks");
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    for (std::size_t i = 0; i < largest_threadgroup; ++i)
      mprotect(static_cast<char*>(memory) + i * stack_bytes, page, PROT_NONE);
    return static_cast<char*>(memory);
  }();
  return stacks + (index + 1) * stack_bytes - 192 * (index % 32);
}

void switch_to(Fiber* to) {
  Fiber* from = execution.current;
  execution.current = to;
  const ctx::transfer_t back = ctx::jump_fcontext(to->context, from);
  static_cast<Fiber*>(back.data)->context = back.fctx;
}

std::string position(const std::uint32_t (&p)[3]) {
  std::string text = "(";
  for (int i = 0; i < 3; ++i) text.append(i == 0 ? "" : ", ").append(std::to_string(p[i]));
  return text.append(")");
}

std::string describe(const Meeting& meeting) { return std::string(meeting.name) + " at line " + std::to_string(meeting.line); }

/// A lane has returned from the kernel.
void finish() {
  Fiber* self = execution.current;
  Simdgroup& simdgroup = *self->simdgroup;
  Threadgroup& threadgroup = execution.threadgroup;
  if (simdgroup.arrived != 0) {
    fault(FaultKind::divergence, describe(self->thread) + " returned while " + describe(simdgroup.first_to_arrive->thread) +
                                     " of its simdgroup waits in " + describe(simdgroup.meeting));
  }
  if (++simdgroup.finished < simdgroup.lanes) return switch_to(self->next);
  if (threadgroup.arrived != 0) {
    fault(FaultKind::divergence, "simdgroup " + std::to_string(self->thread.simdgroup_index_in_threadgroup) +
                                     " of threadgroup " + position(self->thread.threadgroup_position_in_grid) +
                                     " returned while another waits in " + describe(threadgroup.first_to_arrive->meeting));
  }
  if (++threadgroup.finished < threadgroup.simdgroups.size()) return switch_to(simdgroup.next->resume);
  switch_to(&execution.main);
}

void fiber_main(ctx::transfer_t from) {
  static_cast<Fiber*>(from.data)->context = from.fctx;
  execution.kernel(execution.current->thread);
  finish();
}

/// Waits for all lanes of the simdgroup; the last to arrive calls `complete`.
template <class Complete>
inline void meet(Simdgroup& simdgroup, Fiber* self, const Meeting& meeting, Complete complete) {
  if (simdgroup.arrived == 0) {
    simdgroup.meeting = meeting;
    simdgroup.first_to_arrive = self;
    if (simdgroup.finished != 0) [[unlikely]] {
      fault(FaultKind::divergence,
            describe(self->thread) + " waits in " + describe(meeting) + ", but lanes of its simdgroup have returned");
    }
  } else if (!(simdgroup.meeting == meeting)) [[unlikely]] {
    fault(FaultKind::divergence, describe(self->thread) + " waits in " + describe(meeting) + ", but " +
                                     describe(simdgroup.first_to_arrive->thread) + " of its simdgroup waits in " +
                                     describe(simdgroup.meeting));
  }
  if (++simdgroup.arrived < simdgroup.lanes) return switch_to(self->next);
  simdgroup.arrived = 0;
  complete();
}

void meet_threadgroup(Simdgroup& simdgroup, Fiber* self) {
  Threadgroup& threadgroup = execution.threadgroup;
  if (threadgroup.arrived == 0) {
    threadgroup.first_to_arrive = &simdgroup;
    if (threadgroup.finished != 0) {
      fault(FaultKind::divergence, describe(self->thread) + " waits in " + describe(simdgroup.meeting) +
                                       ", but a simdgroup of its threadgroup has returned");
    }
  } else if (!(threadgroup.first_to_arrive->meeting == simdgroup.meeting)) {
    fault(FaultKind::divergence, describe(self->thread) + " waits in " + describe(simdgroup.meeting) +
                                     ", but another simdgroup of its threadgroup waits in " +
                                     describe(threadgroup.first_to_arrive->meeting));
  }
  if (++threadgroup.arrived < threadgroup.simdgroups.size()) {
    simdgroup.resume = self;
    return switch_to(simdgroup.next->resume);
  }
  threadgroup.arrived = 0;
  ++execution.report->barriers;
  if (execution.mode == Mode::hooks) hooks::threadgroup_barrier(simdgroup.meeting.memory);
}

/// Fibers of one threadgroup, in an order that the seed decides.
void set_up_threadgroup(std::mt19937_64& random, bool shuffle) {
  Threadgroup& threadgroup = execution.threadgroup;
  const std::size_t threads = execution.fibers.size();
  const std::size_t simdgroups = (threads + lanes_per_simdgroup - 1) / lanes_per_simdgroup;
  threadgroup.simdgroups.resize(simdgroups);
  threadgroup.arrived = threadgroup.finished = threadgroup.epoch = 0;
  threadgroup.arrays.clear();
  threadgroup.allocated = 0;

  std::vector<std::uint32_t> order;
  const auto shuffled = [&](std::size_t count) {
    order.resize(count);
    for (std::size_t i = 0; i < count; ++i) order[i] = static_cast<std::uint32_t>(i);
    if (shuffle) std::shuffle(order.begin(), order.end(), random);
  };
  for (std::size_t s = 0; s < simdgroups; ++s) {
    Simdgroup& simdgroup = threadgroup.simdgroups[s];
    Fiber* lanes = &execution.fibers[s * lanes_per_simdgroup];
    simdgroup.lanes = static_cast<std::uint32_t>(std::min<std::size_t>(lanes_per_simdgroup, threads - s * lanes_per_simdgroup));
    simdgroup.arrived = simdgroup.finished = simdgroup.epoch = 0;
    shuffled(simdgroup.lanes);
    for (std::uint32_t i = 0; i < simdgroup.lanes; ++i) {
      lanes[order[i]].next = &lanes[order[(i + 1) % simdgroup.lanes]];
      lanes[order[i]].simdgroup = &simdgroup;
    }
    simdgroup.resume = &lanes[order[0]];
  }
  shuffled(simdgroups);
  for (std::size_t s = 0; s < simdgroups; ++s) {
    threadgroup.simdgroups[order[s]].next = &threadgroup.simdgroups[order[(s + 1) % simdgroups]];
  }
  for (std::size_t i = 0; i < threads; ++i) {
    execution.fibers[i].context = ctx::make_fcontext(stack_top(i), stack_bytes - 16384, fiber_main);
  }
  execution.main.next = threadgroup.simdgroups[order[0]].resume;
}

/// Whether the poison between the arrays is still there. Then the arena is made all poison again.
void check_gaps() {
  const auto poisoned = [](const char* at) {
    static const std::vector<char> poison(arena_gap, '\xFF');
    return std::memcmp(at, poison.data(), arena_gap) == 0;
  };
  if (execution.mode == Mode::sanitize) address_sanitizer::unpoison(execution.arena, arena_bytes);
  std::size_t end = 0;
  const ThreadgroupArray* written_past = nullptr;
  for (const ThreadgroupArray& array : execution.threadgroup.arrays) {
    end = array.offset + array.bytes;
    if (!poisoned(execution.arena + end) && written_past == nullptr) written_past = &array;
  }
  std::memset(execution.arena, 0xFF, std::min(end + arena_gap, arena_bytes));
  if (written_past != nullptr) {
    fault(FaultKind::out_of_bounds, "somebody wrote past the end of threadgroup array " + std::string(written_past->name) +
                                        " of line " + std::to_string(written_past->line));
  }
}

}  // namespace

std::string describe(const Thread& thread) {
  return "thread " + position(thread.thread_position_in_threadgroup) + " of threadgroup " +
         position(thread.threadgroup_position_in_grid);
}

void leave_fibers() {
  ctx::jump_fcontext(execution.main.context, execution.current);
  __builtin_unreachable();
}

void run_grid(void* const* buffers) {
  static char* const arena = [] {
    void* memory = mmap(nullptr, arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for threadgroups");
    std::memset(memory, 0xFF, arena_bytes);
    return static_cast<char*>(memory);
  }();
  execution.arena = arena;
  const Launch& launch = *execution.launch;
  std::uint32_t size[3], groups[3];
  std::uint64_t total = 1;
  for (int i = 0; i < 3; ++i) {
    size[i] = std::min(launch.threadgroup[i], launch.grid[i]);
    if (size[i] == 0) return;
    groups[i] = (launch.grid[i] + size[i] - 1) / size[i];
    total *= groups[i];
  }
  if (std::uint64_t{size[0]} * size[1] * size[2] > largest_threadgroup) {
    throw Fault(FaultKind::threadgroup_memory, "more than 1024 threads in a threadgroup");
  }
  std::mt19937_64 random(launch.seed);
  const bool shuffle = launch.seed != 0;
  std::vector<std::uint64_t> order(total);
  for (std::uint64_t i = 0; i < total; ++i) order[i] = i;
  if (shuffle) std::shuffle(order.begin(), order.end(), random);

  execution.threadgroup_number = 0;
  for (const std::uint64_t number : order) {
    ++execution.threadgroup_number;
    const std::uint32_t group[3] = {static_cast<std::uint32_t>(number % groups[0]),
                                    static_cast<std::uint32_t>(number / groups[0] % groups[1]),
                                    static_cast<std::uint32_t>(number / groups[0] / groups[1])};
    std::uint32_t here[3];  // threads: fewer at the grid's end
    for (int i = 0; i < 3; ++i) here[i] = std::min(size[i], launch.grid[i] - group[i] * size[i]);
    const std::size_t threads = std::size_t{here[0]} * here[1] * here[2];
    execution.fibers.resize(threads);
    for (std::size_t t = 0; t < threads; ++t) {
      Thread& thread = execution.fibers[t].thread;
      const std::uint32_t place[3] = {static_cast<std::uint32_t>(t % here[0]),
                                      static_cast<std::uint32_t>(t / here[0] % here[1]),
                                      static_cast<std::uint32_t>(t / here[0] / here[1])};
      for (int i = 0; i < 3; ++i) {
        thread.threadgroup_position_in_grid[i] = group[i];
        thread.thread_position_in_threadgroup[i] = place[i];
        thread.thread_position_in_grid[i] = group[i] * size[i] + place[i];
        thread.threads_per_threadgroup[i] = here[i];
        thread.threads_per_grid[i] = launch.grid[i];
        thread.threadgroups_per_grid[i] = groups[i];
      }
      thread.thread_index_in_threadgroup = static_cast<std::uint32_t>(t);
      thread.thread_index_in_simdgroup = static_cast<std::uint32_t>(t % lanes_per_simdgroup);
      thread.simdgroup_index_in_threadgroup = static_cast<std::uint32_t>(t / lanes_per_simdgroup);
      thread.simdgroups_per_threadgroup = static_cast<std::uint32_t>((threads + lanes_per_simdgroup - 1) / lanes_per_simdgroup);
      thread.threads_per_simdgroup = lanes_per_simdgroup;
      thread.buffers = buffers;
    }
    set_up_threadgroup(random, shuffle);
    if (execution.mode == Mode::hooks) hooks::begin_threadgroup();
    if (execution.mode == Mode::sanitize) address_sanitizer::poison(arena, arena_bytes);
    execution.current = &execution.main;
    switch_to(execution.main.next);
    const bool whole = execution.current == &execution.main;
    execution.current = nullptr;
    ++execution.report->threadgroups;
    execution.report->threadgroup_bytes_allocated =
        std::max<std::uint64_t>(execution.report->threadgroup_bytes_allocated, execution.threadgroup.allocated);
    if (!whole) {
      if (execution.mode == Mode::sanitize) address_sanitizer::unpoison(arena, arena_bytes);
      std::memset(arena, 0xFF, arena_bytes);
      return;
    }
    check_gaps();
  }
}

}  // namespace metal_shim

using namespace metal_shim;

extern "C" {

uint32_t metal_shim_ulp_seed = 0;

uint32_t metal_shim_lane() { return execution.current->thread.thread_index_in_simdgroup; }

void metal_shim_shuffle(const void* value, void* result, uint32_t bytes, uint32_t source_lane, const char* name, int line) {
  Fiber* self = execution.current;
  Simdgroup& simdgroup = *self->simdgroup;
  const std::uint32_t lane = self->thread.thread_index_in_simdgroup;
  if (source_lane >= simdgroup.lanes && source_lane != no_lane) {
    fault(FaultKind::shuffle, describe(self->thread) + ": " + name + " at line " + std::to_string(line) + " from lane " +
                                  std::to_string(source_lane) + " of " + std::to_string(simdgroup.lanes));
  }
  std::memcpy(simdgroup.given[lane], value, bytes);
  simdgroup.source[lane] = source_lane;
  meet(simdgroup, self, {Op::shuffle, name, line, 0}, [&] {
    ++execution.report->simd_ops;
    for (std::uint32_t i = 0; i < simdgroup.lanes; ++i) {
      if (simdgroup.source[i] == no_lane) {
        std::memset(simdgroup.taken[i], 0xFF, largest_exchange);
      } else {
        std::memcpy(simdgroup.taken[i], simdgroup.given[simdgroup.source[i]], largest_exchange);
      }
    }
  });
  std::memcpy(result, simdgroup.taken[lane], bytes);
}

void metal_shim_reduce(const void* value, void* result, uint32_t bytes, Reduction reduction, const char* name, int line) {
  Fiber* self = execution.current;
  Simdgroup& simdgroup = *self->simdgroup;
  const std::uint32_t lane = self->thread.thread_index_in_simdgroup;
  std::memcpy(simdgroup.given[lane], value, bytes);
  meet(simdgroup, self, {Op::reduce, name, line, 0}, [&] {
    ++execution.report->simd_ops;
    std::memcpy(simdgroup.taken, simdgroup.given, sizeof simdgroup.taken);
    reduction(simdgroup.taken, simdgroup.lanes);
  });
  std::memcpy(result, simdgroup.taken[lane], bytes);
}

void metal_shim_multiply_accumulate(const float a[2], const float b[2], const float c[2], float d[2], int line) {
  Fiber* self = execution.current;
  Simdgroup& simdgroup = *self->simdgroup;
  const std::uint32_t lane = self->thread.thread_index_in_simdgroup;
  // Which two elements of an 8 x 8 matrix a lane holds.
  const std::uint32_t quad = lane / 4;
  const std::uint32_t row = (quad & 4) + lane / 2 % 4;
  const std::uint32_t column = (quad & 2) * 2 + lane % 2 * 2;
  const std::uint32_t place = row * 8 + column;
  std::memcpy(&simdgroup.a[place], a, 8);
  std::memcpy(&simdgroup.b[place], b, 8);
  std::memcpy(&simdgroup.c[place], c, 8);
  meet(simdgroup, self, {Op::multiply_accumulate, "simdgroup_multiply_accumulate", line, 0}, [&] {
    if (simdgroup.lanes != lanes_per_simdgroup) {
      fault(FaultKind::divergence, "a matrix product in a simdgroup of " + std::to_string(simdgroup.lanes) + " lanes");
    }
    execution.report->matrix_flops += 8 * 8 * 8 * 2;
    for (int i = 0; i < 8; ++i) {
      float sum[8];
      for (int j = 0; j < 8; ++j) sum[j] = simdgroup.c[i * 8 + j];
      for (int k = 0; k < 8; ++k) {
        for (int j = 0; j < 8; ++j) sum[j] += simdgroup.a[i * 8 + k] * simdgroup.b[k * 8 + j];
      }
      for (int j = 0; j < 8; ++j) simdgroup.d[i * 8 + j] = sum[j];
    }
  });
  std::memcpy(d, &simdgroup.d[place], 8);
}

void metal_shim_simdgroup_barrier(uint32_t memory, int line) {
  Fiber* self = execution.current;
  Simdgroup& simdgroup = *self->simdgroup;
  meet(simdgroup, self, {Op::simdgroup_barrier, "simdgroup_barrier", line, memory}, [&] {
    if (execution.mode == Mode::hooks) hooks::simdgroup_barrier(memory);
  });
}

void metal_shim_threadgroup_barrier(uint32_t memory, int line) {
  Fiber* self = execution.current;
  Simdgroup& simdgroup = *self->simdgroup;
  meet(simdgroup, self, {Op::threadgroup_barrier, "threadgroup_barrier", line, memory},
       [&] { meet_threadgroup(simdgroup, self); });
}

void* metal_shim_threadgroup_array(const char* name, size_t bytes, size_t alignment, int line) {
  Threadgroup& threadgroup = execution.threadgroup;
  std::size_t end = 0;
  for (const ThreadgroupArray& array : threadgroup.arrays) {
    if (array.line == line && array.bytes == bytes && std::strcmp(array.name, name) == 0) return execution.arena + array.offset;
    end = array.offset + array.bytes;
  }
  threadgroup.allocated += bytes;
  if (threadgroup.allocated > threadgroup_memory_limit) {
    fault(FaultKind::threadgroup_memory, "array " + std::string(name) + " at line " + std::to_string(line) + " makes " +
                                             std::to_string(threadgroup.allocated) + " bytes of threadgroup memory");
  }
  const std::size_t unit = std::max<std::size_t>(64, alignment);
  const std::size_t offset = (end + arena_gap + unit - 1) / unit * unit;
  if (offset + bytes + arena_gap > arena_bytes) fault(FaultKind::threadgroup_memory, "too many threadgroup arrays");
  threadgroup.arrays.push_back({name, line, offset, bytes});
  if (execution.mode == Mode::hooks) hooks::threadgroup_array(offset, bytes);
  if (execution.mode == Mode::sanitize) address_sanitizer::unpoison(execution.arena + offset, bytes);
  return execution.arena + offset;
}
}
