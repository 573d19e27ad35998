// What a Metal launch is made of. Text and numbers, no framework.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace flash_attn::metal {

struct Kernel {
  std::string name;                 // unique per text: MLX keeps compiled ones by it
  std::string file;                 // src/metal/<file>.metal
  std::vector<std::string> inputs;  // names in the text, in the order of the arrays; the first is "params"
  std::vector<std::string> outputs;
  std::string defines;               // of the specialisation
  bool is_readable;                  // the text is for people to read
  std::vector<std::int32_t> params;  // the values of that input, by Param
  std::array<int, 3> threadgroup;    // threads
  std::array<int, 3> threadgroups;   // how many
};

}  // namespace flash_attn::metal
