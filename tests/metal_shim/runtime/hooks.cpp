#include "hooks.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "fault.h"
#include "memory.h"
#include "scheduler.h"

namespace metal_shim::hooks {
namespace {

// Who last read a byte, where it was not one thread: `lanes_of | simdgroup`, or one of these.
constexpr std::uint16_t lanes_of = 0x4000;
constexpr std::uint16_t many_simdgroups = 0x8000;
constexpr std::uint16_t many_threadgroups = 0xC000;

constexpr std::uint32_t nobodys = ~0u;  // as `written`: between the threadgroup arrays

/// A byte's history. Epochs count barriers through the whole launch, so that each belongs to one threadgroup; 0 is never.
/// Between two barriers of a threadgroup, a step counts the barriers of one simdgroup.
struct Cell {
  std::uint32_t written, read;
  std::uint16_t writer, reader;
  std::uint16_t write_step, read_step;
};

/// When an access happens.
struct Now {
  std::uint32_t epoch, first_epoch;  // first of this threadgroup
  std::uint16_t thread, step;
  std::uint16_t simdgroup() const { return thread / lanes_per_simdgroup; }
};

struct DeviceBuffer {
  const char* first;
  std::size_t bytes;
  Cell* cells;  // null for an input, which nobody writes
  Traffic traffic;
};

// Barriers order the two memories apart.
enum Memory { device_memory, threadgroup_memory_kind, memories };

std::uintptr_t slots_begin;
std::vector<DeviceBuffer> buffers;
std::vector<std::vector<Cell>> output_cells;
Cell arena_cells[arena_bytes];
std::size_t arena_used;
std::uint32_t last_epoch;
std::uint32_t first_epoch;
std::uint32_t epochs[memories];
std::uint16_t steps[memories][1024 / lanes_per_simdgroup];
std::uint64_t accesses;
Traffic threadgroup_traffic;

std::uint16_t simdgroup_of(std::uint16_t who) {
  return (who & lanes_of) != 0 ? static_cast<std::uint16_t>(who & ~lanes_of)
                               : static_cast<std::uint16_t>(who / lanes_per_simdgroup);
}

/// Whether what `who` did at (epoch, step) lies before `now` for certain.
inline bool is_before(std::uint32_t epoch, std::uint16_t who, std::uint16_t step, const Now& now) {
  if (epoch < now.first_epoch) return false;  // another threadgroup
  if (epoch != now.epoch || who == now.thread) return true;
  return who < many_simdgroups && simdgroup_of(who) == now.simdgroup() && step != now.step;
}

Now now_in(Memory memory) {
  const std::uint16_t thread = static_cast<std::uint16_t>(execution.current->thread.thread_index_in_threadgroup);
  return {epochs[memory], first_epoch, thread, steps[memory][thread / lanes_per_simdgroup]};
}

std::string place_of(const void* address) {
  const std::ptrdiff_t offset = static_cast<const char*>(address) - execution.arena;
  if (offset < 0 || offset >= static_cast<std::ptrdiff_t>(arena_bytes))
    return guarded_memory().describe(address, execution.launch->buffers);
  const ThreadgroupArray* nearest = nullptr;
  for (const ThreadgroupArray& array : execution.threadgroup.arrays) {
    if (static_cast<std::ptrdiff_t>(array.offset) <= offset || nearest == nullptr) nearest = &array;
  }
  if (nearest == nullptr) return "threadgroup memory";
  return "threadgroup array " + std::string(nearest->name) + ", byte " +
         std::to_string(offset - static_cast<std::ptrdiff_t>(nearest->offset)) + " of " + std::to_string(nearest->bytes);
}

std::string name_of_thread(std::uint32_t epoch, std::uint16_t who, const Now& now) {
  if (who == many_threadgroups || epoch < now.first_epoch) return "another threadgroup";
  if (who == many_simdgroups) return "several simdgroups";
  if ((who & lanes_of) != 0) return "several lanes of simdgroup " + std::to_string(simdgroup_of(who));
  return "thread " + std::to_string(who);
}

[[noreturn]] void found(FaultKind kind, const std::string& what, const void* address, const void* instruction) {
  fault(kind, describe(execution.current->thread) + " " + what + " " + place_of(address), instruction);
}

[[noreturn]] void found_race(const char* verb, const Now& now, std::uint32_t epoch, std::uint16_t who, const char* other_verb,
                             const void* address, const void* instruction) {
  fault(FaultKind::race,
        describe(execution.current->thread) + " " + verb + " " + place_of(address) + ", which " +
            name_of_thread(epoch, who, now) + " " + other_verb + " with no barrier between",
        instruction);
}

inline void read_cell(Cell& cell, const Now& now, const void* address, const void* instruction) {
  if (cell.written - 1 >= nobodys - 1) [[unlikely]] {  // 0 or nobodys
    if (cell.written == 0) found(FaultKind::uninitialised, "reads what nobody wrote:", address, instruction);
    found(FaultKind::out_of_bounds, "reads", address, instruction);
  }
  if (!is_before(cell.written, cell.writer, cell.write_step, now)) [[unlikely]] {
    found_race("reads", now, cell.written, cell.writer, "wrote", address, instruction);
  }
  if (cell.reader == many_threadgroups) return;
  if (cell.read != 0 && cell.read < now.first_epoch) {
    cell.reader = many_threadgroups;
  } else if (cell.read != now.epoch ||
             (cell.reader < many_simdgroups && simdgroup_of(cell.reader) == now.simdgroup() && cell.read_step != now.step)) {
    cell.reader = now.thread;  // earlier reads are ordered before all that can still come
  } else if (cell.reader != now.thread && cell.reader < many_simdgroups) {
    cell.reader =
        simdgroup_of(cell.reader) == now.simdgroup() ? static_cast<std::uint16_t>(lanes_of | now.simdgroup()) : many_simdgroups;
  }
  cell.read = now.epoch;
  cell.read_step = now.step;
}

inline void write_cell(Cell& cell, const Now& now, const void* address, const void* instruction) {
  if (cell.written == nobodys) [[unlikely]]
    found(FaultKind::out_of_bounds, "writes", address, instruction);
  if (cell.written != 0 && !is_before(cell.written, cell.writer, cell.write_step, now)) [[unlikely]] {
    found_race("writes", now, cell.written, cell.writer, "wrote", address, instruction);
  }
  if (cell.read != 0 && !is_before(cell.read, cell.reader, cell.read_step, now)) [[unlikely]] {
    found_race("writes", now, cell.read, cell.reader, "read", address, instruction);
  }
  cell = {now.epoch, 0, now.thread, 0, now.step, 0};
}

template <bool is_write>
inline void visit(Cell* cells, std::size_t bytes, const Now& now, const char* address, const void* instruction) {
  for (std::size_t i = 0; i < bytes; ++i) {
    if constexpr (is_write) {
      write_cell(cells[i], now, address + i, instruction);
    } else {
      read_cell(cells[i], now, address + i, instruction);
    }
  }
}

/// What the compiled text does at an address. Its own stack is not looked at.
template <bool is_write>
inline void access(const void* address, std::size_t bytes, const void* instruction) {
  const char* const at = static_cast<const char*>(address);
  if (const std::size_t offset = static_cast<std::size_t>(at - execution.arena); offset < arena_bytes) {
    ++accesses;
    (is_write ? threadgroup_traffic.written : threadgroup_traffic.read) += bytes;
    visit<is_write>(arena_cells + offset, bytes, now_in(threadgroup_memory_kind), at, instruction);
    return;
  }
  const std::uintptr_t from_slots = reinterpret_cast<std::uintptr_t>(address) - slots_begin;
  if (from_slots >= GuardedMemory::slots * GuardedMemory::slot_bytes) return;
  ++accesses;
  const std::size_t slot = from_slots / GuardedMemory::slot_bytes;
  if (slot >= buffers.size()) found(FaultKind::out_of_bounds, is_write ? "writes" : "reads", address, instruction);
  DeviceBuffer& buffer = buffers[slot];
  const std::size_t offset = static_cast<std::size_t>(at - buffer.first);
  if (offset + bytes > buffer.bytes || offset > buffer.bytes) [[unlikely]] {
    found(FaultKind::out_of_bounds, is_write ? "writes" : "reads", address, instruction);
  }
  (is_write ? buffer.traffic.written : buffer.traffic.read) += bytes;
  if (buffer.cells == nullptr) {
    if (is_write) found(FaultKind::read_only, "writes", address, instruction);
    return;
  }
  visit<is_write>(buffer.cells + offset, bytes, now_in(device_memory), at, instruction);
}

template <std::size_t bytes>
inline void check_alignment(const void* address, const void* instruction) {
  constexpr std::size_t unit = std::min<std::size_t>(bytes, 8);  // all that the compiler promises
  if (reinterpret_cast<std::uintptr_t>(address) % unit != 0) [[unlikely]] {
    found(FaultKind::misaligned, "takes " + std::to_string(bytes) + " bytes at an address that does not allow it:", address,
          instruction);
  }
}

}  // namespace

void begin_launch(const std::vector<Buffer>& launch_buffers, void* const* addresses) {
  buffers.clear();
  output_cells.clear();
  slots_begin = reinterpret_cast<std::uintptr_t>(guarded_memory().base());
  for (std::size_t i = 0; i < launch_buffers.size(); ++i) {
    const Buffer& buffer = launch_buffers[i];
    if (buffer.writable) output_cells.emplace_back(buffer.bytes, Cell{});
    buffers.push_back({static_cast<const char*>(addresses[i]) - buffer.before,
                       buffer.bytes + buffer.before,
                       buffer.writable ? output_cells.back().data() : nullptr,
                       {}});
  }
  arena_used = arena_bytes;
  last_epoch = 0;
  accesses = 0;
  threadgroup_traffic = {};
}

void end_launch(Report& report) {
  const std::vector<Buffer>& launch_buffers = execution.launch->buffers;
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    Traffic& total = report.device_bytes[launch_buffers[i].name];
    total.read += buffers[i].traffic.read;
    total.written += buffers[i].traffic.written;
    if (buffers[i].cells == nullptr) continue;
    const Cell* end = buffers[i].cells + buffers[i].bytes;
    const Cell* missing = std::find_if(buffers[i].cells + 0, buffers[i].cells + buffers[i].bytes,
                                       [](const Cell& cell) { return cell.written == 0; });
    if (missing != end) {
      throw Fault(FaultKind::unwritten, report.function + ": nobody wrote buffer " + launch_buffers[i].name + ", byte " +
                                            std::to_string(missing - buffers[i].cells) + " of " +
                                            std::to_string(buffers[i].bytes));
    }
  }
  report.accesses = accesses;
  report.threadgroup_bytes = threadgroup_traffic;
}

