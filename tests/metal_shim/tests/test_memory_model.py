"""What orders two accesses of one byte: a barrier of that memory, of a group that has both threads. Nothing else does."""

from __future__ import annotations

import metal_shim
import numpy as np
import pytest

SIGNATURE = """
[[kernel]] void exchange(device float* out [[buffer(0)]], device float* scratch [[buffer(1)]],
                         uint3 group [[threadgroup_position_in_grid]], uint i [[thread_index_in_threadgroup]],
                         uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float shared[64];
"""
THREADGROUP = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SIMDGROUP = "simdgroup_barrier(mem_flags::mem_threadgroup);"
DEVICE = "threadgroup_barrier(mem_flags::mem_device);"
SIMDGROUP_DEVICE = "simdgroup_barrier(mem_flags::mem_device);"

# Each writes one element and takes another's: of its simdgroup, of the other one.
WRITE = "shared[i] = float(i);\n"
NEIGHBOUR, STRANGER = "shared[i ^ 1]", "shared[i ^ 32]"
WRITE_DEVICE = "scratch[group.x * 64 + i] = float(i);\n"
NEIGHBOUR_DEVICE, STRANGER_DEVICE = "scratch[group.x * 64 + (i ^ 1)]", "scratch[group.x * 64 + (i ^ 32)]"


def run(body, seed=0):
    out, scratch = np.zeros((2, 128), np.float32)
    fill = "" if "scratch" in body else "\n  scratch[group.x * 64 + i] = 0.0f;"
    text = f"{SIGNATURE}{body}{fill}\n}}"
    buffers = [("out", out, True), ("scratch", scratch, True)]
    metal_shim.run_text(text, "exchange", buffers, grid=(128, 1, 1), threadgroup=(64, 1, 1), mode="hooks", seed=seed)
    return out


def take(what):
    return f"\nout[group.x * 64 + i] = {what};"


@pytest.mark.parametrize(
    ("body", "partner"),
    [
        (WRITE + THREADGROUP + take(NEIGHBOUR), 1),
        (WRITE + THREADGROUP + take(STRANGER), 32),
        (WRITE + SIMDGROUP + take(NEIGHBOUR), 1),
        (WRITE_DEVICE + DEVICE + take(NEIGHBOUR_DEVICE), 1),
        (WRITE_DEVICE + DEVICE + take(STRANGER_DEVICE), 32),
        (WRITE_DEVICE + SIMDGROUP_DEVICE + take(NEIGHBOUR_DEVICE), 1),
        (WRITE + take("shared[i]"), 0),
        (WRITE + THREADGROUP + take(STRANGER) + THREADGROUP + WRITE, 32),
        (WRITE + SIMDGROUP + take(NEIGHBOUR) + SIMDGROUP + WRITE, 1),
    ],
)
def test_ordered(body, partner):
    for seed in range(3):
        np.testing.assert_array_equal(run(body, seed), np.tile(np.arange(64) ^ partner, 2))


RACE = "(race|uninitialised)"  # a value that is read before it is there was never written, or is an old one


@pytest.mark.parametrize(
    ("body", "finding"),
    [
        (WRITE + take(NEIGHBOUR), RACE),
        (WRITE + "simd_shuffle_xor(float(i), 1);" + take(NEIGHBOUR), "race"),
        (WRITE + SIMDGROUP + take(STRANGER), RACE),
        (WRITE + DEVICE + take(STRANGER), "race"),
        (WRITE + "threadgroup_barrier(mem_flags::mem_none);" + take(STRANGER), "race"),
        (WRITE + "simdgroup_barrier(mem_flags::mem_none);" + take(NEIGHBOUR), "race"),
        (WRITE_DEVICE + THREADGROUP + take(STRANGER_DEVICE), "race"),
        (WRITE_DEVICE + SIMDGROUP_DEVICE + take(STRANGER_DEVICE), RACE),
        (WRITE_DEVICE + DEVICE + take("scratch[(1 - group.x) * 64 + i]"), RACE),
        (WRITE + THREADGROUP + take(STRANGER) + WRITE, "race"),
        (WRITE + THREADGROUP + take(STRANGER) + SIMDGROUP + WRITE, "race"),
        (WRITE + THREADGROUP + take(NEIGHBOUR) + WRITE, "race"),
        ("if (lane == 0) shared[0] = 1.0f;" + THREADGROUP + take("shared[0]"), "race"),
        ("shared[i] += 1.0f;" + take("shared[i]"), "uninitialised"),
        (take("0.0f") + "scratch[i] = 0.0f;", "race"),
    ],
)
def test_not_ordered(body, finding):
    for seed in range(3):
        with pytest.raises(RuntimeError, match=rf"^{finding}: "):
            run(body, seed)


