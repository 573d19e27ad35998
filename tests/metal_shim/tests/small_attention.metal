// Attention over a paged cache in the idioms of the real kernels, small enough to plant bugs in: two simdgroups share the keys of
// a block in threadgroup memory, each owns eight rows. q [rows, 16], pages [pages, 16, 16], table [blocks]; a page id out of
// range stands for no keys.
constant constexpr int D = 16;
constant constexpr int keys_per_page = 16;
constant constexpr int row_length = D + 8;

struct Place {
  short row, column;
};

static inline Place place_of(uint lane) {
  const short quad = short(lane) / 4;
  return {short((quad & 4) + (short(lane) / 2) % 4), short((quad & 2) * 2 + (short(lane) % 2) * 2)};
}

static inline void multiply_accumulate(thread float2& d, float2 a, float2 b) {
  simdgroup_matrix<float, 8, 8> matrix_a, matrix_b, matrix_d;
  matrix_a.thread_elements() = a;
  matrix_b.thread_elements() = b;
  matrix_d.thread_elements() = d;
  simdgroup_multiply_accumulate(matrix_d, matrix_a, matrix_b, matrix_d);
  d = matrix_d.thread_elements();
}

static inline float row_max(float x) {
  x = max(x, simd_shuffle_xor(x, 1));
  return max(x, simd_shuffle_xor(x, 8));
}

static inline float row_sum(float x) {
  x += simd_shuffle_xor(x, 1);
  return x + simd_shuffle_xor(x, 8);
}

[[kernel]] void small_attention(
    const device half* q [[buffer(0)]],
    const device half* k_pages [[buffer(1)]],
    const device half* v_pages [[buffer(2)]],
    const device int* table [[buffer(3)]],
    const constant int* sizes [[buffer(4)]],
    device float* out [[buffer(5)]],
    device float* lse [[buffer(6)]],
    uint3 group [[threadgroup_position_in_grid]],
    uint thread_index [[thread_index_in_threadgroup]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]]) {
  threadgroup half K[keys_per_page * row_length];
  threadgroup half V[keys_per_page * row_length];
  const int blocks = sizes[0];
  const int keys = sizes[1];
  const int pages = sizes[2];
  const Place place = place_of(lane);
  const int first_row = int(group.x) * 16 + int(simdgroup_index) * 8;

  float2 Q[D / 8];
  for (int d = 0; d < D / 8; ++d) {
    const device half* source = q + (first_row + place.row) * D + d * 8 + place.column;
    Q[d] = float2(float(source[0]), float(source[1])) * (0.25f * M_LOG2E_F);
  }
  float2 O[D / 8] = {};
  float m = -1.0e30f;
  float l = 0.0f;

  for (int block = 0; block < blocks; ++block) {
    const int page = table[block];
    const bool present = page >= 0 && page < pages;
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the last block is read
    const int key = int(thread_index) / 4;
    const int column = int(thread_index) % 4 * 4;
    if (present) {
      const int from = (page * keys_per_page + key) * D + column;
      *(threadgroup half4*)(K + key * row_length + column) = *(const device half4*)(k_pages + from);
      *(threadgroup half4*)(V + key * row_length + column) = *(const device half4*)(v_pages + from);
    } else {
      *(threadgroup half4*)(K + key * row_length + column) = half4(half(0.0f));
      *(threadgroup half4*)(V + key * row_length + column) = half4(half(0.0f));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // this block is there

    float2 S[keys_per_page / 8];
    float highest = m;
    for (int n = 0; n < keys_per_page / 8; ++n) {
      S[n] = float2(0.0f);
      for (int d = 0; d < D / 8; ++d) {
        const threadgroup half* source = K + (n * 8 + place.column) * row_length + d * 8 + place.row;
        multiply_accumulate(S[n], Q[d], float2(float(source[0]), float(source[row_length])));
      }
      for (int j = 0; j < 2; ++j) {
        const int position = block * keys_per_page + n * 8 + place.column + j;
        if (!present || position >= keys) S[n][j] = -1.0e30f;
      }
      highest = max(highest, max(S[n].x, S[n].y));
    }
    highest = row_max(highest);
    const float correction = fast::exp2(m - highest);
    float sum = 0.0f;
    for (int n = 0; n < keys_per_page / 8; ++n) {
      for (int j = 0; j < 2; ++j) {
        S[n][j] = S[n][j] > -1.0e29f ? fast::exp2(S[n][j] - highest) : 0.0f;
        sum += S[n][j];
      }
    }
    l = l * correction + row_sum(sum);
    m = highest;
    for (int d = 0; d < D / 8; ++d) {
      O[d] *= correction;
      for (int n = 0; n < keys_per_page / 8; ++n) {
        const threadgroup half* source = V + (n * 8 + place.row) * row_length + d * 8 + place.column;
        multiply_accumulate(O[d], S[n], float2(float(source[0]), float(source[1])));
      }
    }
  }

  const int row = first_row + place.row;
  for (int d = 0; d < D / 8; ++d) {
    device float* target = out + row * D + d * 8 + place.column;
    target[0] = O[d].x / l;
    target[1] = O[d].y / l;
  }
  if ((lane & 9u) == 0u) lse[row] = M_LN2_F * (m + log2(l));
}