void begin_threadgroup() {
  std::memset(arena_cells, 0xFF, arena_used * sizeof(Cell));
  arena_used = 0;
  first_epoch = epochs[device_memory] = epochs[threadgroup_memory_kind] = ++last_epoch;
  std::memset(steps, 0, sizeof steps);
}

void threadgroup_array(std::size_t offset, std::size_t bytes) {
  std::memset(arena_cells + offset, 0, bytes * sizeof(Cell));
  arena_used = std::max(arena_used, offset + bytes);
}

void threadgroup_barrier(std::uint32_t memory) {
  ++last_epoch;
  if ((memory & memory_device) != 0) epochs[device_memory] = last_epoch;
  if ((memory & memory_threadgroup) != 0) epochs[threadgroup_memory_kind] = last_epoch;
}

void simdgroup_barrier(std::uint32_t memory) {
  const std::uint32_t simdgroup = execution.current->thread.simdgroup_index_in_threadgroup;
  if ((memory & memory_device) != 0) ++steps[device_memory][simdgroup];
  if ((memory & memory_threadgroup) != 0) ++steps[threadgroup_memory_kind][simdgroup];
}

}  // namespace metal_shim::hooks

using namespace metal_shim;
using namespace metal_shim::hooks;

extern "C" {

#define CALLER (static_cast<const char*>(__builtin_return_address(0)) - 1)

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_read1(void* p) { access<false>(p, 1, CALLER); }
void __tsan_write1(void* p) { access<true>(p, 1, CALLER); }

#define METAL_SHIM_HOOKS(bytes)                                                   \
  void __tsan_read##bytes(void* p) {                                              \
    check_alignment<bytes>(p, CALLER);                                            \
    access<false>(p, bytes, CALLER);                                              \
  }                                                                               \
  void __tsan_write##bytes(void* p) {                                             \
    check_alignment<bytes>(p, CALLER);                                            \
    access<true>(p, bytes, CALLER);                                               \
  }                                                                               \
  void __tsan_unaligned_read##bytes(void* p) { access<false>(p, bytes, CALLER); } \
  void __tsan_unaligned_write##bytes(void* p) { access<true>(p, bytes, CALLER); }
