#include "ops/warn.h"

#include <cstdio>
#include <mutex>
#include <set>
#include <utility>

namespace flash_attn {
namespace {

struct Warnings {
  std::mutex mutex;
  WarningSink sink = [](const std::string& message) { std::fprintf(stderr, "%s\n", message.c_str()); };
  std::set<std::string> given;
};

Warnings& warnings() {
  static Warnings instance;
  return instance;
}

}  // namespace

void set_warning_sink(WarningSink sink) {
  const std::lock_guard lock(warnings().mutex);
  warnings().sink = std::move(sink);
}

void warn_once(const std::string& message) {
  WarningSink sink;
  {
    const std::lock_guard lock(warnings().mutex);
    if (!warnings().given.insert(message).second) return;
    sink = warnings().sink;
  }
  sink(message);  // unlocked: Python's waits for the interpreter
}

void forget_warnings() {
  const std::lock_guard lock(warnings().mutex);
  warnings().given.clear();
}

}  // namespace flash_attn
