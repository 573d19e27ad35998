// Keys and values in codes, 1: int8 with a scale a row of a head; MLX's quantised form, 2: of 8 bits, 3: of 4 bits, with a scale and a
// bias a group.
#pragma once

#include "metal/key_source.metal"
#include "semantics/quantization.h"

namespace flash_attn {

#if FA_K_CODES == 1
template <int dims, class Data, class Scales>
struct Int8Tensor {
  Data data;
  RowStrides strides;
  Scales scales;
  RowStrides scale_strides;

  /// As KeyTensor::run.
  FA_FN Run<KeyElement, key_run> run(KeySlot slot, int head, int d) const thread {
    Run<KeyElement, key_run> x;
    x.fill(0.0f);
    if (d >= dims) return x;
    const float scale = float(scales[scale_strides.offset(slot.row, slot.index, head)]);
    x.load_some(data + strides.offset(slot.row, slot.index, head) + d, dims - d);
    FA_UNROLL
    for (short i = 0; i < key_run; ++i) x.values[i] *= scale;
    return x;
  }
};

template <int dims, class Data, class Scales>
FA_FN Int8Tensor<dims, Data, Scales> int8_tensor(Data data, Strides strides, Scales scales, Strides scale_strides) {
  return {data, key_strides(strides), scales, key_strides(scale_strides)};
}
#else
FA_CONSTANT short affine_group = 64;  // codes that share a scale and a bias

// Of numbers, one a group.
template <class Data>
struct GroupTensor {
  Data data;
  RowStrides strides;
  long group;  // from one to the next

  FA_FN float at(KeySlot slot, int head, int d) const thread {
    return float(data[strides.offset(slot.row, slot.index, head) + d / affine_group * group]);
  }
};

template <class Data>
FA_FN GroupTensor<Data> group_tensor(Data data, Strides strides) {
  return {data, key_strides(strides), strides[3]};
}

template <int codes, int dims, class Data, class Scales, class Biases>
struct AffineTensor {
  Data data;
  RowStrides strides;
  GroupTensor<Scales> scales;
  GroupTensor<Biases> biases;

  /// As KeyTensor::run.
  FA_FN Run<KeyElement, key_run> run(KeySlot slot, int head, int d) const thread {
    constexpr short bits = codes == 2 ? 8 : 4;
    constexpr short codes_of_word = 32 / bits;
    Run<KeyElement, key_run> x;
    x.fill(0.0f);
    if (d >= dims) return x;
    const float scale = scales.at(slot, head, d);
    const float bias = biases.at(slot, head, d);
    const Data words = data + strides.offset(slot.row, slot.index, head) + d / codes_of_word;
    FA_UNROLL
    for (short i = 0; i < key_run; ++i) {
      const uint code = words[i / codes_of_word] >> uint(i % codes_of_word * bits) & ((1u << uint(bits)) - 1u);
      x.values[i] = dequantized(float(code), scale, bias);
    }
    return x;
  }
};

template <int codes, int dims, class Data, class Scales, class Biases>
FA_FN AffineTensor<codes, dims, Data, Scales, Biases> affine_tensor(
    Data data, Strides strides, Scales scales, Strides scale_strides, Biases biases, Strides bias_strides) {
  return {data, key_strides(strides), group_tensor(scales, scale_strides), group_tensor(biases, bias_strides)};
}
#endif

}  // namespace flash_attn
