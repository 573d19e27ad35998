#include "flash_attn/device.h"

#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace flash_attn {

std::string isa_level() { return cpu::isa_level_name(); }

int num_threads() { return cpu::thread_count(); }

}  // namespace flash_attn
