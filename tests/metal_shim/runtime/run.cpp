#include <csignal>
#include <mutex>
#include <optional>
#include <string>

#include <sys/ucontext.h>

#include "address_sanitizer.h"
#include "compiler.h"
#include "fault.h"
#include "hooks.h"
#include "memory.h"
#include "metal_shim.h"
#include "scheduler.h"

namespace metal_shim {
namespace {

struct Finding {
  FaultKind kind;
  std::string message;
  const void* instruction;
};

std::optional<Finding> finding;
thread_local bool in_launch = false;

const void* instruction_of(const void* context) {
#if defined(__x86_64__)
  return reinterpret_cast<const void*>(static_cast<const ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#elif defined(__aarch64__)
  return reinterpret_cast<const void*>(static_cast<const ucontext_t*>(context)->uc_mcontext.pc);
#else
  return nullptr;
#endif
}

/// A fiber touched an address that is not mapped or not writable, or did what the processor refuses.
void on_signal(int signal, siginfo_t* info, void* context) {
  if (execution.current == nullptr || execution.current == &execution.main || !in_launch) {
    std::signal(signal, SIG_DFL);  // not ours: happens again, and ends the process
    return;
  }
  const void* instruction = instruction_of(context);
  const std::string thread = describe(execution.current->thread);
  if (signal == SIGFPE) fault(FaultKind::undefined, thread + ": a division by zero", instruction);
  if (signal == SIGILL && execution.mode == Mode::hooks) {  // from -fsanitize=local-bounds
    fault(FaultKind::out_of_bounds, thread + ": past the end of a private array", instruction);
  }
  if (signal == SIGILL) fault(FaultKind::undefined, thread + ": the compiler's trap", instruction);
  // x86 gives no address for those that are not canonical, and for aligned vector instructions at unaligned addresses.
  if (info->si_code == SI_KERNEL || info->si_code == BUS_ADRALN) {
    fault(FaultKind::misaligned, thread + ": a misaligned vector, or a wild address", instruction);
  }
  const int slot = guarded_memory().slot_of(info->si_addr);
  const auto& buffers = execution.launch->buffers;
  const std::string where = guarded_memory().describe(info->si_addr, buffers);
  const bool inside = slot >= 0 && slot < static_cast<int>(buffers.size()) &&
                      static_cast<const char*>(info->si_addr) >= guarded_memory().addresses()[slot] &&
                      static_cast<const char*>(info->si_addr) <
                          static_cast<const char*>(guarded_memory().addresses()[slot]) + buffers[slot].bytes;
  if (inside) fault(FaultKind::read_only, thread + " writes to " + where, instruction);
  fault(FaultKind::out_of_bounds, thread + ": " + where, instruction);
}

/// Handlers for the time of a launch, on a stack of their own: a fiber's may be what overflowed.
class SignalHandlers {
 public:
  SignalHandlers() {
    static char stack[65536];
    stack_t alternate{};
    alternate.ss_sp = stack;
    alternate.ss_size = sizeof stack;
    sigaltstack(&alternate, &old_stack_);
    struct sigaction action {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler does not return
    for (int i = 0; i < 4; ++i) sigaction(signals[i], &action, &old_[i]);
    in_launch = true;
  }
  ~SignalHandlers() {
    in_launch = false;
    for (int i = 0; i < 4; ++i) sigaction(signals[i], &old_[i], nullptr);
    if (old_stack_.ss_sp == nullptr) old_stack_.ss_flags = SS_DISABLE;
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int signals[4] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
  stack_t old_stack_{};
  struct sigaction old_[4]{};
};

}  // namespace

const char* name_of(FaultKind kind) {
  switch (kind) {
    case FaultKind::compile:
      return "compile";
    case FaultKind::out_of_bounds:
      return "out of bounds";
    case FaultKind::read_only:
      return "read-only";
    case FaultKind::misaligned:
      return "misaligned";
    case FaultKind::divergence:
      return "divergence";
    case FaultKind::shuffle:
      return "shuffle";
    case FaultKind::race:
      return "race";
    case FaultKind::uninitialised:
      return "uninitialised";
    case FaultKind::unwritten:
      return "unwritten";
    case FaultKind::threadgroup_memory:
      return "threadgroup memory";
    case FaultKind::undefined:
      return "undefined";
  }
  return "";
}

Fault::Fault(FaultKind fault_kind, const std::string& message)
    : std::runtime_error(std::string(name_of(fault_kind)) + ": " + message), kind(fault_kind) {}

void fault(FaultKind kind, const std::string& message, const void* instruction) {
  if (execution.current == nullptr || execution.current == &execution.main) throw Fault(kind, message);
  finding = Finding{kind, message, instruction};
  leave_fibers();
}

Report run(const Launch& launch, Mode mode) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);

  if (mode == Mode::sanitize) address_sanitizer::begin_launch();
  const Kernel kernel = compile(launch, mode);
  Report report;
  report.function = launch.function;
  guarded_memory().place(launch.buffers);
  metal_shim_ulp_seed = static_cast<std::uint32_t>(launch.seed);
  execution.launch = &launch;
  execution.kernel = kernel;
  execution.report = &report;
  execution.mode = mode;
  finding.reset();
  {
    const SignalHandlers handlers;
    if (mode == Mode::hooks) hooks::begin_launch(launch.buffers, guarded_memory().addresses());
    run_grid(guarded_memory().addresses());
  }
  if (mode == Mode::sanitize) {
    const std::string report = address_sanitizer::end_launch();
    if (!report.empty()) throw Fault(FaultKind::out_of_bounds, launch.function + ": " + report);
  }
  if (finding) {
    const std::string line = line_of(finding->instruction, launch, mode);
    throw Fault(finding->kind, launch.function + ": " + finding->message + (line.empty() ? "" : " (" + line + ")"));
  }
  if (mode == Mode::hooks) hooks::end_launch(report);
  guarded_memory().copy_back(launch.buffers);
  return report;
}

}  // namespace metal_shim
