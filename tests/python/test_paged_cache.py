"""PagedKVCache: what is in its arrays, page by page, is what every sequence was given."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import normal, to_numpy

import flash_attn.flash_attn_mlx
from flash_attn import OutOfPages, PagedKVCache, flash_attn_func, flash_attn_with_kvcache
from flash_attn.flash_attn_mlx.paged_cache import AppendStep, update_paged_kv_cache

PAGE_SIZE = 3


def small_cache(num_pages: int = 8, page_size: int = 4, **options) -> PagedKVCache:
    return PagedKVCache(num_pages, page_size, kv_heads=1, head_dim=2, **options)


def write(cache: PagedKVCache, step: AppendStep, keys: list[list[float]], values: list[list[float]], layer: int = 0) -> None:
    """The new tokens of every sequence of `step`; all elements of a token are the one number given for it."""
    k_cache, v_cache = cache.k_caches[layer], cache.v_caches[layer]
    for row, tokens in enumerate(zip(keys, values, strict=True)):
        if not tokens[0]:
            continue
        new_k, new_v = (as_tokens(numbers, of) for numbers, of in zip(tokens, (k_cache, v_cache), strict=True))
        place = mx.array([row])
        update_paged_kv_cache(k_cache, v_cache, new_k, new_v, step.block_table[place], step.cache_seqlens[place])


def as_tokens(numbers: list[float], cache: mx.array) -> mx.array:
    """(1, seqlen, heads, dim), as `cache` holds them."""
    return mx.broadcast_to(mx.array(numbers, cache.dtype)[:, None, None], (1, len(numbers), *cache.shape[2:]))


def read(cache: PagedKVCache, seq: int, array: mx.array) -> list[float]:
    """The tokens of a sequence, each as the one number its elements have."""
    table = np.array(cache.block_table([seq]))[0]
    slots = np.arange(cache.length(seq))
    content = to_numpy(array)[table[slots // cache.page_size], slots % cache.page_size]
    first = content[:, 0, 0]
    assert (content == first[:, None, None]).all()
    return first.tolist()


def fill(cache: PagedKVCache, seq: int, values: list[int], layer: int = 0) -> None:
    """Appends tokens whose ids, keys and values are the same numbers."""
    write(cache, cache.append([seq], tokens=[values]), [values], [values], layer)


# ---- any sequence of operations


class AnyOperations(RuleBasedStateMachine):
    """Against a dictionary from each sequence to the (key, value) of its tokens."""

    tokens = st.sampled_from([0, 0, 0, 1])  # few, so that prefixes meet

    @initialize(dtype=st.sampled_from([mx.float16, mx.float32, mx.bfloat16]), layers=st.integers(1, 2))
    def start(self, dtype, layers):
        self.modulus = 251 if dtype == mx.bfloat16 else 2039  # integers that the dtype holds exactly
        self.cache = PagedKVCache(12, PAGE_SIZE, kv_heads=2, head_dim=3, head_dim_v=1, dtype=dtype, layers=layers)
        self.model: dict[int, list[tuple[int, int]]] = {}

    def some(self, index: int) -> int:
        return sorted(self.model)[index % len(self.model)]

    def extended(self, content, tokens):
        """A value depends on all tokens up to its own, so that a page of another prefix shows."""
        content = list(content)
        for token in tokens:
            previous = content[-1][1] if content else 0
            content.append((token, (previous * 31 + token + 7) % self.modulus))
        return content

    @rule(prompt=st.lists(tokens, max_size=10))
    def prefill(self, prompt):
        seq = self.cache.add_sequence(prompt)
        cached = self.cache.length(seq)
        assert cached % PAGE_SIZE == 0
        assert cached == 0 or cached < len(prompt)
        self.model[seq] = self.extended([], prompt[:cached])
        self.append_to([seq], [prompt[cached:]])

    @precondition(lambda self: self.model)
    @rule(indices=st.sets(st.integers(0, 9), min_size=1, max_size=3), data=st.data(), known=st.integers(0, 3).map(bool))
    def decode(self, indices, data, known):
        seqs = sorted({self.some(index) for index in indices})
        self.append_to(seqs, [data.draw(st.lists(self.tokens, min_size=1, max_size=4)) for _ in seqs], known)

    def append_to(self, seqs, tokens, known=True):
        lengths = [len(self.model[seq]) for seq in seqs]
        step = self.all_or_nothing(lambda: self.cache.append(seqs, **self.addition(tokens, known)))
        if step is None:
            return
        assert np.array(step.cache_seqlens).tolist() == lengths
        assert np.array(step.cu_seqlens).tolist() == np.cumsum([0, *map(len, tokens)]).tolist()
        assert step.max_seqlen == max(map(len, tokens))
        if not known:  # nobody may take them for others
            tokens = [[2 + token for token in row] for row in tokens]
        new = [self.extended(self.model[seq], row)[len(self.model[seq]) :] for seq, row in zip(seqs, tokens, strict=True)]
        for layer in range(len(self.cache.k_caches)):
            keys, values = ([[pair[part] for pair in row] for row in new] for part in (0, 1))
            write(self.cache, step, keys, values, layer)
        for seq, row in zip(seqs, new, strict=True):
            self.model[seq] += row

    @staticmethod
    def addition(tokens, known):
        return {"tokens": tokens} if known else {"counts": [len(row) for row in tokens]}

    def all_or_nothing(self, call):
        """The call's result; None where it ran out of pages, and then nothing has changed."""
        seqs = sorted(self.model)
        before = np.array(self.cache.block_table(seqs)).tolist(), self.cache.stats()
        try:
            return call()
        except OutOfPages as error:
            shortage = error
        assert shortage.available == before[1].idle + before[1].free
        assert shortage.needed > shortage.available
        assert (np.array(self.cache.block_table(seqs)).tolist(), self.cache.stats()) == before
        return None

    @precondition(lambda self: self.model)
    @rule(index=st.integers(0, 9), count=st.integers(0, 5))
    def reserve(self, index, count):
        self.all_or_nothing(lambda: self.cache.reserve([self.some(index)], count))

    @precondition(lambda self: self.model)
    @rule(index=st.integers(0, 9), new=st.lists(st.lists(tokens, max_size=4), min_size=2, max_size=2))
    def fork_then_decode_both(self, index, new):
        parent = self.some(index)
        child = self.cache.fork(parent)
        self.model[child] = list(self.model[parent])
        self.append_to([parent, child], new)

    @precondition(lambda self: self.model)
    @rule(index=st.integers(0, 9), kept=st.integers(0, 20))
    def trim(self, index, kept):
        seq = self.some(index)
        del self.model[seq][kept:]
        self.cache.trim(seq, len(self.model[seq]))

    @precondition(lambda self: self.model)
    @rule(index=st.integers(0, 9))
    def free(self, index):
        seq = self.some(index)
        self.cache.free(seq)
        del self.model[seq]

    @precondition(lambda self: self.cache.num_pages < 14)
    @rule()
    def grow(self):
        self.cache.grow(self.cache.num_pages + 1)

    @invariant()
    def every_sequence_has_its_tokens(self):
        for seq, content in self.model.items():
            assert self.cache.length(seq) == len(content)
            for layer in range(len(self.cache.k_caches)):
                assert read(self.cache, seq, self.cache.k_caches[layer]) == [key for key, _ in content]
                assert read(self.cache, seq, self.cache.v_caches[layer]) == [value for _, value in content]

    @invariant()
    def no_page_is_lost(self):
        held = [set(row.tolist()) - {-1} for row in np.array(self.cache.block_table(sorted(self.model)))]
        stats = self.cache.stats()
        assert stats.used == len(set().union(*held))
        assert stats.shared == len({page for row in held for page in row if sum(page in other for other in held) > 1})
        assert stats.used + stats.idle + stats.free == stats.pages == self.cache.num_pages == self.cache.k_caches[0].shape[0]


