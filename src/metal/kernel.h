// What a Metal launch is made of. Text and numbers, no framework.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace flash_attn::metal {

struct Kernel {
  std::string name;                 // unique per specialisation: MLX keeps compiled text by it
  std::vector<std::string> inputs;  // names in the text, in the order of the arrays; the first is "params"
  std::vector<std::string> outputs;
  std::string defines;               // of the specialisation
  std::string_view functions;        // the semantics and the kernel's own
  std::string_view body;             // into which MLX puts a signature
  std::vector<std::int32_t> params;  // the values of that input, by Param
  std::array<int, 3> threadgroup;    // threads
  std::array<int, 3> threadgroups;   // how many

  std::string header() const { return defines + std::string(functions); }
  std::string source() const { return std::string(body); }
};

}  // namespace flash_attn::metal
