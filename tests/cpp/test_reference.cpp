// The reference's gradient equals finite differences of its own forward: what the kernels are compared with is right.

#include <gtest/gtest.h>

#include <cmath>

#include "cases.h"
#include "element.h"

namespace flash_attn::test {
namespace {

class FiniteDifferences : public testing::TestWithParam<Case> {};

// A scalar whose derivative is what backward computes: <dout, out> + <dlse, lse>.
double loss(const TestCall& call) {
  const ReferenceForward forward = reference_forward(call.problem, call.inputs);
  const std::vector<SequencePair> pairs = sequence_pairs(call.problem, call.inputs);
  double sum = 0.0;
  for (std::int32_t batch = 0; batch < call.problem.batch; ++batch) {
    const SequencePair& pair = pairs[static_cast<std::size_t>(batch)];
    for (std::int32_t head = 0; head < call.problem.heads_q; ++head) {
      for (std::int32_t i = 0; i < pair.q.length; ++i) {
        const auto index = static_cast<std::size_t>(query_row(call.problem, pair, batch, i) * call.problem.heads_q + head);
        const auto dim = static_cast<std::size_t>(call.problem.head_dim_v);
        const cpu::Strides& strides = call.saved.dout.strides;
        const std::int64_t row = pair.q.begin + i;
        for (std::size_t d = 0; d < dim; ++d) {
          const std::int64_t offset =
              batch * strides.batch + row * strides.seq + head * strides.head + static_cast<std::int64_t>(d);
          sum += read_element(call.saved.dout.data, DType::float32, offset) * forward.out.values[index * dim + d];
        }
        const cpu::LseStrides& lse = call.saved.dlse_strides;
        if (std::isfinite(forward.lse[index])) {
          sum += call.saved.dlse[batch * lse.batch + head * lse.head + row * lse.seq] * forward.lse[index];
        }
      }
    }
  }
  return sum;
}

void expect_derivatives(TestCall& call, const char* name, float* values, const std::vector<double>& gradient) {
  int nonzero = 0;
  for (std::size_t i = 0; i < gradient.size(); ++i) {
    nonzero += gradient[i] != 0.0;
    const float value = values[i];
    if (!std::isfinite(value)) {
      EXPECT_EQ(gradient[i], 0.0) << name << " " << i << " is not used";
      continue;
    }
    const float above = value + 1e-3f;
    const float below = value - 1e-3f;
    values[i] = above;
    const double loss_above = loss(call);
    values[i] = below;
    const double loss_below = loss(call);
    values[i] = value;
    const double difference = (loss_above - loss_below) / (double{above} - below);
    EXPECT_NEAR(gradient[i], difference, 1e-5 * std::max(1.0, std::abs(difference))) << name << " " << i;
  }
  EXPECT_GT(nonzero, 0) << name;
}

TEST_P(FiniteDifferences, AreTheReferencesGradient) {
  AttentionProblem problem = dense_problem(2, 3, 4, 3, 2);
  Features features;
  GetParam().apply(problem, features);
  features.dlse = true;
  features.q = features.k = features.v = features.out = Layout::contiguous;  // as the reference's gradients
  TestCall call(problem, features, 11);
  call.save_reference(reference_forward(call.problem, call.inputs));
  const ReferenceGradients gradients = reference_backward(call.problem, call.inputs, call.saved, call.gradients);

  expect_derivatives(call, "dq", static_cast<float*>(call.q.data), gradients.dq.values);
  expect_derivatives(call, "dk", static_cast<float*>(call.k.data), gradients.dk.values);
  expect_derivatives(call, "dv", static_cast<float*>(call.v.data), gradients.dv.values);
  if (features.sink) expect_derivatives(call, "dsink", call.sink, gradients.dsink);
  if (call.attn_mask.data && call.attn_mask.dtype == DType::float32) {
    auto* mask = static_cast<float*>(const_cast<void*>(call.attn_mask.data));
    expect_derivatives(call, "dmask", mask, gradients.dmask);
  }
}

INSTANTIATE_TEST_SUITE_P(Reference, FiniteDifferences, testing::ValuesIn(feature_cases()),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace flash_attn::test
