// libFuzzer: any bytes are a call; the kernels must agree with the scalar reference and stay inside the buffers.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "random_problem.h"

namespace {

std::string check(std::string_view pass, flash_attn::test::ByteSource& source) {
  using namespace flash_attn::test;
  constexpr std::int64_t work = 50000;
  TestCall call = pass == "cached" ? random_cached_call(source, work) : random_call(source, work);
  return pass == "cached" ? check_cached(call) : pass == "forward" ? check_forward(call) : check_backward(call);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace flash_attn;
  test::ByteSource source(data, size);
  cpu::force_isa_level_for_testing(cpu::isa_level_name(source.integer(0, cpu::isa_level_count() - 1)));
  cpu::set_thread_count_for_testing(source.integer(1, 3));
  const char* pass = source.choose({"cached", "forward", "backward"});
  const std::string difference = check(pass, source);
  if (!difference.empty()) {
    std::fprintf(stderr, "%s, level %s: %s\n", pass, cpu::isa_level_name(), difference.c_str());
    std::abort();
  }
  return 0;
}
