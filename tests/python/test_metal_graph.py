"""Attention on Metal as MLX sees it: which calls go to its kernels, what transformations make of them, what a kernel that fails
does. The kernels run under the shim; their numbers have tests of their own."""

from __future__ import annotations

import warnings

import mlx.core as mx
import numpy as np
import pytest
from metal_support import metal_graph
from support import integers, normal, packed_qkv, qkv, to_numpy

import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

FORWARD = "flash_attn_forward"
BACKWARD_DKV = "flash_attn_backward_dkv"


@pytest.fixture(autouse=True)
def only_once(request):
    if request.config.getoption("--metal-shim"):
        pytest.skip("these tests choose the launcher")


def kernels_run(shim) -> list[str]:
    """Since the last look."""
    names = [report["function"] for report in shim.reports()]
    shim.clear_reports()
    return names


def ran(shim, kernel: str) -> int:
    return sum(kernel in name for name in kernels_run(shim))


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(to_numpy(a), to_numpy(b), atol=atol)


def on_cpu(function):
    """What the CPU backend gives."""
    result = function()
    mx.eval(result)
    return result


# ---- routes


def test_a_plain_call_goes_to_sdpa(rng):
    arguments = qkv(rng, 1, 20).values()
    want = on_cpu(lambda: flash_attn_func(*arguments, causal=True))
    with metal_graph(route="auto") as shim:
        shim.clear_reports()
        close(flash_attn_func(*arguments, causal=True), want)
        assert kernels_run(shim) == []


@pytest.mark.parametrize(
    "options",
    [{"return_softmax_lse": True}, {"softcap": 2.0}, {"window_size": (4, 0)}, {"attn_mask": mx.ones((20, 20), mx.bool_)}],
    ids=lambda options: next(iter(options)),
)
def test_what_sdpa_lacks_goes_to_the_kernel(rng, options):
    arguments = qkv(rng, 1, 20).values()
    with metal_graph(route="auto") as shim:
        shim.clear_reports()
        mx.eval(flash_attn_func(*arguments, **options))
        assert ran(shim, FORWARD) == 1


def test_a_gradient_goes_to_the_kernels(rng):
    arguments = list(qkv(rng, 1, 20).values())
    with metal_graph(route="auto") as shim:
        shim.clear_reports()
        mx.eval(mx.grad(lambda *x: flash_attn_func(*x).sum(), argnums=(0, 1, 2))(*arguments))
        names = kernels_run(shim)
    for kernel in (FORWARD, "flash_attn_delta", "flash_attn_backward_dq", BACKWARD_DKV):
        assert sum(kernel in name for name in names) == 1


def test_a_gradient_that_nobody_wants_is_not_computed(rng):
    arguments = list(qkv(rng, 1, 20).values())
    with metal_graph() as shim:
        shim.clear_reports()
        mx.eval(mx.grad(lambda *x: flash_attn_func(*x).sum())(*arguments))
        assert ran(shim, BACKWARD_DKV) == 0


def test_large_head_dims_go_to_the_reference_with_one_warning(rng):
    arguments = qkv(rng, 1, 8, dim=320).values()
    want = on_cpu(lambda: flash_attn_func(*arguments, softcap=2.0))
    with metal_graph(route="auto") as shim:
        shim.clear_reports()
        with pytest.warns(RuntimeWarning, match="head dim 320"):
            close(flash_attn_func(*arguments, softcap=2.0), want)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mx.eval(flash_attn_func(*arguments, softcap=2.0))
        assert kernels_run(shim) == []


def test_large_head_dims_cannot_be_forced_to_the_kernel(rng):
    with metal_graph(route="kernel"), pytest.raises(ValueError, match=r"ROUTE=kernel: head dim 320"):
        flash_attn_func(*qkv(rng, 1, 8, dim=320).values())