def test_bytes_beside_each_other_are_not_one():
    out = np.zeros(64, np.uint8)
    text = """
[[kernel]] void bytes(device uchar* out [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {
  threadgroup uchar shared[64];
  shared[i] = uchar(i);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = shared[i ^ 1];
}
"""
    metal_shim.run_text(text, "bytes", [("out", out, True)], grid=(64, 1, 1), threadgroup=(64, 1, 1), mode="hooks", seed=1)
    np.testing.assert_array_equal(out, np.arange(64) ^ 1)


@pytest.mark.parametrize(("offset", "passes"), [(0, True), (1, False), (2, False), (4, True)])
def test_a_vector_needs_its_alignment(offset, passes):
    text = """
[[kernel]] void vector(const device float* x [[buffer(0)]], const constant int& offset [[buffer(1)]],
                       device float* out [[buffer(2)]], uint i [[thread_index_in_threadgroup]]) {
  const float4 v = *(const device float4*)(x + i * 4 + offset);
  out[i] = v.x + v.y + v.z + v.w;
}
"""
    x, out = np.arange(136, dtype=np.float32), np.zeros(32, np.float32)
    buffers = [("x", x, False), ("offset", np.array([offset], np.int32), False), ("out", out, True)]

    def run_it():
        metal_shim.run_text(text, "vector", buffers, grid=(32, 1, 1), threadgroup=(32, 1, 1), mode="hooks")

    assert x.ctypes.data % 16 == 0
    if passes:
        run_it()
        np.testing.assert_array_equal(out, x[offset : offset + 128].reshape(32, 4).sum(1))
    else:
        with pytest.raises(RuntimeError, match=r"^misaligned: .*vector.metal:4"):
            run_it()


@pytest.mark.parametrize("mode", ["fast", "hooks"])
def test_shuffles_and_reductions(mode):
    names = ["xor", "down", "up", "first", "sum", "low", "high", "before", "any"]
    text = f"""
[[kernel]] void operations({" ".join(f"device float* out_{n} [[buffer({i})]]," for i, n in enumerate(names))}
                           uint i [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {{
  const float x = float((lane * 7 + i / 32) % 32);
  out_xor[i] = simd_shuffle_xor(x, 5);
  const float down = simd_shuffle_down(x, 3);
  out_down[i] = lane < 29 ? down : -1.0f;
  const float up = simd_shuffle_up(x, 3);
  out_up[i] = lane >= 3 ? up : -1.0f;
  out_first[i] = simd_broadcast(x, 9);
  out_sum[i] = simd_sum(x);
  out_low[i] = simd_min(x);
  out_high[i] = simd_max(x + float(i / 32));
  out_before[i] = float(simd_prefix_exclusive_sum(int(x)));
  out_any[i] = simd_any(x == 3.0f) && !simd_all(x == 3.0f) ? 1.0f : 0.0f;
}}
"""
    outs = {name: np.zeros(64, np.float32) for name in names}
    buffers = [(name, out, True) for name, out in outs.items()]
    report = metal_shim.run_text(text, "operations", buffers, grid=(64, 1, 1), threadgroup=(64, 1, 1), mode=mode, seed=4)
    x = np.array([(np.arange(32) * 7 + s) % 32 for s in range(2)], np.float32)
    lanes = np.arange(32)
    expected = {
        "xor": x[:, lanes ^ 5],
        "down": np.where(lanes < 29, x[:, (lanes + 3) % 32], -1),
        "up": np.where(lanes >= 3, x[:, lanes - 3], -1),
        "first": x[:, [9] * 32],
        "sum": np.full((2, 32), 496),
        "low": np.zeros((2, 32)),
        "high": np.repeat([[31], [32]], 32, 1),
        "before": np.cumsum(x, 1) - x,
        "any": np.ones((2, 32)),
    }
    for name, out in outs.items():
        np.testing.assert_array_equal(out.reshape(2, 32), expected[name], err_msg=name)
    assert report["simd_ops"] == 2 * 10
