"""The pass refuses what Metal refuses: each planted error beside the same text without it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from address_space import errors_of
from kernel_text import SOURCES, flatten, kernel_of_file

TILE = flatten(SOURCES / "metal" / "tile.metal")

SOUND = """
constant constexpr float half_of_all = 0.5f;
template <class Pointer>
METAL_FUNC float first_of(Pointer values) { return float(values[0]); }
METAL_FUNC float sum_of(threadgroup const float* values, short n) {
  float sum = 0.0f;
  for (short i = 0; i < n; ++i) sum += values[i];
  return sum;
}
METAL_FUNC void add(thread float& sum, float x) { sum += x; }
METAL_FUNC flash_attn::Fragment<float> pair(float x) { return flash_attn::Fragment<float>(x, 1.0f); }
[[kernel]] void sums(
  const device half* q [[buffer(0)]],
  const constant int* lengths [[buffer(1)]],
  const constant int64_t* q_strides [[buffer(2)]],
  device float* out [[buffer(3)]],
  uint3 threadgroup_position_in_grid [[threadgroup_position_in_grid]],
  uint thread_index_in_simdgroup [[thread_index_in_simdgroup]]) {
  threadgroup float shared[32];
  shared[thread_index_in_simdgroup] = float(q[thread_index_in_simdgroup * q_strides[0]]) * half_of_all;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float sum = sum_of(shared, 32);
  add(sum, first_of(q) + first_of(lengths) + pair(sum).x);
  flash_attn::Fragment<float> d = flash_attn::Fragment<float>(0.0f);
  flash_attn::multiply_accumulate(d, flash_attn::Fragment<half>(q[0], q[1]), flash_attn::Fragment<float>(sum, sum));
  const device half4* rows = reinterpret_cast<const device half4*>(q);
  const float4 row = float4(rows[0]);
  out[threadgroup_position_in_grid.x] = sum + d.y + row.w;
}
"""


def errors(old: str = "", new: str = "") -> str:
    assert old in SOUND
    return errors_of(TILE + SOUND.replace(old, new))


def test_sound_text_passes():
    assert errors() == ""


PLANTED = {
    "a device pointer for a threadgroup one": ("sum_of(shared, 32)", "sum_of(out, 32)"),
    "a constant pointer for a device one": (
        "const device half4* rows",
        "const device int* n = lengths; const device half4* rows",
    ),
    "a device element for a thread reference": ("add(sum, ", "add(out[0], "),
    "a pointer without an address space": ("threadgroup const float* values", "const float* values"),
    "a local pointer without an address space": ("float sum = sum_of", "float* p = shared; float sum = sum_of"),
    "a reinterpret_cast across spaces": ("reinterpret_cast<const device", "reinterpret_cast<const threadgroup"),
    "a double literal": ("* half_of_all", "* 0.5"),
    "a vector of too many values": ("Fragment<float>(x, 1.0f)", "Fragment<float>(x, 1.0f, x)"),
    "half4 to float4 unasked": ("float4(rows[0])", "rows[0]"),
    "float to half unasked": ("float sum = sum_of", "half h = half_of_all * sum_of(shared, 3); float sum = sum_of"),
    "a write to constant memory": ("float sum = sum_of", "lengths[0] = 1; float sum = sum_of"),
    "an unknown function": ("sum_of(shared, 32)", "simd_frobnicate(shared[0])"),
    "an ambiguous max": ("sum_of(shared, 32)", "max(1, 1u) + sum_of(shared, 32)"),
    "a local threadgroup array of no constant length": ("float shared[32]", "float shared[lengths[0]]"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_error_is_refused(planted):
    assert "error:" in errors(*PLANTED[planted])


# Apple's compiler takes these, so the pass must.
MLX_KERNELS = {
    "sdpa_vector.h": "sdpa_vector<bfloat16_t, 64, 64>",
    "steel/attn/kernels/steel_attention.h": "attention<half, 32, 16, 128, 128, 4, 1>",
}


@pytest.mark.parametrize("file", MLX_KERNELS)
def test_mlx_kernels_pass(file):
    root = Path(next(iter(find_spec("mlx").submodule_search_locations))) / "include"
    text = flatten(root / "mlx/backend/metal/kernels" / file, root)
    assert errors_of(f"{text}\nconstant auto instance = &{MLX_KERNELS[file]};\n") == ""


def test_a_file_gets_the_signature_of_a_launch(tmp_path: Path):
    file = tmp_path / "forward.metal"
    file.write_text('#include "metal/tile.metal"\nFA_BODY\nout[q_strides[0]] = FA_T(seqused_k[0]) + q[params[0]]; // lse\n')
    text = kernel_of_file(file, {"FA_T": "bfloat16_t", "FA_SEQUSED_K": "1"}, "constant").text
    assert "const constant int* seqused_k [[buffer(5)]]" in text
    assert "device FA_T* out [[buffer(6)]]" in text
    assert "device float* lse" not in text
    assert errors_of(text) == ""
