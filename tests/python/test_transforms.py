"""Attention inside MLX's own machinery: laziness, compile, grad, vmap, checkpoint, streams and threads."""

from __future__ import annotations

import threading

import mlx.core as mx
import numpy as np
import pytest
from support import DTYPES, integers, name_of, normal, packed_qkv, qkv, to_numpy

from flash_attn import flash_attn_func, flash_attn_varlen_func

OPTIONS = [{}, {"causal": True}, {"window_size": (5, 2), "softcap": 3.0}]


def close(a: mx.array, b: mx.array, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(to_numpy(a), to_numpy(b), atol=atol)


def test_shapes_and_dtypes_are_known_before_evaluation(rng):
    q, k, v = (normal(rng, *shape, dtype=mx.bfloat16) for shape in [(2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 12)])
    out, lse = flash_attn_func(q, k, v, return_softmax_lse=True)
    assert (out.shape, out.dtype) == ((2, 5, 4, 12), mx.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 4, 5), mx.float32)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_compile_changes_nothing(rng, options, dtype):
    arguments = list(qkv(rng, dtype=dtype).values())

    def function(q, k, v):
        return flash_attn_func(q * 2, k, v, **options) + 1

    close(mx.compile(function)(*arguments), function(*arguments))


def test_compile_of_a_gradient_changes_nothing(rng):
    arguments = list(qkv(rng).values())
    gradient = mx.grad(lambda q, k, v: (flash_attn_func(q, k, v, causal=True) ** 2).sum(), argnums=(0, 1, 2))
    for compiled, plain in zip(mx.compile(gradient)(*arguments), gradient(*arguments), strict=True):
        close(compiled, plain, 1e-5)


def test_shapeless_compile_follows_the_shape(rng):
    compiled = mx.compile(lambda q, k, v: flash_attn_func(q, k, v, causal=True), shapeless=True)
    for seqlen in (10, 25, 3):
        arguments = list(qkv(rng, 1, seqlen).values())
        close(compiled(*arguments), flash_attn_func(*arguments, causal=True))


def test_compile_draws_a_new_dropout_mask_when_random_state_is_captured(rng):
    q, k, v = qkv(rng).values()

    def function(q):
        return flash_attn_func(q, k, v, dropout_p=0.3)

    compiled = mx.compile(function, inputs=mx.random.state, outputs=mx.random.state)
    assert not mx.array_equal(compiled(q), compiled(q))


def test_value_and_grad_gives_both(rng):
    arguments = list(qkv(rng).values())

    def loss(*x):
        return flash_attn_func(*x, causal=True).sum()

    value, gradients = mx.value_and_grad(loss, argnums=(0, 1, 2))(*arguments)
    close(value, loss(*arguments), 1e-3)
    for got, want in zip(gradients, mx.grad(loss, argnums=(0, 1, 2))(*arguments), strict=True):
        assert mx.array_equal(got, want)


def test_the_gradient_of_one_argument_is_the_same_as_among_all(rng):
    arguments = list(qkv(rng).values())

    def loss(*x):
        return (flash_attn_func(*x) ** 2).sum()

    together = mx.grad(loss, argnums=(0, 1, 2))(*arguments)
    for argument in range(3):
        assert mx.array_equal(mx.grad(loss, argnums=argument)(*arguments), together[argument])


@pytest.mark.parametrize("in_axes", [(0, 0, 0), (0, None, None), (None, 0, 0), (1, 0, 2), (-1, 0, 0)], ids=str)
def test_vmap_equals_a_loop(rng, in_axes):
    arguments = list(qkv(rng, 2, 9, 11, 4, 2, 16).values())
    stacked = []
    for x, axis in zip(arguments, in_axes, strict=True):
        stacked.append(x if axis is None else mx.stack([x, x * 0.5, x + 1], axis=axis))

    def function(*x):
        return flash_attn_func(*x, causal=True, return_softmax_lse=True)

    def item(x, axis, i):
        return x if axis is None else mx.take(x, i, axis=axis)

    out, lse = mx.vmap(function, in_axes=in_axes)(*stacked)
    for i in range(3):
        want_out, want_lse = function(*(item(x, axis, i) for x, axis in zip(stacked, in_axes, strict=True)))
        close(out[i], want_out)
        close(lse[i], want_lse)


def test_vmap_of_the_small_inputs(rng):
    q, k, v = qkv(rng, 2, 9, 11).values()
    masks, sinks, slopes = normal(rng, 3, 9, 11), normal(rng, 3, 4), normal(rng, 3, 2, 4)

    def function(mask, sink, slope):
        return flash_attn_func(q, k, v, attn_mask=mask, learnable_sink=sink, alibi_slopes=slope)

    out = mx.vmap(function)(masks, sinks, slopes)
    for i in range(3):
        close(out[i], function(masks[i], sinks[i], slopes[i]))


def test_vmap_of_dropout_keys_draws_each_items_own_mask(rng):
    q, k, v = qkv(rng, 1, 9).values()
    keys = mx.random.split(mx.random.key(1), 3)

    def function(key):
        return flash_attn_func(q, k, v, dropout_p=0.4, dropout_key=key)

    out = mx.vmap(function)(keys)
    for i in range(3):
        close(out[i], function(keys[i]))