METAL_SHIM_HOOKS(2)
METAL_SHIM_HOOKS(4)
METAL_SHIM_HOOKS(8)
METAL_SHIM_HOOKS(16)

// The linker sends the text's calls of memcpy and its kin here (--wrap).
void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  access<false>(from, bytes, CALLER);
  access<true>(to, bytes, CALLER);
  return std::memcpy(to, from, bytes);
}
void* __wrap_memmove(void* to, const void* from, size_t bytes) {
  access<false>(from, bytes, CALLER);
  access<true>(to, bytes, CALLER);
  return std::memmove(to, from, bytes);
}
void* __wrap_memset(void* to, int value, size_t bytes) {
  access<true>(to, bytes, CALLER);
  return std::memset(to, value, bytes);
}

// UBSan's handlers. Each gets what the compiler wrote down about the place, which begins with the source location.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

[[noreturn]] static void undefined_at(const SourceLocation* where, FaultKind kind, const std::string& what) {
  const char* slash = std::strrchr(where->file, '/');
  fault(kind, describe(execution.current->thread) + ": " + what + " (" + (slash != nullptr ? slash + 1 : where->file) + ":" +
                  std::to_string(where->line) + ")");
}

void __ubsan_handle_type_mismatch_v1(const SourceLocation* where, void* pointer) {
  undefined_at(where, pointer == nullptr ? FaultKind::undefined : FaultKind::misaligned,
               pointer == nullptr ? "a null pointer" : "an address that its type does not allow: " + place_of(pointer));
}
void __ubsan_handle_out_of_bounds(const SourceLocation* where, void* index) {
  undefined_at(where, FaultKind::out_of_bounds,
               "past the end of a private array, index " + std::to_string(reinterpret_cast<intptr_t>(index)));
}
void __ubsan_handle_shift_out_of_bounds(const SourceLocation* where, void*, void*) {
  undefined_at(where, FaultKind::undefined, "a shift by more bits than there are");
}
void __ubsan_handle_divrem_overflow(const SourceLocation* where, void*, void*) {
  undefined_at(where, FaultKind::undefined, "a division by zero");
}
void __ubsan_handle_add_overflow(const SourceLocation* where, void*, void*) {
  undefined_at(where, FaultKind::undefined, "signed overflow of a sum");
}
void __ubsan_handle_sub_overflow(const SourceLocation* where, void*, void*) {
  undefined_at(where, FaultKind::undefined, "signed overflow of a difference");
}
void __ubsan_handle_mul_overflow(const SourceLocation* where, void*, void*) {
  undefined_at(where, FaultKind::undefined, "signed overflow of a product");
}
void __ubsan_handle_negate_overflow(const SourceLocation* where, void*) {
  undefined_at(where, FaultKind::undefined, "signed overflow of a negation");
}
void __ubsan_handle_float_cast_overflow(const SourceLocation* where, void*) {
  undefined_at(where, FaultKind::undefined, "a float that its integer type cannot hold");
}
void __ubsan_handle_load_invalid_value(const SourceLocation* where, void*) {
  undefined_at(where, FaultKind::undefined, "a bool that is neither true nor false");
}
void __ubsan_handle_missing_return(const SourceLocation* where) {
  undefined_at(where, FaultKind::undefined, "a function that returns no value");
}
}
