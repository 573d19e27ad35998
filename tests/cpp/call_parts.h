// What the files of TestCall share: reproducible values, offsets, and how a difference is told.
#pragma once

#include <cstdint>
#include <string>

#include "cpu/attention.h"

namespace flash_attn::test {

enum TensorId : std::uint64_t {
  id_q,
  id_k,
  id_v,
  id_mask,
  id_alibi,
  id_sink,
  id_dout,
  id_dlse,
  id_qv,
  id_k_scale,
  id_v_scale,
  id_k_new,
  id_v_new,
  id_angle
};

/// Uniform in [-1, 1), a pure function of its arguments.
double noise(std::uint64_t seed, std::uint64_t tensor, std::int64_t index);

std::int64_t offset_of(const cpu::Strides& strides, std::int64_t batch, std::int64_t row, std::int64_t head);
std::int64_t offset_of(const cpu::LseStrides& strides, std::int64_t batch, std::int64_t row, std::int64_t head);

void fill_row(const cpu::Tensor& tensor, std::int64_t offset, std::int64_t dim, double magnitude, std::uint64_t seed,
              std::uint64_t id);

cpu::ConstTensor as_const(const cpu::Tensor& tensor);
cpu::Tensor as_writable(const cpu::ConstTensor& tensor);

/// NaN agrees with NaN.
bool agree(double got, double want, double tolerance);

std::string describe(const char* name, std::int64_t row, std::int64_t head, std::int64_t d, double got, double want);

}  // namespace flash_attn::test
