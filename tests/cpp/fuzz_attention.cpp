// libFuzzer: any bytes are a call; the kernels must agree with the scalar reference and stay inside the buffers.

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "random_problem.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace flash_attn;
  test::ByteSource source(data, size);
  cpu::force_isa_level_for_testing(cpu::isa_level_name(source.integer(0, cpu::isa_level_count() - 1)));
  cpu::set_thread_count_for_testing(source.integer(1, 3));
  const bool backward = source.one_in(2);
  test::TestCall call = test::random_call(source, 50000);
  const std::string difference = backward ? test::check_backward(call) : test::check_forward(call);
  if (!difference.empty()) {
    std::fprintf(stderr, "%s, level %s: %s\n", backward ? "backward" : "forward", cpu::isa_level_name(), difference.c_str());
    std::abort();
  }
  return 0;
}