def test_every_route_says_why(rng):
    q, k, v = qkv(rng, 1, 8).values()
    with metal_graph(route="auto"):
        for options, target in (({}, "sdpa"), ({"softcap": 1.0}, "kernel")):
            found, why = flash_attn._route(q, k, v, **options)
            assert found == target
            assert why


@pytest.mark.parametrize(
    ("shape_q", "shape_k"),
    [((0, 5, 2, 8), (0, 5, 2, 8)), ((2, 0, 2, 8), (2, 5, 2, 8)), ((2, 5, 2, 8), (2, 0, 2, 8))],
    ids=["no batch", "no query", "no key"],
)
def test_empty_tensors_launch_nothing(shape_q, shape_k):
    q, k = mx.zeros(shape_q), mx.zeros(shape_k)
    sink = mx.array([1.0, 2.0])
    want = on_cpu(lambda: flash_attn_func(q, k, k, learnable_sink=sink, return_softmax_lse=True))
    with metal_graph() as shim:
        shim.clear_reports()
        out, lse = flash_attn_func(q, k, k, learnable_sink=sink, return_softmax_lse=True)
        gradients = mx.grad(lambda *x: flash_attn_func(*x, learnable_sink=sink).sum(), argnums=(0, 1, 2))(q, k, k)
        mx.eval(out, lse, gradients)
        assert kernels_run(shim) == []
    close(out, want[0])
    close(lse, want[1])
    assert all(mx.all(gradient == 0) for gradient in gradients)


# ---- transformations


def loss(q, k, v):
    out, lse = flash_attn_func(q, k, v, causal=True, return_softmax_lse=True)
    return (out**2).sum() + mx.sin(lse).sum()


def test_value_and_grad_agree_with_the_cpu(rng):
    arguments = list(qkv(rng, 2, 21, 34).values())
    function = mx.value_and_grad(loss, argnums=(0, 1, 2))
    value, gradients = on_cpu(lambda: function(*arguments))
    with metal_graph("hooks"):
        value_here, gradients_here = function(*arguments)
        close(value_here, value, 1e-3)
        for here, there in zip(gradients_here, gradients, strict=True):
            close(here, there, 1e-4)


@pytest.mark.parametrize("wrap", [mx.compile, mx.checkpoint], ids=["compile", "checkpoint"])
def test_a_wrapped_gradient_is_the_same(rng, wrap):
    arguments = list(qkv(rng, 1, 21).values())
    with metal_graph():
        want = mx.grad(loss, argnums=(0, 1, 2))(*arguments)
        got = (
            mx.compile(mx.grad(loss, argnums=(0, 1, 2)))(*arguments)
            if wrap is mx.compile
            else mx.grad(mx.checkpoint(loss), argnums=(0, 1, 2))(*arguments)
        )
        for a, b in zip(got, want, strict=True):
            close(a, b)


@pytest.mark.parametrize("axis", [0, 1, 4])
def test_vmap_applies_to_each_slice(rng, axis):
    q, k, v = (normal(rng, 3, 1, 9, 2, 8) for _ in range(3))
    along = [mx.moveaxis(x, 0, axis) for x in (q, k)]
    with metal_graph():
        mapped = mx.vmap(lambda q, k, v: flash_attn_func(q, k, v, causal=True), in_axes=(axis, axis, 0))(*along, v)
        for i in range(3):
            close(mapped[i], flash_attn_func(q[i], k[i], v[i], causal=True))


def test_vmap_of_a_gradient_and_gradient_of_a_vmap(rng):
    q, k, v = (normal(rng, 2, 1, 9, 2, 8) for _ in range(3))
    with metal_graph():
        inside = mx.vmap(mx.grad(loss))(q, k, v)
        outside = mx.grad(lambda q: mx.vmap(loss)(q, k, v).sum())(q)
        for i in range(2):
            want = mx.grad(loss)(q[i], k[i], v[i])
            close(inside[i], want)
            close(outside[i], want)