AnyOperations.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
TestAnyOperations = AnyOperations.TestCase


# ---- sequences


def test_a_decode_step_gets_the_lengths_before_it():
    cache = small_cache()
    a, b = cache.add_sequence(), cache.add_sequence()
    cache.append([a], 5)
    step = cache.append([b, a], 1)
    assert np.array(step.cache_seqlens).tolist() == [0, 5]
    assert np.array(cache.cache_seqlens([b, a])).tolist() == [1, 6]
    assert np.array(step.block_table).tolist() == [[2, -1], [0, 1]]
    assert step.block_table.dtype == step.cache_seqlens.dtype == step.cu_seqlens.dtype == mx.int32


def test_sequences_may_get_different_numbers_of_tokens():
    cache = small_cache()
    seqs = [cache.add_sequence() for _ in range(3)]
    step = cache.append(seqs, [5, 0, 2])
    assert np.array(step.cu_seqlens).tolist() == [0, 5, 5, 7]
    assert step.max_seqlen == 5
    assert np.array(step.block_table).tolist() == [[0, 1], [-1, -1], [2, -1]]


def test_a_table_of_empty_sequences_has_one_column_of_no_page():
    cache = small_cache()
    assert np.array(cache.block_table([cache.add_sequence(), cache.add_sequence()])).tolist() == [[-1], [-1]]


