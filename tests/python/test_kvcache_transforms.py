"""flash_attn_with_kvcache inside MLX's machinery: compile, gradients, streams, threads, and the same bits however it runs."""

from __future__ import annotations

import threading
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kvcache_support import CACHES, cache_call, copied, decode, page, run
from support import digest, error, integers, normal, on_reference, run_python, to_numpy

from flash_attn import flash_attn_func, flash_attn_with_kvcache


def close(a: mx.array, b: mx.array, atol: float = 1e-5) -> None:
    np.testing.assert_allclose(to_numpy(a), to_numpy(b), atol=atol)


def step_of(arguments: dict[str, Any], *names: str) -> Any:
    """A function of the named arguments alone that gives out and the caches after it."""

    def step(*arrays: mx.array) -> tuple[mx.array, ...]:
        own = arguments | dict(zip(names, arrays, strict=True))
        out = flash_attn_with_kvcache(**own)
        return out, own["k_cache"], own["v_cache"]

    return step


@pytest.mark.parametrize("page_size", [None, 8])
def test_compile_with_the_caches_as_inputs_and_outputs(rng, page_size):
    arguments = cache_call(rng, 2, 2, 40, seqlen_new=2) | {"causal": True}
    if page_size:
        arguments = page(rng, arguments, page_size)
    names = ("q", "k", "v", *CACHES, "cache_seqlens")
    step = mx.compile(step_of(arguments, *names))
    want = run(arguments)
    for _ in range(2):
        before = [to_numpy(arguments[name]) for name in CACHES]
        out, k_cache, v_cache = step(*(arguments[name] for name in names))
        np.testing.assert_allclose(to_numpy(out), want.out, atol=1e-6)
        np.testing.assert_array_equal(to_numpy(k_cache), want.k_cache)
        np.testing.assert_array_equal(to_numpy(v_cache), want.v_cache)
        for name, value in zip(CACHES, before, strict=True):
            np.testing.assert_array_equal(to_numpy(arguments[name]), value)


def test_a_compiled_decode_loop_equals_full_attention(rng):
    q, k, v = (normal(rng, 1, 40, h, 16) for h in (4, 2, 2))

    @mx.compile
    def step(q, k, v, k_cache, v_cache, length):
        out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=length, causal=True)
        return out, k_cache, v_cache, length + 1

    k_cache, v_cache, length = mx.zeros(k.shape), mx.zeros(v.shape), integers(0)
    outs = []
    for t in range(40):
        now = slice(t, t + 1)
        out, k_cache, v_cache, length = step(q[:, now], k[:, now], v[:, now], k_cache, v_cache, length)
        outs.append(out)
    close(mx.concatenate(outs, axis=1), flash_attn_func(q, k, v, causal=True), 1e-5)


@pytest.mark.parametrize("traced", ["q", "k", "v", "cache_seqlens"])
def test_a_traced_call_on_a_cache_from_outside_is_refused(rng, traced):
    arguments = cache_call(rng, 2, 2, 40, seqlen_new=2)
    before = to_numpy(arguments["k_cache"])
    with pytest.raises(ValueError, match=r"k_cache: got .* needs .* inputs"):
        mx.compile(lambda x: flash_attn_with_kvcache(**(arguments | {traced: x})))(arguments[traced])
    np.testing.assert_array_equal(to_numpy(arguments["k_cache"]), before)


def test_a_traced_call_may_read_a_cache_from_outside(rng):
    arguments = cache_call(rng, 2, 2, 40)
    out = mx.compile(lambda q: flash_attn_with_kvcache(**(arguments | {"q": q})))(arguments["q"])
    np.testing.assert_allclose(to_numpy(out), run(arguments).out, atol=1e-6)


def test_vmap_over_queries_that_only_read_equals_a_loop(rng):
    arguments = page(rng, cache_call(rng, 2, 2, 40), 8) | {"causal": True}

    def function(q: mx.array) -> mx.array:
        return flash_attn_with_kvcache(**(arguments | {"q": q}))

    queries = mx.stack([arguments["q"], arguments["q"] + 1, arguments["q"] * 2])
    for out, q in zip(mx.vmap(function)(queries), queries, strict=True):
        close(out, function(q), 1e-6)


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k", "v", "qv", "learnable_sink"])
def test_there_is_no_gradient(rng, name):
    arguments = cache_call(rng, 2, 2, 40, seqlen_new=2)
    arguments |= {"qv": normal(rng, 2, 2, 4, 32), "learnable_sink": normal(rng, 4)}
    names = (name, *(cache for cache in CACHES if cache != name))
    step = step_of(arguments, *names)
    with pytest.raises(NotImplementedError, match="gradient"):
        mx.grad(lambda *arrays: step(*arrays)[0].sum(), range(len(names)))(*(arguments[name] for name in names))


def test_there_is_no_gradient_of_a_call_that_only_reads(rng):
    arguments = cache_call(rng, 2, 2, 40)
    with pytest.raises(NotImplementedError, match="gradient"):
        mx.grad(lambda q: flash_attn_with_kvcache(**(arguments | {"q": q})).sum())(arguments["q"])


def test_a_stopped_gradient_needs_none(rng):
    arguments = cache_call(rng, 2, 2, 40)
    q = arguments["q"]
    gradient = mx.grad(lambda q: mx.stop_gradient(flash_attn_with_kvcache(**(arguments | {"q": q}))).sum() + 3 * q.sum())(q)
    assert mx.all(gradient == 3)