def test_vmap_over_nothing_gives_nothing():
    x = mx.zeros((0, 1, 9, 2, 8))
    with metal_graph() as shim:
        shim.clear_reports()
        assert mx.vmap(flash_attn_func)(x, x, x).shape == (0, 1, 9, 2, 8)


def test_what_has_no_derivative_says_so(rng):
    q, k, v = qkv(rng, 1, 8).values()
    with metal_graph():
        with pytest.raises(NotImplementedError, match="jvp"):
            mx.jvp(lambda q: flash_attn_func(q, k, v), [q], [q])
        with pytest.raises(NotImplementedError, match="second derivative"):
            mx.grad(lambda q: mx.grad(lambda q: flash_attn_func(q, k, v).sum())(q).sum())(q)


def test_equal_calls_are_merged_by_compile(rng):
    q, k, v = qkv(rng, 1, 8).values()
    with metal_graph() as shim:
        shim.clear_reports()
        mx.eval(mx.compile(lambda q: flash_attn_func(q, k, v) + flash_attn_func(q, k, v))(q))
        assert ran(shim, FORWARD) == 1
        mx.eval(mx.compile(lambda q: flash_attn_func(q, k, v) + flash_attn_func(q, k, v, softmax_scale=2.0))(q))
        assert ran(shim, FORWARD) == 2


# ---- arrays


def views(rng):
    wide = normal(rng, 2, 12, 3, 4, 16)
    yield "qkv packed", wide[:, :, 0], wide[:, :, 1], wide[:, :, 2]
    heads_first = normal(rng, 2, 4, 12, 16)
    yield "heads first", *[heads_first.transpose(0, 2, 1, 3)] * 3
    dims_first = normal(rng, 2, 16, 12, 4)
    yield "dims first", *[dims_first.transpose(0, 2, 3, 1)] * 3
    yield "backwards", *[wide[:, ::-1, 0]] * 3
    yield "broadcast", *[mx.broadcast_to(wide[:1, :, 0], (2, 12, 4, 16))] * 3


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("evaluated", [True, False])
def test_views_of_any_strides(rng, index, evaluated):
    _, q, k, v = list(views(rng))[index]
    if evaluated:
        mx.eval(q, k, v)
    want = on_cpu(lambda: mx.grad(loss, argnums=(0, 1, 2))(q, k, v))
    with metal_graph("hooks"):
        for got, expected in zip(mx.grad(loss, argnums=(0, 1, 2))(q, k, v), want, strict=True):
            close(got, expected, 1e-4)


def test_a_sink_has_a_gradient(rng):
    arguments = qkv(rng, 2, 13, 20, dtype=mx.bfloat16)
    sink = mx.array([0.5, -1.0, 2.0, -mx.inf][: arguments["q"].shape[2]])

    def function(sink):
        out, lse = flash_attn_func(*arguments.values(), learnable_sink=sink, window_size=(3, -1), return_softmax_lse=True)
        return (out.astype(mx.float32) ** 2).sum() + mx.where(mx.isfinite(lse), lse, 0.0).sum()

    want = on_cpu(lambda: mx.grad(function)(sink))
    with metal_graph("hooks"):
        close(mx.grad(function)(sink), want, 2e-2)


def test_the_dropout_mask_is_that_of_the_cpu_bit_for_bit(rng):
    """With V the identity a row of out is the row of probabilities, 0 exactly where one was dropped."""
    keys = 64
    q, k = normal(rng, 2, 50, 2, 32), normal(rng, 2, keys, 2, 32)
    v = mx.broadcast_to(mx.eye(keys)[None, :, None, :], (2, keys, 2, keys))
    options = {"dropout_p": 0.4, "dropout_key": mx.random.key(11)}
    want = on_cpu(lambda: flash_attn_func(q, k, v, **options))
    with metal_graph():
        got = flash_attn_func(q, k, v, **options)
        assert mx.array_equal(got == 0, want == 0)
    assert 0.3 < mx.mean(want == 0).item() < 0.5


