// D = rowsum(dO o O) - dLSE, float32 in the layout of lse; dlse has that layout, too. A simdgroup a row.
// Grid: rows / FA_SIMDGROUPS.
#include "metal/sequence.metal"

namespace flash_attn {

/// Of one row, by all lanes. O of a row without keys is 0: a NaN in its cotangent must not reach the gradient of a sink.
template <class Out, class Cotangent>
FA_FN float row_dot(Out out, Cotangent dout, uint lane) {
  float sum = 0.0f;
  for (int d = int(lane); d < FA_DV; d += 32) {
    const float o = float(out[d]);
    sum += o == 0.0f ? 0.0f : o * float(dout[d]);
  }
  return simd_sum(sum);
}

}  // namespace flash_attn

FA_BODY
using namespace flash_attn;
#ifdef FA_VARLEN
const int batches = 1;
const int rows = params[param_total_q];
#else
const int batches = params[param_batch];
const int rows = params[param_max_seqlen_q];
#endif
const int heads = params[param_heads_q];
const uint lane = thread_index_in_simdgroup;

// Heads run fastest, as in O.
const long place = long(threadgroup_position_in_grid.x) * FA_SIMDGROUPS + simdgroup_index_in_threadgroup;
if (place >= long(batches) * rows * heads) return;
const int head = int(place % heads);
const int row = int(place / heads % rows);
const int batch = int(place / heads / rows);

const float dot = row_dot(
    out + query_strides(out_strides).offset(batch, row, head), dout + query_strides(dout_strides).offset(batch, row, head), lane);
if (lane == 0u) {
  const long i = lse_offset(params, batch, row, head);
  delta[i] = dot - dlse[i];
}
