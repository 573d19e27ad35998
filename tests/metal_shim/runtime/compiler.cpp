#include "compiler.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <iterator>
#include <map>
#include <mutex>
#include <sstream>
#include <vector>

namespace metal_shim {
namespace {

namespace fs = std::filesystem;

std::string from_environment(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : otherwise;
}

std::string read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// All that compiled texts include.
const std::string& shim_headers() {
  static const std::string all = [] {
    std::vector<fs::path> paths;
    for (const auto& entry : fs::recursive_directory_iterator(METAL_SHIM_INCLUDE_DIR)) {
      if (entry.is_regular_file()) paths.push_back(entry.path());
    }
    std::sort(paths.begin(), paths.end());
    std::string text;
    for (const fs::path& path : paths) text += read(path);
    return text;
  }();
  return all;
}

std::string fingerprint(const std::string& text) {
  std::uint64_t hash[2] = {0xcbf29ce484222325u, 0x9ae16a3b2f90404fu};  // FNV-1a from two starts
  for (const char c : text) {
    for (std::uint64_t& h : hash) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  }
  char name[40];
  std::snprintf(name, sizeof name, "%016llx%016llx", static_cast<unsigned long long>(hash[0]),
                static_cast<unsigned long long>(hash[1]));
  return name;
}

/// What this machine's vectors are called. Never fused multiply-adds: results are the same on every machine.
std::string machine_flags() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma")) {
    return " -mavx2 -mf16c -mfma";
  }
#endif
  return "";
}

std::string command_for(Mode mode) {
  const std::string common =
      " -x c++ -std=c++20 -fPIC -shared -fno-exceptions -fno-rtti -fno-strict-aliasing -ffp-contract=off "
      "-fsigned-char"
      " -D__METAL_VERSION__=310 -w -I" METAL_SHIM_INCLUDE_DIR +
      machine_flags();
  const std::string gcc = from_environment("METAL_SHIM_GXX", "g++");
  const std::string clang = from_environment("METAL_SHIM_CLANGXX", "clang++");
  switch (mode) {
    case Mode::fast:
      return gcc + common + " -O2";
    case Mode::hooks:
      // Every access must reach a hook: no vector code that merges them, no calls of memcpy made of loops.
      return clang + common +
             " -O1 -DMETAL_SHIM_CHECKED -fsanitize=thread,alignment,null,bounds,shift,integer-divide-by-zero,return,bool"
             " -fsanitize=signed-integer-overflow,float-cast-overflow -fno-vectorize -fno-slp-vectorize -fno-builtin"
             " -mllvm -tsan-instrument-func-entry-exit=0 -mllvm -tsan-instrument-read-before-write"
             " -Wl,--wrap=memcpy,--wrap=memmove,--wrap=memset";
    case Mode::sanitize:
      return clang + common +
             " -O1 -DMETAL_SHIM_CHECKED -fno-omit-frame-pointer -fsanitize=address,undefined -fsanitize-recover=address"
             " -fsanitize-trap=undefined -shared-libsan -g1";
  }
  return {};
}

std::string quoted(const std::string& path) { return "'" + path + "'"; }

/// What a command prints, which is the error where it fails.
std::string shell(const std::string& command) {
  std::FILE* pipe = popen((command + " 2>&1").c_str(), "r");
  if (pipe == nullptr) throw Fault(FaultKind::compile, "cannot run " + command);
  std::string output;
  char chunk[4096];
  for (std::size_t n; (n = std::fread(chunk, 1, sizeof chunk, pipe)) > 0;) output.append(chunk, n);
  if (pclose(pipe) != 0) throw Fault(FaultKind::compile, output.substr(0, 6000));
  return output;
}

// Debug information takes a third of the time, and few kernels have findings: those are compiled again.
constexpr const char* with_lines = " -g1 -gdwarf-4";

fs::path library_for(const std::string& text, const std::string& function, Mode mode, const std::string& more_flags = "") {
  const std::string source = transpile(text, function);
  const std::string command = command_for(mode) + more_flags;
  const fs::path cache = from_environment("METAL_SHIM_CACHE", METAL_SHIM_CACHE_DIR);
  const std::string name = fingerprint(source + command + shim_headers());
  const fs::path library = cache / (name + ".so");
  if (fs::exists(library)) return library;
  fs::create_directories(cache);
  // Another process may be compiling the same: each has files of its own, and the last rename wins.
  const std::string own = (cache / (name + "." + std::to_string(getpid()))).string();
  const fs::path source_file = cache / (name + ".cpp");
  std::ofstream(own + ".cpp") << source;
  fs::rename(own + ".cpp", source_file);
  shell(command + " " + quoted(source_file.string()) + " -o " + quoted(own + ".so") +
        " -L" METAL_SHIM_LIBRARY_DIR " -Wl,-rpath," METAL_SHIM_LIBRARY_DIR " -lmetal_shim -lm");
  fs::rename(own + ".so", library);
  return library;
}

/// The library of a text, or the promise of one.
std::shared_future<fs::path> library_of(const std::string& text, const std::string& function, Mode mode) {
  static std::mutex mutex;
  static std::map<std::string, std::shared_future<fs::path>> libraries;
  const std::string key = fingerprint(text) + function + std::to_string(static_cast<int>(mode));
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = libraries.find(key);
  if (found == libraries.end()) {
    found = libraries.emplace(key, std::async(std::launch::async, library_for, text, function, mode, "")).first;
  }
  return found->second;
}

}  // namespace

void prepare(const std::string& text, const std::string& function, Mode mode) { library_of(text, function, mode); }

Kernel compile(const Launch& launch, Mode mode) {
  const fs::path path = library_of(launch.text, launch.function, mode).get();
  static std::map<fs::path, Kernel> loaded;
  if (const auto found = loaded.find(path); found != loaded.end()) return found->second;
  const std::size_t named = buffers_of(launch.text, launch.function);
  if (named > launch.buffers.size()) {
    throw Fault(FaultKind::compile, launch.function + " names " + std::to_string(named) + " buffers, the launch has " +
                                        std::to_string(launch.buffers.size()));
  }
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw Fault(FaultKind::compile, dlerror());
  const Kernel kernel = reinterpret_cast<Kernel>(dlsym(library, "metal_shim_kernel"));
  if (kernel == nullptr) throw Fault(FaultKind::compile, dlerror());
  loaded.emplace(path, kernel);
  return kernel;
}

std::string line_of(const void* instruction, const Launch& launch, Mode mode) {
  Dl_info info;
  if (instruction == nullptr || dladdr(instruction, &info) == 0) return {};
  const auto offset = static_cast<const char*>(instruction) - static_cast<const char*>(info.dli_fbase);
  char address[32];
  std::snprintf(address, sizeof address, "%#tx", offset);
  const std::string frames = shell(
      "addr2line -s -i -e " + quoted(library_for(launch.text, launch.function, mode, with_lines).string()) + " " + address);
  // Innermost first; the shim's own headers do not interest.
  std::istringstream lines(frames);
  for (std::string frame; std::getline(lines, frame);) {
    if (frame.find(".metal:") != std::string::npos) return frame.substr(0, frame.find(' '));
  }
  return {};
}

}  // namespace metal_shim
