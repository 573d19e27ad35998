"""Caches change in place: no call copies one, however many are queued, and an append moves only its own tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kvcache_support import CACHES, address, cache_call, decode, page
from support import integers, normal, run_python, to_numpy

from flash_attn import flash_attn_func, flash_attn_with_kvcache

SMALL = 1 << 17
LAYOUTS = ("contiguous", "paged", "int8", "mlx8", "mlx4", "packed")


def lay_out(rng: np.random.Generator, layout: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A float32 call of head dim 64 with room for new tokens, in one of the layouts."""
    if layout == "paged":
        return page(rng, arguments, 16)
    if layout == "int8":
        codes = {name: (arguments[name] * 30).astype(mx.int8) for name in CACHES}
        scales = {name: mx.full(arguments["k_cache"].shape[:3], 1 / 30) for name in ("k_scale", "v_scale")}
        return arguments | codes | scales
    if layout.startswith("mlx"):
        return arguments | {name: tuple(mx.quantize(arguments[name], group_size=64, bits=int(layout[3:]))) for name in CACHES}
    if layout == "packed":
        batch, seqlen = arguments["k"].shape[:2]
        bounds = integers(*range(0, batch * seqlen + 1, seqlen))
        flat = {name: arguments[name].flatten(0, 1) for name in ("q", "k", "v")}
        return arguments | flat | {"cu_seqlens_q": bounds, "cu_seqlens_k_new": bounds, "max_seqlen_q": seqlen}
    return arguments


def parts_of(arguments: dict[str, Any]) -> list[mx.array]:
    """Every array that a call may write."""
    found: list[mx.array] = []
    for name in (*CACHES, "k_scale", "v_scale"):
        value = arguments.get(name)
        found += value if isinstance(value, tuple) else [] if value is None else [value]
    return found


def addresses(arrays: list[mx.array]) -> list[int]:
    return [address(x) for x in arrays]


def peak_of(function: Callable[[], Any], *inputs: Any) -> int:
    """Bytes at the peak of an evaluation, beyond what was there before."""
    mx.eval(inputs)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(function())
    return mx.get_peak_memory() - before


def values(arguments: dict[str, Any]) -> list[Any]:
    return [value for value in arguments.values() if isinstance(value, (mx.array, tuple))]


def new_call(rng: np.random.Generator, layout: str, capacity: int = 4096, seqlen: int = 1, batch: int = 1) -> dict[str, Any]:
    arguments = cache_call(rng, batch, seqlen, capacity, 4, 2, 64, seqlen_new=seqlen) | {"causal": True}
    arguments = lay_out(rng, layout, arguments | {"cache_seqlens": integers(*[7] * batch)})
    mx.eval(values(arguments))
    return arguments


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_append_writes_into_the_callers_buffers(rng, layout):
    arguments = new_call(rng, layout)
    before = addresses(parts_of(arguments))
    for _ in range(3):
        mx.eval(flash_attn_with_kvcache(**arguments))
        assert addresses(parts_of(arguments)) == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_append_allocates_its_result_alone(rng, layout):
    arguments = new_call(rng, layout)
    peak = peak_of(lambda: flash_attn_with_kvcache(**arguments), *values(arguments))
    assert peak <= SMALL < parts_of(arguments)[0].nbytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_200_steps_queued_before_one_evaluation_copy_no_cache(rng, layout):
    arguments = new_call(rng, layout)
    before = addresses(parts_of(arguments))
    steps = [arguments | {"cache_seqlens": integers(t)} for t in range(200)]
    mx.eval([step["cache_seqlens"] for step in steps])

    def queue() -> list[mx.array]:
        return [flash_attn_with_kvcache(**step) for step in steps]

    assert peak_of(queue, *values(arguments)) <= 2 * SMALL + 200 * 4096  # an out of 1 KiB and an LSE a step
    assert addresses(parts_of(arguments)) == before


def test_evaluating_only_the_last_of_200_queued_steps(rng):
    """Each step depends on those before it through the caches, and still no copy is made."""
    q, k, v = (normal(rng, 1, 200, h, 64) for h in (4, 2, 2))
    caches = {"k_cache": mx.zeros((1, 4096, 2, 64)), "v_cache": mx.zeros((1, 4096, 2, 64))}
    mx.eval(q, k, v, caches)
    before = addresses(parts_of(caches))
    last: list[mx.array] = []

    def queue() -> mx.array:
        last.append(decode(q, k, v, caches, range(200))[-1])
        return last[0]

    assert peak_of(queue) <= 2 * SMALL + 200 * 4096
    assert addresses(parts_of(caches)) == before
    want = flash_attn_func(q, k, v, causal=True)[:, -1:]
    np.testing.assert_allclose(to_numpy(last[0]), to_numpy(want), atol=1e-5)
    assert mx.array_equal(caches["k_cache"][:, :200], k)


@pytest.mark.parametrize("evaluate", [mx.eval, mx.async_eval], ids=["eval", "async_eval"])
def test_a_loop_that_evaluates_each_step_copies_no_cache(rng, evaluate):
    arguments = new_call(rng, "contiguous")
    before = addresses(parts_of(arguments))

    def loop() -> list[mx.array]:
        for t in range(100):
            out = flash_attn_with_kvcache(**(arguments | {"cache_seqlens": t}))
            evaluate(out)
        return [out]

    assert peak_of(loop) <= SMALL
    assert addresses(parts_of(arguments)) == before