@pytest.mark.parametrize("of", [list, np.array, mx.array, tuple], ids=["list", "numpy", "mx.array", "tuple"])
def test_a_prompt_starts_with_what_is_cached(of):
    cache = small_cache()
    prompt = list(range(10))
    fill(cache, cache.add_sequence(of(prompt)), prompt)
    seq = cache.add_sequence(of(prompt))
    assert cache.length(seq) == 8
    assert read(cache, seq, cache.k_cache) == prompt[:8]
    assert cache.stats().hits == 2


def test_a_freed_prompt_is_cached_until_its_pages_are_needed():
    cache = small_cache(num_pages=3)
    prompt = list(range(9))
    seq = cache.add_sequence()
    fill(cache, seq, prompt)
    cache.free(seq)
    assert cache.stats().idle == 2
    other = cache.add_sequence()
    cache.append([other], 8)  # a free page, then the prompt's last
    assert cache.stats().evictions == 1
    again = cache.add_sequence(prompt)
    assert read(cache, again, cache.k_cache) == prompt[:4]


def test_beams_share_their_prompt_and_part_where_they_differ():
    cache = small_cache(num_pages=16)
    prompt = list(range(6))
    beams = [cache.add_sequence()]
    fill(cache, beams[0], prompt)
    beams += [cache.fork(beams[0]) for _ in range(3)]
    step = cache.append(beams, tokens=[[10], [11], [12], [13]])
    write(cache, step, [[10], [11], [12], [13]], [[10], [11], [12], [13]])
    for beam, last in zip(beams, (10, 11, 12, 13), strict=True):
        assert read(cache, beam, cache.k_cache) == read(cache, beam, cache.v_cache) == [*prompt, last]
    assert cache.stats().copies == 3
    assert cache.stats().used == 5


def test_reserved_pages_keep_the_block_table_while_tokens_come():
    cache = small_cache()
    seq = cache.add_sequence()
    cache.append([seq], 3)
    cache.reserve([seq], 6)
    table = np.array(cache.block_table([seq])).tolist()
    assert cache.length(seq) == 3
    for _ in range(6):
        assert np.array(cache.append([seq], 1).block_table).tolist() == table


def test_out_of_pages_is_a_runtime_error_and_leaves_the_others_usable():
    cache = small_cache(num_pages=2)
    a, b = cache.add_sequence(), cache.add_sequence()
    fill(cache, a, [1, 2, 3])
    with pytest.raises(OutOfPages, match="3 needed, 1 available of 2") as caught:
        cache.append([a, b], [2, 8])
    assert isinstance(caught.value, RuntimeError)
    assert (caught.value.needed, caught.value.available) == (3, 1)
    assert np.array(cache.cache_seqlens([a, b])).tolist() == [3, 0]
    fill(cache, a, [4, 5])
    assert read(cache, a, cache.k_cache) == [1, 2, 3, 4, 5]


