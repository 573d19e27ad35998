"""Each rule fires on the text that breaks it, and on nothing that is sound."""

from __future__ import annotations

import pytest
from address_space import errors_of
from kernel_text import SOURCES, kernel_of_file
from rules import RULES, broken, text_is_short
from test_address_space import SOUND, TILE

TEXT = TILE + SOUND

# Rule: texts that break it, as (old, new) of the sound text.
BROKEN = {
    "pointers_have_an_address_space": [
        ("threadgroup const float* values", "const float* values"),
        ("thread float& sum", "float& sum"),
        ("float sum = sum_of", "const auto& s = shared[0]; float sum = sum_of"),
    ],
    "pointers_are_not_cast_as_in_c": [
        ("reinterpret_cast<const device half4*>(q)", "(const device half4*)(q)"),
        ("float sum = sum_of", "float y = *(threadgroup float*)shared; float sum = sum_of"),
    ],
    "threadgroup_arrays_are_plain": [
        ("threadgroup float shared[32]", "threadgroup float2 shared[32]"),
        ("threadgroup float shared[32]", "threadgroup float shared[32], other[2]"),
        (
            "METAL_FUNC float first_of(Pointer values) {",
            "METAL_FUNC float first_of(Pointer values) {\nthreadgroup float s[2];\n",
        ),
    ],
    "globals_are_constant": [("constant constexpr float half_of_all", "constexpr float half_of_all")],
    "locals_are_not_static": [("float sum = 0.0f", "static constexpr float start = 0.0f; float sum = start")],
    "floats_are_single": [
        ("* half_of_all", "* 0.5"),
        ("* half_of_all", "* 5e-1"),
        ("* half_of_all", "* 0.5h"),
        ("float sum = 0.0f", "double sum = 0.0f"),
    ],
    "only_words_of_metal": [
        ("float sum = 0.0f", "auto f = [](float x) { return x; }; float sum = 0.0f"),
        ("float sum = 0.0f", "float sum = std::exp2(0.0f)"),
        ("float sum = 0.0f", "float (*f)(float) = exp2; float sum = 0.0f"),
        ("float sum = 0.0f", "goto end; end: float sum = 0.0f"),
        ("constant constexpr float half_of_all", "struct Bits { int low : 3; }; constant constexpr float half_of_all"),
    ],
    "functions_do_not_call_themselves": [("float sum = 0.0f", "float sum = sum_of(values + 1, n)")],
    "swizzles_are_plain": [("row.w", "row.wzyx.x"), ("row.w", "row.b")],
    "macros_begin_with_fa": [("constant constexpr float half_of_all", "#define B 3\nconstant constexpr float half_of_all")],
    "nothing_is_named_thread": [
        ("METAL_FUNC void add(thread float& sum, float x)", "METAL_FUNC void add(thread float& sum, float thread)"),
        ("float sum = 0.0f", "uint thread = 3; float sum = 0.0f"),
    ],
    "kernels_are_attributed": [("[[kernel]] void", "kernel void")],
    "collectives_meet_all_lanes": [
        ("  threadgroup_barrier", "  if (thread_index_in_simdgroup < 3) threadgroup_barrier"),
        (
            "  threadgroup_barrier",
            "  const uint lane = 3; if (lane < 3) { sums_up(); } else { flash_attn::row_max(1.0f); } threadgroup_barrier",
        ),
        ("  threadgroup_barrier", "  const uint row = 3; if (row > 20) return; threadgroup_barrier"),
        ("sum_of(shared, 32)", "thread_index_in_simdgroup < 4 ? simd_sum(1.0f) : 0.0f"),
        ("  threadgroup_barrier", "  for (uint i = 0; i < thread_index_in_simdgroup; ++i) simd_sum(1.0f); threadgroup_barrier"),
    ],
    "matrices_are_plain": [
        ("  threadgroup_barrier", "  simdgroup_matrix<float, 8, 8> m(1.0f); threadgroup_barrier"),
        ("  threadgroup_barrier", "  auto m = simdgroup_matrix<float, 8, 8>(1.0f); threadgroup_barrier"),
        ("  threadgroup_barrier", "  simdgroup_float8x8 m; simdgroup_load(m, shared, 8); threadgroup_barrier"),
    ],
    "text_is_short": [("* half_of_all", "* half_of_all" + "\n+ 0.0f" * 2200)],
    "buffers_are_few": [
        ("out [[buffer(3)]],", "out [[buffer(3)]]," + "".join(f"int* a{i} [[buffer({i})]]," for i in range(4, 33)))
    ],
}


def test_sound_text_breaks_no_rule():
    assert broken(TEXT) == []


VOCABULARY = [file for file in sorted((SOURCES / "metal").glob("*.metal")) if "FA_BODY" not in file.read_text()]


@pytest.mark.parametrize("file", VOCABULARY, ids=lambda file: file.name)
@pytest.mark.parametrize("element", ["half", "bfloat16_t", "float"])
def test_our_vocabulary_is_sound(file, element):
    text = kernel_of_file(file, {"FA_T": element}).text
    assert broken(text, but=text_is_short) == []
    assert errors_of(text) == ""


@pytest.mark.parametrize(("rule", "i"), [(rule, i) for rule, changes in BROKEN.items() for i in range(len(changes))])
def test_rule_fires(rule, i):
    old, new = BROKEN[rule][i]
    assert old in SOUND
    assert rule in {line.split(":")[0] for line in broken(TILE + SOUND.replace(old, new))}


def test_every_rule_is_shown_firing():
    assert set(BROKEN) == {rule.__name__ for rule in RULES}