def test_layers_that_feed_each_other_copy_no_cache(rng):
    """Each layer's queries, keys and values come from the layer before; 50 steps of 4 layers wait for one evaluation."""
    layers = [new_call(rng, "contiguous") for _ in range(4)]
    before = [addresses(parts_of(layer)) for layer in layers]
    x = normal(rng, 1, 1, 4, 64)

    def queue() -> mx.array:
        h = x
        for t in range(50):
            for layer in layers:
                h = flash_attn_with_kvcache(h, layer["k_cache"], layer["v_cache"], h[:, :, :2], h[:, :, 2:], cache_seqlens=t)
        return h

    assert peak_of(queue, x) <= 2 * SMALL + 200 * 4096
    assert [addresses(parts_of(layer)) for layer in layers] == before


@pytest.mark.parametrize("layout", ["contiguous", "paged", "int8"])
def test_an_append_costs_the_same_bytes_in_a_large_cache(rng, layout):
    peaks = []
    for capacity in (1024, 131072):
        arguments = new_call(rng, layout, capacity)
        peaks.append(peak_of(lambda a=arguments: flash_attn_with_kvcache(**a), *values(arguments)))
    assert peaks[1] <= peaks[0] + 4096


def test_a_call_that_only_reads_copies_nothing(rng):
    for layout in ("contiguous", "paged", "int8", "mlx4"):
        arguments = new_call(rng, layout) | {"k": None, "v": None, "cache_seqlens": integers(4000)}
        before = addresses(parts_of(arguments))
        assert peak_of(lambda a=arguments: flash_attn_with_kvcache(**a), *values(arguments)) <= SMALL
        assert addresses(parts_of(arguments)) == before


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_slice_taken_earlier_keeps_its_values(rng, evaluated):
    arguments = new_call(rng, "contiguous", 40)
    want = to_numpy(arguments["k_cache"])[:, 5:12]
    piece = arguments["k_cache"][:, 5:12]
    if evaluated:
        mx.eval(piece)
    mx.eval(flash_attn_with_kvcache(**arguments))
    np.testing.assert_array_equal(to_numpy(piece), want)
    assert mx.array_equal(arguments["k_cache"][:, 7:8], arguments["k"])


def test_an_array_computed_from_the_cache_earlier_keeps_its_values(rng):
    arguments = new_call(rng, "contiguous", 40)
    want = to_numpy(arguments["k_cache"]).sum()
    total = arguments["k_cache"].sum()  # not evaluated before the append
    mx.eval(flash_attn_with_kvcache(**arguments))
    np.testing.assert_allclose(float(total), want, rtol=1e-4)


def test_a_slice_taken_earlier_costs_one_copy_and_not_one_a_step(rng):
    arguments = new_call(rng, "contiguous")
    piece = arguments["k_cache"][:, :5]
    mx.eval(piece)
    steps = [arguments | {"cache_seqlens": integers(t)} for t in range(7, 57)]
    mx.eval([step["cache_seqlens"] for step in steps])
    peak = peak_of(lambda: [flash_attn_with_kvcache(**step) for step in steps])
    assert peak <= arguments["k_cache"].nbytes + 2 * SMALL + 50 * 4096
    del piece


def test_new_tokens_that_alias_the_cache(rng):
    """k and v are slices of the cache that they are written to: read before written, whatever that costs."""
    arguments = new_call(rng, "contiguous", 40) | {"cache_seqlens": integers(7)}
    before = [to_numpy(arguments[name]) for name in CACHES]
    arguments |= {"k": arguments["k_cache"][:, 6:8], "v": arguments["v_cache"][:, 8:10]}
    mx.eval(flash_attn_with_kvcache(**arguments))
    for name, value, source in zip(CACHES, before, (slice(6, 8), slice(8, 10)), strict=True):
        want = value.copy()
        want[:, 7:9] = value[:, source]
        np.testing.assert_array_equal(to_numpy(arguments[name]), want)


def test_one_array_in_two_calls_queued_at_once_is_written_in_order(rng):
    arguments = new_call(rng, "contiguous", 40)
    calls = [arguments | {name: arguments[name] + t for name in ("k", "v")} for t in range(5)]
    outs = [flash_attn_with_kvcache(**call) for call in calls]
    mx.eval(outs[::-1])
    assert mx.array_equal(arguments["k_cache"][:, 7:8], calls[-1]["k"])


def test_active_memory_does_not_grow_while_decoding(rng):
    arguments = new_call(rng, "paged")
    after: list[int] = []
    for t in range(60):
        mx.eval(flash_attn_with_kvcache(**(arguments | {"cache_seqlens": integers(t)})))
        after.append(mx.get_active_memory())
    assert max(after[5:]) <= after[5] + 4096


RESIDENT = """
import mlx.core as mx
from flash_attn import flash_attn_with_kvcache
from support import peak_resident_bytes
mx.set_default_device(mx.cpu)
def caches(length):
    codes = [mx.ones((1, length, 4, 128), mx.int8) for _ in range(2)]
    scales = [mx.ones((1, length, 4)) for _ in range(2)]
    mx.eval(codes, scales)
    return codes, scales
def step(length):
    codes, scales = caches(length)
    q = mx.ones((1, 1, 8, 128), mx.float16)
    mx.eval(q)
    before = peak_resident_bytes()
    mx.eval(flash_attn_with_kvcache(q, *codes, k_scale=scales[0], v_scale=scales[1], cache_seqlens=length))
    return (peak_resident_bytes() - before) / codes[0].nbytes
step(256)
print(step(65536))
"""


def test_a_quantised_cache_is_never_materialised():
    """By the process's resident size, which counts scratch memory too; in float16 the keys alone would add 2 copies."""
    assert float(run_python(RESIDENT)) <= 0.25
