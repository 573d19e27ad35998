"""What the GPU backend says of a text: planted faults are seen, and numbers follow the text."""

from __future__ import annotations

import pytest
from generated_code import generated_code, objections
from test_address_space import SOUND, TILE


def code(old: str = "", new: str = ""):
    assert old in SOUND
    return generated_code(TILE + SOUND.replace(old, new), threads=128)


def test_sound_text_meets_no_objection():
    sound = code()
    assert objections(sound) == []
    assert sound.threadgroup_bytes == 32 * 4
    assert sound.stack_bytes == 0
    assert 4 < sound.registers < 40


PLANTED = {
    "program scope": ("float sum = sum_of", "static int calls; calls += q_strides[0]; out[1] = calls; float sum = sum_of"),
    "Metal does not have": (
        "constant constexpr float half_of_all",
        'extern "C" float erff(float); constant constexpr float half_of_all',
    ),
    "through a pointer": (
        "float sum = sum_of",
        "float (*f[2])(float) = {fast::exp2, fast::log2}; out[1] = f[lengths[0]](1.0f); float sum = sum_of",
    ),
    "in double": ("* half_of_all", "* 0.7"),
    "indexed by a variable": (
        "float sum = sum_of",
        "float p[64]; for (int i = 0; i < 64; ++i) p[lengths[i]] = q[i]; out[1] = p[lengths[65]]; float sum = sum_of",
    ),
}


@pytest.mark.parametrize("objection", PLANTED)
def test_planted_fault_is_seen(objection):
    old, new = PLANTED[objection]
    text = TILE + SOUND.replace(old, new)
    if "erff" in new:
        text = text.replace("sum_of(shared, 32)", "erff(sum_of(shared, 32))")
    assert any(objection in line for line in objections(generated_code(text, threads=128)))


def test_more_live_values_need_more_registers():
    rows = "float4 r[24]; for (int i = 0; i < 24; ++i) r[i] = float4(rows[i * 32]); threadgroup_barrier(mem_flags::mem_device);"
    used = " for (int i = 0; i < 24; ++i) out[100 + i] = r[i].x + r[i].y * r[i].z + r[i].w;"
    assert code("const float4 row =", rows + used + "const float4 row =").registers > code().registers + 40


def test_a_loop_is_counted():
    def per_product(exponentials: int) -> float:
        work = "".join(f"d.x = metal::fast::exp2(d.x + {i}.0f);" for i in range(exponentials))
        product = (
            "flash_attn::multiply_accumulate(d, flash_attn::Fragment<half>(q[0], q[1]), flash_attn::Fragment<float>(sum, sum));"
        )
        loop = f"for (int i = 0; i < lengths[0]; ++i) {{ {product} {work} }} const device half4* rows"
        return code("const device half4* rows", loop).instructions_a_product()

    assert per_product(5) - per_product(1) == 2 * 4