def test_vmap_of_packed_sequences(rng):
    arguments = packed_qkv(rng, [4, 9], [6, 5], dim=8)
    bounds = [arguments[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")]
    q = mx.stack([arguments["q"], arguments["q"] * 2])

    def function(q):
        return flash_attn_varlen_func(q, arguments["k"], arguments["v"], *bounds, causal=True)

    out = mx.vmap(function)(q)
    for i in range(2):
        close(out[i], function(q[i]))


def test_vmap_of_grad_and_grad_of_vmap_agree(rng):
    arguments = [mx.stack([x, x * 2]) for x in qkv(rng, 1, 7, 8, 2, 1, 8).values()]

    def loss(*x):
        return (flash_attn_func(*x) ** 2).sum()

    inner = mx.vmap(mx.grad(loss, argnums=(0, 1, 2)))(*arguments)
    outer = mx.grad(lambda *x: mx.vmap(loss)(*x).sum(), argnums=(0, 1, 2))(*arguments)
    for a, b in zip(inner, outer, strict=True):
        close(a, b, 1e-5)


def test_checkpoint_recomputes_the_same_mask_from_a_dropout_key(rng):
    arguments = list(qkv(rng).values())
    key = mx.random.key(9)

    def loss(q, k, v):
        return (flash_attn_func(q, k, v, dropout_p=0.3, dropout_key=key) ** 2).sum()

    checkpointed = mx.grad(lambda *x: mx.checkpoint(loss)(*x), argnums=(0, 1, 2))(*arguments)
    for got, want in zip(checkpointed, mx.grad(loss, argnums=(0, 1, 2))(*arguments), strict=True):
        assert mx.array_equal(got, want)


def test_a_gradient_inside_a_longer_graph(rng):
    x, weight = normal(rng, 2, 12, 4, 16), normal(rng, 16, 48)

    def model(x, weight):
        q, k, v = mx.split(x @ weight, 3, axis=-1)
        return flash_attn_func(mx.tanh(q), k, mx.sigmoid(v), causal=True).sum()

    def plain(x, weight):
        q, k, v = (y.transpose(0, 2, 1, 3) for y in mx.split(x @ weight, 3, axis=-1))
        return mx.fast.scaled_dot_product_attention(mx.tanh(q), k, mx.sigmoid(v), scale=0.25, mask="causal").sum()

    for got, want in zip(mx.grad(model, (0, 1))(x, weight), mx.grad(plain, (0, 1))(x, weight), strict=True):
        close(got, want, 1e-3)


def count_nodes(array: mx.array, tmp_path) -> int:
    path = tmp_path / "graph.dot"
    mx.export_to_dot(str(path), array)
    text = path.read_text()
    return text.count("Attention")


def test_equal_calls_are_merged_by_compile(rng, tmp_path):
    """is_equivalent says when two nodes compute the same: compile drops one, and keeps those that differ."""
    q, k, v = qkv(rng, 1, 8).values()
    same = mx.compile(lambda q: flash_attn_func(q, k, v, causal=True) + flash_attn_func(q, k, v, causal=True))
    different = mx.compile(lambda q: flash_attn_func(q, k, v, causal=True) + flash_attn_func(q, k, v))
    close(same(q), 2 * flash_attn_func(q, k, v, causal=True))
    close(different(q), flash_attn_func(q, k, v, causal=True) + flash_attn_func(q, k, v))
    assert count_nodes(different(q), tmp_path) > count_nodes(same(q), tmp_path) > 0


def test_streams_run_side_by_side(rng):
    arguments = list(qkv(rng, 2, 130).values())
    want = flash_attn_func(*arguments, causal=True)
    streams = [mx.new_stream(mx.cpu) for _ in range(3)]
    results = [flash_attn_func(*arguments, causal=True, stream=stream) for stream in streams for _ in range(4)]
    mx.eval(results)
    assert all(mx.array_equal(result, want) for result in results)


def test_a_stream_or_a_device_may_be_given(rng):
    arguments = list(qkv(rng).values())
    want = flash_attn_func(*arguments)
    for stream in (mx.cpu, mx.Device(mx.cpu), mx.default_stream(mx.cpu)):
        assert mx.array_equal(flash_attn_func(*arguments, stream=stream), want)


def test_python_threads_evaluate_at_once(rng):
    arguments = [np.array(x) for x in qkv(rng, 2, 130).values()]
    want = np.array(flash_attn_func(*(mx.array(x) for x in arguments), causal=True))
    results: dict[int, np.ndarray] = {}

    def work(index: int) -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            for _ in range(3):
                results[index] = np.array(flash_attn_func(*(mx.array(x) for x in arguments), causal=True))

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4
    assert all(np.array_equal(result, want) for result in results.values())


def test_lengths_computed_in_the_graph_are_not_evaluated_by_the_call(rng):
    arguments = packed_qkv(rng, [4, 9], [4, 9])
    want = flash_attn_varlen_func(*arguments.values(), causal=True)
    lengths = integers(4, 9)

    def function(lengths):
        bounds = mx.concatenate([mx.zeros((1,), mx.int32), mx.cumsum(lengths)])
        return flash_attn_varlen_func(arguments["q"], arguments["k"], arguments["v"], bounds, bounds, 9, 9, causal=True)

    close(mx.compile(function)(lengths), want)  # inside compile an evaluation would raise


@pytest.mark.parametrize("path", ["kernel", "reference"])
def test_vmap_of_everything_at_once_equals_a_loop(rng, monkeypatch, path):
    monkeypatch.setenv("FLASH_ATTENTION_MLX_REF", "1" if path == "reference" else "0")
    q, k, v = (mx.stack([x, x + 1]) for x in qkv(rng, 2, 9, 11, 4, 2, 8).values())
    keys = mx.random.split(mx.random.key(3), 2)
    lengths = mx.stack([integers(4, 11), integers(0, 7)])

    def function(q, k, v, key, lengths):
        return flash_attn_func(q, k, v, dropout_p=0.2, dropout_key=key, seqused_k=lengths, causal=True)

    out = mx.vmap(function)(q, k, v, keys, lengths)
    for i in range(2):
        close(out[i], function(q[i], k[i], v[i], keys[i], lengths[i]))