# ---- texts


def test_a_name_stands_for_one_text(rng):
    """MLX keeps compiled kernels by their names."""
    calls = [{}, {"causal": True}, {"softcap": 3.0}, {"dropout_p": 0.5, "dropout_key": mx.random.key(0)}]
    texts: dict[str, str] = {}
    for heads, dim, dtype in ((2, 16, mx.float32), (2, 24, mx.float16), (8, 16, mx.bfloat16)):
        for options in calls:
            with metal_graph("record") as shim:
                arguments = list(qkv(rng, 1, 9, heads=heads, dim=dim, dtype=dtype).values())
                mx.eval(mx.grad(lambda *x, o=options: flash_attn_func(*x, **o).sum(), argnums=(0, 1, 2))(*arguments))
                for name, text in shim.recorded_texts().items():
                    assert texts.setdefault(name, text) == text


# ---- kernels that fail


WRONG_NUMBERS = {FORWARD: ("O.scale_rows(end.scale)", "O.scale_rows(end.scale * 0.9f)")}
NO_METAL = {FORWARD: ("using namespace flash_attn;", "using namespace flash_attn; this is not Metal;")}
WRONG_GRADIENT = {BACKWARD_DKV: ("using namespace flash_attn;", "using namespace flash_attn; this is not Metal;")}


