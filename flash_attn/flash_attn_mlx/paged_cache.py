"""A paged KV cache: one pool of pages for many sequences, shared prefixes, forks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import mlx.core as mx

from . import _core
from ._core import OutOfPages

__all__ = ["AppendStep", "OutOfPages", "PagedKVCache", "PageStatistics", "update_paged_kv_cache"]


class AppendStep(NamedTuple):
    """What `PagedKVCache.append` gives to `flash_attn_with_kvcache`; row b is the b-th sequence of the append.

    Attributes:
        cache_seqlens: int32 (batch,), the lengths before the append.
        block_table: int32 (batch, blocks), the pages of each sequence, -1 after its last.
        cu_seqlens: int32 (batch + 1,): with as many new tokens as each sequence got, packed one after the other, the
            cu_seqlens_q and cu_seqlens_k_new of the call.
        max_seqlen: the most new tokens of a sequence, then its max_seqlen_q.
    """

    cache_seqlens: mx.array
    block_table: mx.array
    cu_seqlens: mx.array
    max_seqlen: int


class PageStatistics(NamedTuple):
    """Pages of a cache: used + idle + free = pages.

    Attributes:
        pages: all.
        used: held by a sequence.
        shared: of those, held by more than one.
        idle: held by none, their content kept for a sequence that begins with it.
        free: without content.
        hits: pages that new sequences found filled, since the cache was made.
        evictions: idle pages that were reused for other content.
        copies: pages that were copied because a fork wrote into them.
    """

    pages: int
    used: int
    shared: int
    idle: int
    free: int
    hits: int
    evictions: int
    copies: int


class PagedKVCache:
    """Keys and values of many sequences, in pages of a fixed number of tokens.

    A sequence takes a page only when it needs one, and pages that hold the same are shared. A fork shares all of its
    parent's. A sequence added with its prompt shares the full pages of the longest prefix that the cache still has, of a live
    sequence or of one freed long ago. A page is never written while two sequences hold it: the one that appends gets a copy
    of its own. Pages of freed sequences are kept, found by prefix, until no other page is free; then those unused for longest
    are reused first.

    The cache decides where tokens go; `flash_attn_with_kvcache` writes and reads them. A decode step of one layer:

        step = cache.append(seqs, 1)
        out = flash_attn_with_kvcache(q, cache.k_cache, cache.v_cache, k, v, cache_seqlens=step.cache_seqlens,
                                      block_table=step.block_table, causal=True)

    Write the tokens of an append, by that call, before the next `add_sequence` or `fork`, which may share them. If that fails,
    trim to the length before. Arguments are read at once, and copies of pages wait for earlier work on the cache, so none of
    this can run inside mx.compile. One thread at a time may use a cache.

    Args:
        num_pages: pages there are; `grow` adds some.
        page_size: tokens a page.
        kv_heads: heads_k of the attention.
        head_dim: of the keys.
        head_dim_v: of the values; None is head_dim.
        dtype: float32, bfloat16 or float16; or int8, with a float32 scale for each token and head in k_scale and v_scale.
        layers: how many layers the pages hold. All share one block table: an append serves every layer of a step.
        stream: where pages are made and copied; None is MLX's default.

    Raises:
        TypeError, ValueError: an argument of a wrong type or value; the message names it. Nothing has changed then.
        OutOfPages: an append or a reserve needs more pages than are free or idle. Nothing has changed then.
        MemoryError: the machine has too little memory for so many pages.

    Example:
        >>> cache = PagedKVCache(num_pages=64, page_size=16, kv_heads=2, head_dim=64)
        >>> seq = cache.add_sequence(prompt)  # the first cache.length(seq) tokens are there already
        >>> step = cache.append([seq], tokens=[prompt[cache.length(seq) :]])
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        dtype: mx.Dtype = mx.float16,
        *,
        layers: int = 1,
        stream: mx.Stream | mx.Device | mx.DeviceType | None = None,
    ) -> None:
        self._core = _core.PagedKVCache(
            num_pages=num_pages,
            page_size=page_size,
            kv_heads=kv_heads,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            dtype=dtype,
            layers=layers,
            stream=stream,
        )
        # Views of the C++ side's arrays: kept, so that everyone gets the same objects.
        self._k_caches = tuple(self._core.k_caches())
        self._v_caches = tuple(self._core.v_caches())
        self._k_scales = tuple(self._core.k_scales())
        self._v_scales = tuple(self._core.v_scales())

    @classmethod
    def create(
        cls,
        num_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        head_dim_v: int | None = None,
        dtype: mx.Dtype = mx.float16,
        *,
        layers: int = 1,
        stream: mx.Stream | mx.Device | mx.DeviceType | None = None,
    ) -> PagedKVCache:
        """The constructor, under the name that says what it costs: it makes the arrays of all pages."""
        return cls(num_pages, page_size, kv_heads, head_dim, head_dim_v, dtype, layers=layers, stream=stream)

    # ---- arrays

    @property
    def k_caches(self) -> tuple[mx.array, ...]:
        """One array a layer, (num_pages, page_size, kv_heads, head_dim). They change in place."""
        return self._k_caches

    @property
    def v_caches(self) -> tuple[mx.array, ...]:
        """One array a layer, (num_pages, page_size, kv_heads, head_dim_v). They change in place."""
        return self._v_caches

    @property
    def k_scales(self) -> tuple[mx.array, ...]:
        """One array a layer, float32 (num_pages, page_size, kv_heads), of an int8 cache; else none."""
        return self._k_scales

    @property
    def v_scales(self) -> tuple[mx.array, ...]:
        """As k_scales, for the values."""
        return self._v_scales

    @property
    def k_cache(self) -> mx.array:
        """The array of a cache of one layer."""
        return self._of_one_layer("k_cache", self._k_caches)

    @property
    def v_cache(self) -> mx.array:
        """The array of a cache of one layer."""
        return self._of_one_layer("v_cache", self._v_caches)

    @property
    def k_scale(self) -> mx.array | None:
        """The scales of an int8 cache of one layer; None for other dtypes."""
        return self._of_one_layer("k_scale", self._k_scales) if self._k_scales else None

    @property
    def v_scale(self) -> mx.array | None:
        """As k_scale, for the values."""
        return self._of_one_layer("v_scale", self._v_scales) if self._v_scales else None

    def _of_one_layer(self, name: str, arrays: tuple[mx.array, ...]) -> mx.array:
        if len(arrays) != 1:
            raise ValueError(f"[flash_attn] {name}: got a cache of {len(arrays)} layers, needs one; use {name}s[layer]")
        return arrays[0]

    # ---- sequences

    def add_sequence(self, tokens: Iterable[int] | mx.array | None = None) -> int:
        """A new sequence.

        Args:
            tokens: its prompt. The sequence starts with the tokens of the longest prefix that whole pages of the cache hold,
                `length(seq)` of them, never the last one. Append the others. None: it starts empty.

        Returns:
            Its id. Ids are never given twice.
        """
        return self._core.add([] if tokens is None else tokens)

    def append(
        self,
        seqs: Sequence[int],
        counts: int | Sequence[int] | None = None,
        *,
        tokens: Sequence[Iterable[int]] | mx.array | None = None,
    ) -> AppendStep:
        """Makes room for new tokens of some sequences, of all of them or of none.

        Args:
            seqs: ids, each once.
            counts: how many new tokens, for all or for each. Only tokens appended with their ids, after others with theirs,
                are found by later sequences.
            tokens: their ids in place of `counts`: a list, or an integer array, for each sequence.

        Returns:
            What flash_attn_with_kvcache needs to write the tokens of every layer.
        """
        if (counts is None) == (tokens is None):
            raise ValueError("[flash_attn] counts: got both or none of counts and tokens, needs one of them")
        if tokens is not None:
            return AppendStep(*self._core.append_tokens(seqs, tokens))
        return AppendStep(*self._core.append_counts(seqs, counts))

    def reserve(self, seqs: Sequence[int], counts: int | Sequence[int]) -> None:
        """Makes room without lengthening the sequences: the next `counts` tokens need no page, and until they are there
        `block_table` stays as it is, unless the sequence is trimmed or forked."""
        self._core.reserve(seqs, counts)

    def fork(self, seq: int) -> int:
        """A new sequence with the same tokens, in the same pages until one of the two writes."""
        return self._core.fork(seq)

    def trim(self, seq: int, length: int) -> None:
        """Drops the tokens of a sequence from `length` on, and pages reserved for it. What the last append added of them is
        forgotten, as it may never have been written; what came before stays to be found by its prefix."""
        self._core.trim(seq, length)

    def free(self, seq: int) -> None:
        """Ends a sequence. Its full pages stay to be found by their prefix until they are needed."""
        self._core.free(seq)

    def length(self, seq: int) -> int:
        """Tokens of a sequence."""
        return self._core.length(seq)

    def block_table(self, seqs: Sequence[int]) -> mx.array:
        """int32 (batch, blocks): the pages of each sequence, -1 after its last."""
        return self._core.block_table(seqs)

    def cache_seqlens(self, seqs: Sequence[int]) -> mx.array:
        """int32 (batch,): the length of each sequence."""
        return self._core.cache_seqlens(seqs)

    # ---- the whole

    @property
    def num_pages(self) -> int:
        return self._core.num_pages()

    @property
    def page_size(self) -> int:
        return self._core.page_size()

    def grow(self, num_pages: int) -> None:
        """Makes the cache `num_pages` large. The one call that copies the whole cache, an array at a time, at once."""
        self._core.grow(num_pages)

    def stats(self) -> PageStatistics:
        return PageStatistics(**self._core.statistics())


def update_paged_kv_cache(
    k_cache: mx.array,
    v_cache: mx.array,
    new_k: mx.array,
    new_v: mx.array,
    block_table: mx.array,
    cache_seqlens: mx.array,
    *,
    stream: mx.Stream | mx.Device | mx.DeviceType | None = None,
) -> mx.array:
    """Appends to a paged cache without attending: k_cache and v_cache change in place, as in flash_attn_with_kvcache.

    Args:
        k_cache, v_cache: (pages, page_size, heads_k, head_dim), v_cache with head_dim_v.
        new_k, new_v: (batch, seqlen_new, heads_k, head_dim), the caches' dtype; written at slots cache_seqlens and on.
        block_table: int32 (batch, blocks); what is appended to an entry of -1 is dropped.
        cache_seqlens: int32 (batch,), the lengths before.

    Returns:
        The lengths after, int32 (batch,): cache_seqlens + seqlen_new.

    Raises:
        TypeError, ValueError: as flash_attn_with_kvcache.
    """
    return _core.update_paged_kv_cache(k_cache, v_cache, new_k, new_v, block_table, cache_seqlens, stream)
