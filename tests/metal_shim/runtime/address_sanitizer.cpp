#include "address_sanitizer.h"

#include <dlfcn.h>

#include "metal_shim.h"

namespace metal_shim::address_sanitizer {
namespace {

using Mark = void (*)(const volatile void*, std::size_t);
using SetCallback = void (*)(void (*)(const char*));

template <class Function>
Function find(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

std::string first_report;

/// "AddressSanitizer: stack-buffer-overflow on address ..." and the line that did it, of a page of text.
void keep(const char* report) {
  if (!first_report.empty()) return;
  const std::string text(report);
  const std::size_t what = text.find("AddressSanitizer: ");
  if (what != std::string::npos) first_report = text.substr(what, text.find_first_of("\n", what) - what);
  first_report = first_report.substr(0, first_report.find(" at pc"));
  if (const std::size_t dot = text.find(".metal:"); dot != std::string::npos) {
    const std::size_t start = text.find_last_of(" /", dot) + 1;
    first_report += " (" + text.substr(start, text.find('\n', dot) - start) + ")";
  }
}

}  // namespace

void begin_launch() {
  const auto set_callback = find<SetCallback>("__asan_set_error_report_callback");
  if (set_callback == nullptr) {
    throw Fault(FaultKind::compile,
                "mode sanitize needs a process with AddressSanitizer: LD_PRELOAD=$(clang++ "
                "-print-file-name=libclang_rt.asan-x86_64.so) ASAN_OPTIONS=detect_leaks=0:halt_on_error=0");
  }
  set_callback(&keep);
  first_report.clear();
}

std::string end_launch() { return first_report; }

void poison(const void* address, std::size_t bytes) {
  static const Mark mark = find<Mark>("__asan_poison_memory_region");
  mark(address, bytes);
}

void unpoison(const void* address, std::size_t bytes) {
  static const Mark mark = find<Mark>("__asan_unpoison_memory_region");
  mark(address, bytes);
}

}  // namespace metal_shim::address_sanitizer