# ---- arrays


def test_the_arrays_are_the_same_objects_for_good():
    cache = small_cache()
    k, v = cache.k_cache, cache.v_cache
    seq = cache.add_sequence()
    fill(cache, seq, [1, 2, 3])
    cache.append([cache.fork(seq)], 1)
    cache.grow(9)
    assert cache.k_cache is k
    assert cache.v_cache is v
    assert k.shape == v.shape == (9, 4, 1, 2)
    assert read(cache, seq, k) == [1, 2, 3]


def test_an_array_outlives_its_cache():
    cache = small_cache()
    fill(cache, cache.add_sequence(), [5])
    k = cache.k_cache
    del cache
    gc.collect()
    assert k[0, 0, 0, 0].item() == 5


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.int8], ids=str)
def test_pages_begin_at_a_page_of_memory(dtype):
    cache = PagedKVCache(100, 16, kv_heads=2, head_dim=64, dtype=dtype)

    def first_bytes() -> list[int]:
        views = [memoryview(array.reshape(-1).view(mx.uint8)) for array in (cache.k_cache, cache.v_cache)]
        return [np.frombuffer(view, np.uint8).ctypes.data % 4096 for view in views]

    assert first_bytes() == [0, 0]
    cache.grow(200)
    assert first_bytes() == [0, 0]
    assert not mx.any(cache.k_cache).item()


@pytest.mark.parametrize("dtype", [mx.float16, mx.int8], ids=str)
def test_a_forks_first_token_copies_its_page_and_nothing_else(dtype):
    cache = PagedKVCache(1024, 16, kv_heads=4, head_dim=64, dtype=dtype, layers=2)
    seq = cache.add_sequence()
    cache.append([seq], 20)
    arrays = [*cache.k_caches, *cache.v_caches, *cache.k_scales, *cache.v_scales]
    forks = [cache.fork(seq) for _ in range(8)]
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for fork in forks:
        cache.append([fork], 1)
        mx.eval(arrays)
    assert cache.stats().copies == 8
    page = sum(array.nbytes for array in arrays) // 1024
    assert mx.get_peak_memory() - before <= 4 * page


def test_every_layer_and_scale_of_a_page_is_copied():
    cache = small_cache(dtype=mx.int8, layers=2)
    parent = cache.add_sequence()
    cache.append([parent], 2)
    arrays = [*cache.k_caches, *cache.v_caches, *cache.k_scales, *cache.v_scales]
    assert len({id(array) for array in arrays}) == 8
    for i, array in enumerate(arrays):
        array[0] = i + 1
    child = cache.fork(parent)
    page = np.array(cache.append([child], 1).block_table)[0, 0]
    assert page != 0
    assert [to_numpy(array)[page].tolist() for array in arrays] == [to_numpy(array)[0].tolist() for array in arrays]
    assert all((to_numpy(array)[page] == i + 1).all() for i, array in enumerate(arrays))


def test_a_slice_taken_before_a_copy_keeps_its_values():
    cache = small_cache()
    parent = cache.add_sequence()
    fill(cache, parent, [1, 2])
    everything = cache.k_cache[:]
    child = cache.fork(parent)
    fill(cache, child, [3])
    mx.eval(cache.k_cache)
    assert read(cache, child, cache.k_cache) == [1, 2, 3]
    assert to_numpy(everything)[1:].max() == 0


def test_scales_belong_to_int8():
    cache = small_cache(dtype=mx.int8)
    assert cache.k_cache.dtype == cache.v_cache.dtype == mx.int8
    assert cache.k_scale.shape == cache.v_scale.shape == (8, 4, 1)
    assert cache.k_scale.dtype == cache.v_scale.dtype == mx.float32
    assert small_cache().k_scale is small_cache().v_scale is None