@pytest.mark.parametrize("page_size", [None, 8])
def test_steps_queued_while_others_run(rng, page_size):
    """As a generation loop does: the next step is built while this one is computed."""
    q, k, v = (normal(rng, 2, 150, h, 32) for h in (4, 2, 2))
    caches: dict[str, Any] = {"k_cache": mx.zeros(k.shape), "v_cache": mx.zeros(v.shape)}
    if page_size:
        caches = page(rng, caches, page_size)
        del caches["cache_seqlens"]
    outs = []
    for t in range(150):
        outs += decode(q, k, v, caches, range(t, t + 1))
        mx.async_eval(outs[-1])
    close(mx.concatenate(outs, axis=1), flash_attn_func(q, k, v, causal=True))


def test_two_threads_decode_from_two_caches(rng):
    calls = []
    for _ in range(2):
        q, k, v = (np.array(normal(rng, 1, 120, h, 32)) for h in (4, 2, 2))
        calls.append((q, k, v, np.array(flash_attn_func(*map(mx.array, (q, k, v)), causal=True))))
    results: dict[int, np.ndarray] = {}
    start = threading.Barrier(2)

    def work(index: int) -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            q, k, v = (mx.array(x) for x in calls[index][:3])
            caches = {"k_cache": mx.zeros(k.shape), "v_cache": mx.zeros(v.shape)}
            start.wait()
            outs = []
            for t in range(120):
                outs += decode(q, k, v, caches, range(t, t + 1))
                mx.eval(outs[-1])
            results[index] = np.array(mx.concatenate(outs, axis=1))

    workers = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for index, (*_, want) in enumerate(calls):
        np.testing.assert_allclose(results[index], want, atol=1e-5)


def test_caches_on_two_streams(rng):
    q, k, v = (normal(rng, 1, 60, h, 32) for h in (4, 2, 2))
    mx.eval(q, k, v)
    want = flash_attn_func(q, k, v, causal=True)
    outs = []
    for stream in (mx.new_stream(mx.cpu) for _ in range(2)):
        caches = {"k_cache": mx.zeros(k.shape), "v_cache": mx.zeros(v.shape)}
        outs.append(decode(q, k, v, caches, range(60), stream=stream))
    mx.eval(outs)
    for out in outs:
        close(mx.concatenate(out, axis=1), want, 1e-5)


def test_the_same_call_gives_the_same_bits(rng):
    arguments = page(rng, cache_call(rng, 3, 3, 500, 8, 2, seqlen_new=3, dtype=mx.bfloat16) | {"causal": True}, 16)
    results = [run(arguments) for _ in range(20)]
    assert len({digest({"out": x.out, "lse": x.lse, "k": x.k_cache, "v": x.v_cache}) for x in results}) == 1


def test_kernel_and_reference_agree_on_a_long_cache(rng):
    arguments = cache_call(rng, 2, 2, 900, 8, 2, seqlen_new=2) | {"causal": True}
    kernel, reference = run(arguments), on_reference(lambda: run(arguments))
    assert error(kernel.out, reference.out) <= 1e-5
    np.testing.assert_array_equal(kernel.k_cache, reference.k_cache)


THREADED = """
import mlx.core as mx
import numpy as np
import kvcache_combinations
from kvcache_support import cache_call, run
from support import digest
mx.set_default_device(mx.cpu)
rng = np.random.default_rng(0)
calls = [kvcache_combinations.build(rng, features) for features in kvcache_combinations.sample(25, seed=2)]
calls += [cache_call(rng, 1, 1, 3000, 8, 2, 64, dtype=dtype) for dtype in (mx.float32, mx.bfloat16)]
calls += [cache_call(rng, 3, 20, 2000, 8, 2, 64, seqlen_new=20) | {"causal": True}]
for arguments in calls:
    result = run(arguments)
    print(digest([mx.array(x.astype(np.float32)) for x in (result.out, result.lse, result.k_cache, result.v_cache)]))
"""


def test_results_do_not_depend_on_the_number_of_threads():
    want = run_python(THREADED, FLASH_ATTENTION_MLX_THREADS="1")
    assert len(want.split()) == 28
    for threads in ("2", "5"):
        assert run_python(THREADED, FLASH_ATTENTION_MLX_THREADS=threads) == want


LEVEL = """
import mlx.core as mx
import numpy as np
import kvcache_combinations
from flash_attn.flash_attn_mlx import _core
from kvcache_support import check
mx.set_default_device(mx.cpu)
rng = np.random.default_rng(0)
for features in kvcache_combinations.sample(40, seed=3):
    check(kvcache_combinations.build(rng, features))
print(_core.isa_level())
"""


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_other_isa_levels_meet_the_oracle(level):
    from flash_attn.flash_attn_mlx import _core

    if level == "avx2" and not _core.isa_level().startswith(("avx2", "avx512")):
        pytest.skip("this machine has no AVX2")
    assert run_python(LEVEL, FLASH_ATTENTION_MLX_ISA=level).strip() == level


def test_a_read_under_way_on_another_stream_sees_the_cache_as_it_was(rng):
    arguments = cache_call(rng, 1, 64, 4096, 4, 2, 64, seqlen_new=4096) | {"cache_seqlens": 0}
    reads = arguments | {"k": None, "v": None, "cache_seqlens": 4096}
    other = mx.new_stream(mx.cpu)
    mx.eval(arguments["q"], arguments["k"], arguments["v"])
    for _ in range(5):
        own = copied(arguments)
        caches = {name: own[name] for name in CACHES}
        want = to_numpy(flash_attn_with_kvcache(**(reads | caches)))
        read = flash_attn_with_kvcache(**(reads | caches), stream=other)
        mx.async_eval(read)
        mx.eval(flash_attn_with_kvcache(**own))  # overwrites every slot
        np.testing.assert_array_equal(to_numpy(read), want)
        assert mx.array_equal(own["k_cache"], arguments["k"])
