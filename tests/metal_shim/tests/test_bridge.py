"""A kernel under the shim is a node of MLX's graph: it gets what MLX gives it on a Mac, and its findings reach the caller."""

from __future__ import annotations

import metal_shim
import mlx.core as mx
import numpy as np
import pytest

MODES = ["fast", "hooks"]
ONE_THREAD_EACH = {"grid": (24, 1, 1), "threadgroup": (8, 1, 1)}

COPY = """
  uint i = thread_position_in_grid.x;
  if (i >= uint(x_shape[0] * x_shape[1])) return;
  y[i] = x[i / uint(x_shape[1]) * x_strides[0] + i % uint(x_shape[1]) * x_strides[1]];
"""


def copied(x, mode, dtype=mx.float32):
    (y,) = metal_shim.run_kernel("copy", {"x": x}, {"y": (x.shape, dtype)}, COPY, **ONE_THREAD_EACH, mode=mode)
    return y


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:4, :6],
        lambda x: x[1:5, 2:8],
        lambda x: x[:4, ::2][:, :5],
        lambda x: x[3::-1, 5::-1],
        lambda x: x[:6, :4].T,
        lambda x: mx.broadcast_to(x[2:3, :6], (4, 6)),
    ],
    ids=["corner", "offset", "step", "negative", "transposed", "broadcast"],
)
def test_views_are_passed_by_their_strides(view, mode):
    x = view(mx.arange(80, dtype=mx.float32).reshape(8, 10))
    np.testing.assert_array_equal(np.array(copied(x, mode)), np.array(x))


def test_nothing_outside_a_view_can_be_read():
    x = mx.arange(80, dtype=mx.float32).reshape(8, 10)[2:4, 2:8]
    over = COPY.replace("x[i", "x[BACK + i")
    for back, byte in ((-20, "byte -80 of"), (100, "byte 400 of")):
        (y,) = metal_shim.run_kernel(
            "over", {"x": x}, {"y": (x.shape, mx.float32)}, over, f"#define BACK {back}\n", **ONE_THREAD_EACH
        )
        with pytest.raises(RuntimeError, match=f"^out of bounds: .*reads buffer x, {byte}"):
            mx.eval(y)


@pytest.mark.parametrize(("first", "aligned"), [(0, True), (4, True), (2, False)])
def test_alignment_is_that_of_the_view_in_its_array(first, aligned):
    """MLX's arrays start aligned on a GPU, whatever malloc gives on this machine."""
    x = mx.arange(40, dtype=mx.float32)[first : first + 32]
    source = "uint i = thread_position_in_grid.x; *(device float4*)(y + 4 * i) = *(const device float4*)(x + 4 * i);"
    (y,) = metal_shim.run_kernel("quads", {"x": x}, {"y": ((32,), mx.float32)}, source, grid=(8, 1, 1), threadgroup=(8, 1, 1))
    if aligned:
        np.testing.assert_array_equal(np.array(y), np.array(x))
    else:
        with pytest.raises(RuntimeError, match=r"^misaligned: .*buffer x"):
            mx.eval(y)


def test_a_launch_has_the_buffers_that_the_kernel_names():
    text = "[[kernel]] void two(device int* a [[buffer(0)]], device int* b [[buffer(1)]]) { a[0] = b[0] = 1; }"
    with pytest.raises(RuntimeError, match=r"^compile: two names 2 buffers, the launch has 1"):
        metal_shim.run_text(text, "two", [("a", np.zeros(1, np.int32), True)], grid=(1, 1, 1), threadgroup=(1, 1, 1))