def test_value_heads_may_have_another_dim():
    cache = PagedKVCache(2, 4, 3, 8, 5)
    assert (cache.k_cache.shape, cache.v_cache.shape) == ((2, 4, 3, 8), (2, 4, 3, 5))
    assert cache.k_cache.dtype == mx.float16


def test_a_cache_of_several_layers_has_no_single_array():
    cache = small_cache(layers=3)
    assert len(cache.k_caches) == len(cache.v_caches) == 3
    for name in ("k_cache", "v_cache"):
        with pytest.raises(ValueError, match=rf"{name}: got a cache of 3 layers, .* {name}s\[layer\]"):
            getattr(cache, name)


# ---- attention


class TinyModel:
    """Attention layers over token ids: what a token's q, k and v are in each, and the two ways to attend."""

    heads, heads_k, dim = 4, 2, 32

    def __init__(self, rng: np.random.Generator, layers: int, dtype: mx.Dtype) -> None:
        self.cache = PagedKVCache(24, 5, self.heads_k, self.dim, dtype=dtype, layers=layers)
        # [layer][q, k or v]: (token ids, heads, dim)
        self.tables = [
            [normal(rng, 50, heads, self.dim, dtype=dtype) for heads in (self.heads, self.heads_k, self.heads_k)]
            for _ in range(layers)
        ]

    def cached(self, seqs: list[int], tokens: list[list[int]]) -> list[list[mx.array]]:
        """Appends tokens; for every layer, the new tokens' outputs of each sequence."""
        step = self.cache.append(seqs, tokens=tokens)
        ids = mx.array([token for row in tokens for token in row])
        bounds = np.array(step.cu_seqlens)
        outputs = []
        for layer, tables in enumerate(self.tables):
            q, k, v = (table[ids] for table in tables)
            out = flash_attn_with_kvcache(
                q,
                self.cache.k_caches[layer],
                self.cache.v_caches[layer],
                k,
                v,
                cache_seqlens=step.cache_seqlens,
                block_table=step.block_table,
                cu_seqlens_q=step.cu_seqlens,
                cu_seqlens_k_new=step.cu_seqlens,
                max_seqlen_q=step.max_seqlen,
                causal=True,
            )
            outputs.append([out[start:stop] for start, stop in pairwise(bounds.tolist())])
        return outputs

    def full(self, layer: int, tokens: list[int]) -> mx.array:
        q, k, v = (table[mx.array(tokens)][None] for table in self.tables[layer])
        return flash_attn_func(q, k, v, causal=True)[0]


@pytest.mark.parametrize(("dtype", "atol"), [(mx.float32, 2e-5), (mx.float16, 4e-3)], ids=["float32", "float16"])
def test_decoding_with_forks_trims_and_shared_prefixes_equals_full_attention(rng, dtype, atol):
    model = TinyModel(rng, layers=2, dtype=dtype)
    cache = model.cache
    prompt = rng.integers(0, 50, 12).tolist()
    known: dict[int, list[int]] = {}

    def advance(seqs: list[int], tokens: list[list[int]]) -> None:
        outputs = model.cached(seqs, tokens)
        for i, seq in enumerate(seqs):
            known[seq] = known[seq] + tokens[i]
            for layer, out in enumerate(outputs):
                want = model.full(layer, known[seq])[-len(tokens[i]) :]
                np.testing.assert_allclose(to_numpy(out[i]), to_numpy(want), atol=atol)

    def start(tokens: list[int]) -> None:
        seq = cache.add_sequence(tokens)
        cached = cache.length(seq)
        known[seq] = tokens[:cached]
        advance([seq], [tokens[cached:]])

    def free(seq: int) -> None:
        cache.free(seq)
        del known[seq]

    start(prompt)
    for turn in range(40):
        oldest, newest = min(known), max(known)
        if turn % 8 == 2:
            known[cache.fork(oldest)] = known[oldest]
        elif turn % 8 == 4:
            known[newest] = known[newest][:-3]
            cache.trim(newest, len(known[newest]))
        elif turn % 8 == 6:
            free(oldest)
            start(prompt + rng.integers(0, 50, 2).tolist())
        seqs = sorted(known)
        advance(seqs, [rng.integers(0, 50, 1 + (turn + i) % 2).tolist() for i in range(len(seqs))])
        for seq in seqs[:-2]:
            free(seq)
    stats = cache.stats()
    assert stats.hits == 5 * 2  # both full pages of the prompt, at every start but the first
    assert stats.copies > 0
    assert stats.evictions > 0


