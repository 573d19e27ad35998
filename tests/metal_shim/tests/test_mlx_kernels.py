"""MLX's own kernels run under the shim and give the right numbers, with no finding: it raises no false alarms."""

from __future__ import annotations

import struct

import metal_shim
import numpy as np
import pytest
from mlx_kernels import text_of

MODES = ["fast", "hooks"]
ABSENT = ("absent", np.zeros(1, np.uint8), False)


def attention(q, k, v, causal):
    """softmax(q k^T / sqrt(D)) v in float64; shapes (batch, heads, length, dim)."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.astype(np.float64), np.repeat(k, group, 1).astype(np.float64), np.repeat(v, group, 1).astype(np.float64)
    scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool), k.shape[2] - q.shape[2]), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v


def inputs(heads, kv_heads, seqlen_q, seqlen_k, dim, dtype=np.float16):
    rng = np.random.default_rng(dim + seqlen_k)
    shapes = [(1, heads, seqlen_q, dim), (1, kv_heads, seqlen_k, dim), (1, kv_heads, seqlen_k, dim)]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "dim", "block_k", "causal"),
    [(64, 64, 64, 32, False), (96, 96, 64, 32, True), (50, 133, 64, 32, True), (50, 77, 128, 16, False)],
)
def test_steel_attention(seqlen_q, seqlen_k, dim, block_k, causal, mode):
    heads, kv_heads, block_q = 2, 1, 32
    q, k, v = inputs(heads, kv_heads, seqlen_q, seqlen_k, dim)
    out = np.zeros(q.shape, np.float16)
    blocks = -(-seqlen_q // block_q)
    sizes = [1, heads, dim, seqlen_q, seqlen_k, heads // kv_heads]
    whole_q, rest_q = divmod(seqlen_q, block_q)
    whole_k, rest_k = divmod(seqlen_k, block_k)
    counts = [blocks, -(-seqlen_k // block_k), whole_q, whole_k, rest_q, rest_k, seqlen_k - seqlen_q]
    strides = [stride // x.itemsize for x in (q, k, v, out) for stride in x.strides[:3]]
    params = struct.pack("<6if7i12q", *sizes, dim**-0.5, *counts, *strides)
    text = text_of(
        "steel/attn/kernels/steel_attention.h",
        align_Q=seqlen_q % block_q == 0,
        align_K=seqlen_k % block_k == 0,
        do_causal=causal,
    )
    buffers = [
        ("Q", q, False),
        ("K", k, False),
        ("V", v, False),
        ("O", out, True),
        ("params", np.frombuffer(params, np.uint8).copy(), False),
    ]
    report = metal_shim.run_text(
        text,
        f"attention<half, {block_q}, {block_k}, {dim}, {dim}, 4, 1, float, float>",
        [*buffers, ABSENT, ABSENT, ABSENT, ABSENT],
        grid=(blocks * 32, heads * 4, 1),
        threadgroup=(32, 4, 1),
        mode=mode,
        seed=7,
    )
    np.testing.assert_allclose(out, attention(q, k, v, causal), atol=2e-3)
    assert report["threadgroups"] == blocks * heads
    if not causal:
        tiles = blocks * block_q * (-(-seqlen_k // block_k) * block_k)
        assert report["matrix_flops"] == 4 * heads * tiles * dim
    if mode == "hooks" and not causal:
        assert report["device_bytes_written"]["O"] == out.nbytes
        # V is read once by each row block of each query head, tails a little more: 16 bytes at a time.
        assert v.nbytes * blocks * heads <= report["device_bytes_read"]["V"] <= 1.1 * v.nbytes * blocks * heads + 4096


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_vector(causal, mode):
    heads, kv_heads, seqlen_q, seqlen_k, dim = 2, 1, 2, 75, 64
    q, k, v = inputs(heads, kv_heads, seqlen_q, seqlen_k, dim, np.float32)
    out = np.zeros(q.shape, np.float32)
    numbers = [
        ("gqa_factor", np.int32(heads // kv_heads)),
        ("N", np.int32(seqlen_k)),
        ("k_head_stride", np.uint64(seqlen_k * dim)),
        ("k_seq_stride", np.uint64(dim)),
        ("v_head_stride", np.uint64(seqlen_k * dim)),
        ("v_seq_stride", np.uint64(dim)),
        ("scale", np.float32(dim**-0.5)),
    ]
    buffers = [("queries", q, False), ("keys", k, False), ("values", v, False), ("out", out, True)]
    buffers += [(name, np.array([number]), False) for name, number in numbers] + [ABSENT] * 7
    report = metal_shim.run_text(
        text_of("sdpa_vector.h", do_causal=causal),
        f"sdpa_vector<float, {dim}, {dim}>",
        buffers,
        grid=(heads * 1024, seqlen_q, 1),
        threadgroup=(1024, 1, 1),
        mode=mode,
        seed=3,
    )
    np.testing.assert_allclose(out, attention(q, k, v, causal), atol=1e-5)
    if mode == "hooks" and not causal:
        assert report["device_bytes_read"]["keys"] == k.nbytes * heads * seqlen_q


@pytest.mark.parametrize("mode", MODES)
def test_sdpa_vector_in_two_passes(mode):
    heads, kv_heads, seqlen_k, dim, blocks = 4, 2, 150, 64, 32
    q, k, v = inputs(heads, kv_heads, 1, seqlen_k, dim, np.float32)
    partials = np.zeros((heads, blocks, dim), np.float32)
    sums, maxs = np.zeros((2, heads, blocks), np.float32)
    numbers = [np.int32(seqlen_k), *[np.uint64(n) for n in (seqlen_k * dim, dim, seqlen_k * dim, dim)], np.float32(dim**-0.5)]
    buffers = [("queries", q, False), ("keys", k, False), ("values", v, False), ("partials", partials, True)]
    buffers += [("sums", sums, True), ("maxs", maxs, True), ABSENT]
    buffers += [("number", np.array([number]), False) for number in numbers] + [ABSENT] * 6
    text = text_of("sdpa_vector.h", blocks=blocks)
    group = heads // kv_heads
    grid = {"grid": (kv_heads * 32, group, blocks), "threadgroup": (32, group, 1)}
    metal_shim.run_text(text, f"sdpa_vector_2pass_1<float, {dim}, {dim}, 4>", buffers, **grid, mode=mode, seed=1)
    out = np.zeros(q.shape, np.float32)
    buffers = [("partials", partials, False), ("sums", sums, False), ("maxs", maxs, False), ("out", out, True)]
    buffers += [("blocks", np.array([blocks], np.int32), False)]
    grid = {"grid": (heads * 1024, 1, 1), "threadgroup": (1024, 1, 1)}
    metal_shim.run_text(text, f"sdpa_vector_2pass_2<float, {dim}>", buffers, **grid, mode=mode, seed=1)
    np.testing.assert_allclose(out, attention(q, k, v, False), atol=1e-5)