def test_right_kernels_pass_their_probe(rng):
    arguments = list(qkv(rng, 1, 90).values())
    with metal_graph(probe=True) as shim, warnings.catch_warnings():
        warnings.simplefilter("error")
        shim.clear_reports()
        mx.eval(mx.grad(loss, argnums=(0, 1, 2))(*arguments))
        assert ran(shim, FORWARD) == 2
        mx.eval(mx.grad(loss, argnums=(0, 1, 2))(*arguments))
        assert ran(shim, FORWARD) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "softcap": 5.0},
        {"window_size": (30, 0), "learnable_sink": mx.zeros(4)},
        {"alibi_slopes": mx.array([0.1, 0.2, 0.3, 0.4]), "seqused_k": integers(70, 100)},
        {"dropout_p": 0.2, "dropout_key": mx.random.key(5)},
        {"attn_mask": mx.zeros((1, 4, 90, 1))},
        {"attention_chunk": 32},
    ],
    ids=lambda options: "+".join(options),
)
def test_probes_of_every_feature_pass(rng, options):
    arguments = list(qkv(rng, 2, 90, 100, heads=4).values())
    with metal_graph(probe=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        mx.eval(mx.grad(lambda *x: flash_attn_func(*x, **options).sum(), argnums=(0, 1, 2))(*arguments))


def test_the_probe_of_packed_sequences_passes(rng):
    arguments = packed_qkv(rng, [30, 0, 55], [20, 10, 60])
    with metal_graph(probe=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        mx.eval(mx.grad(lambda q: flash_attn_varlen_func(q, **arguments, causal=True).sum())(arguments.pop("q")))


def cache_calls(rng):
    """Arguments of flash_attn_with_kvcache, by what is special about them."""

    def cache(*shape, dtype=mx.float16):
        return {"k_cache": normal(rng, *shape, 2, 32, dtype=dtype), "v_cache": normal(rng, *shape, 2, 32, dtype=dtype)}

    q = normal(rng, 2, 1, 4, 32, dtype=mx.float16)
    new = {"k": normal(rng, 2, 1, 2, 32, dtype=mx.float16), "v": normal(rng, 2, 1, 2, 32, dtype=mx.float16)}
    lengths = {"cache_seqlens": integers(50, 90)}
    pages = {"block_table": mx.reshape(integers(*range(12)), (2, 6))}
    angles = {"rotary_cos": normal(rng, 100, 8, dtype=mx.float16), "rotary_sin": normal(rng, 100, 8, dtype=mx.float16)}
    yield "contiguous", {"q": q, **cache(2, 100), **lengths}
    yield (
        "rows and padding",
        {
            "q": q,
            **cache(5, 100),
            **lengths,
            "cache_batch_idx": integers(4, 1),
            "cache_leftpad": integers(3, 0),
        },
    )
    yield "pages", {"q": q, **cache(12, 16), **lengths, **pages, "causal": True}
    yield "splits", {"q": q, **cache(2, 100), **lengths, "num_splits": 3}
    yield "many rows", {"q": normal(rng, 2, 40, 4, 32, dtype=mx.float16), **cache(12, 16), **lengths, **pages, "causal": True}
    yield "append", {"q": q, **cache(2, 100), **lengths, **new, **angles}
    yield "append to pages", {"q": q, **cache(12, 16), **lengths, **pages, **new}
    codes = {name: mx.array(rng.integers(-99, 99, (2, 100, 2, 32)), mx.int8) for name in ("k_cache", "v_cache")}
    scales = {name: mx.abs(normal(rng, 2, 100, 2)) * 0.02 for name in ("k_scale", "v_scale")}
    yield "int8", {"q": q, **codes, **scales, **lengths}


@pytest.mark.parametrize("index", range(8))
def test_the_probes_of_caches_pass(rng, index):
    _, arguments = list(cache_calls(rng))[index]
    with metal_graph(probe=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        mx.eval(flash_attn_with_kvcache(**arguments))


def test_a_broken_rotation_is_not_used(rng):
    arguments = dict(cache_calls(rng))["append"]
    caches = {name: mx.array(arguments[name]) for name in ("k_cache", "v_cache")}
    want = on_cpu(lambda: flash_attn_with_kvcache(**(arguments | caches)))
    bugs = {"flash_attn_rotary": ("FA_T(turned.second)", "FA_T(turned.first)")}
    with metal_graph(probe=True, bugs=bugs), pytest.warns(RuntimeWarning, match="wrong numbers"):
        close(flash_attn_with_kvcache(**arguments), want, 2e-3)
    close(arguments["k_cache"], caches["k_cache"], 2e-3)


@pytest.mark.parametrize(
    ("bugs", "reason"), [(WRONG_NUMBERS, "wrong numbers"), (NO_METAL, "compile")], ids=["wrong numbers", "does not compile"]
)
def test_a_broken_kernel_is_not_used(rng, bugs, reason):
    arguments = list(qkv(rng, 1, 30).values())
    want = on_cpu(lambda: flash_attn_func(*arguments, causal=True))
    with metal_graph(probe=True, bugs=bugs):
        with pytest.warns(RuntimeWarning, match=reason):
            close(flash_attn_func(*arguments, causal=True), want)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            close(flash_attn_func(*arguments, causal=True), want)


def test_a_broken_backward_kernel_is_not_used(rng):
    arguments = list(qkv(rng, 1, 30).values())
    gradient = mx.grad(loss, argnums=(0, 1, 2))
    want = on_cpu(lambda: gradient(*arguments))
    with metal_graph(probe=True, bugs=WRONG_GRADIENT):
        with pytest.warns(RuntimeWarning, match="compile"):
            got = gradient(*arguments)
        for a, b in zip(got, want, strict=True):
            close(a, b, 1e-4)


@pytest.mark.parametrize("wrap", [mx.compile, mx.grad], ids=["compile", "grad"])
def test_a_kernel_is_probed_while_it_is_traced(rng, wrap):
    q, k, v = qkv(rng, 1, 30).values()
    function = wrap(lambda q: flash_attn_func(q, k, v, causal=True).sum())
    want = on_cpu(lambda: function(q))
    with metal_graph(probe=True, bugs=NO_METAL):
        traced = wrap(lambda q: flash_attn_func(q, k, v, causal=True).sum())
        with pytest.warns(RuntimeWarning, match="compile"):
            close(traced(q), want, 1e-3)