def test_a_decode_loop_with_forks_never_copies_the_cache(rng):
    cache = PagedKVCache(256, 16, 4, 64)
    seq = cache.add_sequence()
    q, k, v = (normal(rng, 1, 1, heads, 64, dtype=mx.float16) for heads in (8, 4, 4))

    def decode(seq: int) -> mx.array:
        step = cache.append([seq], 1)
        return flash_attn_with_kvcache(
            q, cache.k_cache, cache.v_cache, k, v, cache_seqlens=step.cache_seqlens, block_table=step.block_table, causal=True
        )

    mx.eval(decode(seq), k, v, q)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    outs = []
    for turn in range(60):  # no evaluation but those of a fork's first token
        if turn % 10 == 6:
            seq = cache.fork(seq)
        outs.append(decode(seq))
    mx.eval(outs, cache.k_cache, cache.v_cache)
    assert cache.stats().copies == 6
    assert mx.get_peak_memory() - before < cache.k_cache.nbytes // 4


def test_two_threads_may_decode_from_a_cache_each(rng):
    q, k, v = (normal(rng, 1, 1, heads, 64) for heads in (8, 4, 4))
    mx.eval(q, k, v)

    def decode() -> np.ndarray:
        stream = mx.new_stream(mx.cpu)
        cache = PagedKVCache(64, 4, 4, 64, dtype=mx.float32, stream=stream)
        seq = cache.add_sequence()
        outs = []
        for turn in range(100):
            if turn % 5 == 3:
                seq = cache.fork(seq)
            step = cache.append([seq], 1)
            new_k, new_v = (mx.multiply(x, turn + 1, stream=stream) for x in (k, v))
            outs.append(
                flash_attn_with_kvcache(
                    q,
                    cache.k_cache,
                    cache.v_cache,
                    new_k,
                    new_v,
                    cache_seqlens=step.cache_seqlens,
                    block_table=step.block_table,
                    stream=stream,
                )
            )
        return to_numpy(mx.concatenate(outs, stream=stream))

    alone = decode()
    with ThreadPoolExecutor(2) as pool:
        together = [pool.submit(decode) for _ in range(2)]
    for result in together:
        np.testing.assert_array_equal(result.result(), alone)


def test_an_int8_cache_is_filled_and_read_by_attention(rng):
    cache = PagedKVCache(8, 4, 2, 32, dtype=mx.int8)
    seq = cache.add_sequence()
    q, k, v = (normal(rng, 1, 10, heads, 32) for heads in (4, 2, 2))
    step = cache.append([seq], 10)
    out = flash_attn_with_kvcache(
        q,
        cache.k_cache,
        cache.v_cache,
        k,
        v,
        cache_seqlens=step.cache_seqlens,
        block_table=step.block_table,
        causal=True,
        k_scale=cache.k_scale,
        v_scale=cache.v_scale,
    )
    np.testing.assert_allclose(to_numpy(out), to_numpy(flash_attn_func(q, k, v, causal=True)), atol=0.05)
    assert np.abs(np.array(cache.k_cache)).max() == 127
    assert to_numpy(cache.k_scale).max() > 0


# ---- refusals