@pytest.mark.parametrize("mode", MODES)
def test_scalars_and_small_arrays(mode):
    inputs = {
        "scalar": mx.array(2.5),
        "small": mx.array([1, 2, 3]),
        "large": mx.arange(9),
        "half_number": mx.array([0.5], mx.bfloat16),
    }
    source = """
  if (thread_position_in_grid.x == 0) {
    sums[0] = scalar + float(small[2]) + float(large[8]) + float(half_number[0]);
    sums[1] = float(small_shape[0]) + float(large_ndim);
  }
"""
    (sums,) = metal_shim.run_kernel("sums", inputs, {"sums": ((2,), mx.float32)}, source, **ONE_THREAD_EACH, mode=mode)
    assert sums.tolist() == [14.0, 4.0]


def test_results_go_on_in_the_graph():
    x = mx.arange(24, dtype=mx.float32).reshape(4, 6)
    y = copied(copied(x * 2, "hooks") + 1, "fast").sum()
    assert y.item() == float((np.arange(24) * 2 + 1).sum())


def test_several_outputs():
    source = "uint i = thread_position_in_grid.x; a[i] = int(i); b[i] = half(float(i) * 0.5f);"
    outputs = {"a": ((24,), mx.int32), "b": ((24,), mx.float16)}
    a, b = metal_shim.run_kernel("two", {}, outputs, source, **ONE_THREAD_EACH)
    np.testing.assert_array_equal(np.array(b), np.array(a) * 0.5)


def test_the_grid_is_in_threads_and_its_end_is_cut():
    source = "if (thread_position_in_threadgroup.x == 0) n[threadgroup_position_in_grid.x] = int(threads_per_threadgroup.x);"
    (n,) = metal_shim.run_kernel("cut", {}, {"n": ((3,), mx.int32)}, source, grid=(40, 1, 1), threadgroup=(16, 1, 1))
    assert n.tolist() == [16, 16, 8]


@pytest.mark.parametrize("mode", MODES)
def test_a_finding_is_raised_by_eval_and_the_next_kernel_runs(mode):
    wild = COPY.replace("x[i", "x[1000000000 + i")
    x = mx.ones((4, 6))
    (y,) = metal_shim.run_kernel("wild", {"x": x}, {"y": (x.shape, mx.float32)}, wild, **ONE_THREAD_EACH, mode=mode)
    with pytest.raises(RuntimeError, match=r"^out of bounds: .*buffer x"):
        mx.eval(y + 1)
    np.testing.assert_array_equal(np.array(copied(x, mode)), 1)


def test_the_text_is_what_mlx_would_send():
    copied(mx.ones((2, 3)), "fast").tolist()
    text = metal_shim.recorded_texts()["copy"]
    assert "[[kernel]] void custom_kernel_copy" in text
    assert "const constant float* x [[buffer(0)]]" in text
    assert "const constant int64_t* x_strides [[buffer(2)]]" in text
    assert COPY.strip() in text


def test_counters_of_each_run():
    metal_shim.clear_reports()
    copied(mx.ones((4, 6)), "hooks").tolist()
    (report,) = metal_shim.reports()
    assert report["device_bytes_read"]["x"] == report["device_bytes_written"]["y"] == 96
    assert report["threadgroups"] == 3


def test_the_seed_perturbs_the_fast_functions_only():
    source = "uint i = thread_position_in_grid.x; a[i] = fast::exp2(x[i]); b[i] = precise::exp(x[i]);"
    x = mx.random.uniform(-10, 10, (24,))
    outputs = dict.fromkeys("ab", ((24,), mx.float32))
    runs = [metal_shim.run_kernel("fast_exp", {"x": x}, outputs, source, **ONE_THREAD_EACH, seed=seed) for seed in (0, 1, 2)]
    (a0, b0), (a1, b1), (a2, b2) = [[np.array(y) for y in run] for run in runs]
    np.testing.assert_array_max_ulp(a0, np.exp2(np.array(x)), 1)
    np.testing.assert_array_max_ulp(a0, a1, 2)
    assert (a0 != a1).any()
    assert (a1 != a2).any()
    np.testing.assert_array_equal(b0, b1)
    np.testing.assert_array_equal(b0, b2)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode is"):
        metal_shim.launcher_capsule("slow")