REFUSED = {
    "num_pages": (ValueError, lambda _: PagedKVCache(0, 4, 1, 2)),
    "page_size": (ValueError, lambda _: PagedKVCache(4, 0, 1, 2)),
    "kv_heads": (ValueError, lambda _: PagedKVCache(4, 4, 0, 2)),
    "head_dim": (ValueError, lambda _: PagedKVCache(4, 4, 1, 0)),
    "head_dim_v": (ValueError, lambda _: PagedKVCache(4, 4, 1, 2, 0)),
    "layers": (ValueError, lambda _: PagedKVCache(4, 4, 1, 2, layers=0)),
    "page_size ": (TypeError, lambda _: PagedKVCache(4, 4.0, 1, 2)),
    "dtype": (TypeError, lambda _: PagedKVCache(4, 4, 1, 2, dtype=mx.int32)),
    "dtype ": (TypeError, lambda _: PagedKVCache(4, 4, 1, 2, dtype="float16")),
    "stream": (TypeError, lambda _: PagedKVCache(4, 4, 1, 2, stream="cpu")),
    "sequence": (ValueError, lambda cache: cache.append([7], 1)),
    "sequence ": (ValueError, lambda cache: cache.fork(7)),
    "sequence  ": (ValueError, lambda cache: cache.block_table([7])),
    "sequences": (ValueError, lambda cache: cache.append([0, 0], 1)),
    "seqs": (TypeError, lambda cache: cache.append(0, 1)),
    "seqs ": (TypeError, lambda cache: cache.append(["a"], 1)),
    "seq": (TypeError, lambda cache: cache.trim(None, 1)),
    "count": (ValueError, lambda cache: cache.append([0], -1)),
    "counts": (ValueError, lambda cache: cache.append([0], [1, 2])),
    "counts ": (TypeError, lambda cache: cache.append([0], 1.0)),
    "counts  ": (ValueError, lambda cache: cache.append([0])),
    "counts   ": (ValueError, lambda cache: cache.append([0], 1, tokens=[[1]])),
    "tokens": (ValueError, lambda cache: cache.append([0], tokens=[[1], [2]])),
    "tokens ": (TypeError, lambda cache: cache.append([0], tokens=[[1.5]])),
    "tokens  ": (TypeError, lambda cache: cache.append([0], tokens=[1])),
    "tokens   ": (TypeError, lambda cache: cache.add_sequence(mx.array([1.0]))),
    "length": (ValueError, lambda cache: cache.trim(0, 3)),
    "length ": (ValueError, lambda cache: cache.trim(0, -1)),
    "num_pages ": (ValueError, lambda cache: cache.grow(7)),
}


@pytest.mark.parametrize(("name", "error", "call"), [(name, *rest) for name, rest in REFUSED.items()], ids=REFUSED.keys())
def test_a_refusal_names_the_argument_and_changes_nothing(name, error, call):
    cache = small_cache()
    cache.append([cache.add_sequence()], 2)
    before = cache.stats()
    with pytest.raises(error, match=rf"^\[flash_attn\] {name.strip()}: got .*, needs "):
        call(cache)
    assert cache.stats() == before
    assert cache.length(0) == 2


def test_counts_of_other_kinds():
    cache = small_cache()
    seqs = [cache.add_sequence(), cache.add_sequence()]
    cache.append(seqs, np.array(2))
    cache.append(seqs, np.array([1, 2]))
    cache.append(range(2), (1, 1))
    assert [cache.length(seq) for seq in seqs] == [4, 5]


def test_what_tokens_raise_is_raised():
    def tokens():
        yield 1
        raise RuntimeError("no more")

    cache = small_cache()
    with pytest.raises(RuntimeError, match="no more"):
        cache.add_sequence(tokens())
    assert cache.stats() == small_cache().stats()


@pytest.mark.parametrize("shape", [(2**20, 2**20, 2**8, 2**8), (2**16, 2**16, 2**16, 2**16)])
def test_more_memory_than_there_is(shape):
    with pytest.raises(MemoryError):
        PagedKVCache(*shape)
    cache = small_cache()
    before = cache.stats()
    with pytest.raises(MemoryError):
        cache.grow(2**31 - 1)
    assert cache.stats() == before


def test_it_is_exported_where_the_functions_are():
    assert flash_attn.flash_attn_mlx.PagedKVCache is PagedKVCache
    assert flash_attn.flash_attn_mlx.OutOfPages is OutOfPages
