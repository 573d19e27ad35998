"""What flash_attn_with_kvcache means, in numpy float64, written from the specification and from nothing of the package.

Each sequence's slots are walked one by one: new keys are rotated and stored, then the keys are gathered and attention over them
is oracle.py's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import oracle
from oracle import Array, Rounding

Place = tuple[int, int]  # (row of the cache or page, slot in it)


def rotate(x: Array, cos: Array, sin: Array, positions: Array, interleaved: bool) -> Array:
    """x (tokens, heads, dim): pairs of its first channels are turned by their angles at each token's position."""
    half = cos.shape[-1]
    first, second = (slice(0, half), slice(half, 2 * half))
    if interleaved:
        first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    c, s = cos[positions][:, None], sin[positions][:, None]
    turned = x.copy()
    turned[..., first] = x[..., first] * c - x[..., second] * s
    turned[..., second] = x[..., first] * s + x[..., second] * c
    return turned


@dataclass
class Result:
    out: Array
    lse: Array
    k_cache: Array
    v_cache: Array


@dataclass(kw_only=True)
class Call:
    """The function's arguments as numpy arrays, quantised caches as the numbers that they stand for.

    `stored` rounds to the dtype of q and of the caches: what a rotated value becomes.
    """

    q: Array
    k_cache: Array
    v_cache: Array
    k: Array | None = None
    v: Array | None = None
    rotary_cos: Array | None = None
    rotary_sin: Array | None = None
    cache_seqlens: int | Array | None = None
    cache_batch_idx: Array | None = None
    cache_leftpad: Array | None = None
    block_table: Array | None = None
    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    rotary_interleaved: bool = True
    alibi_slopes: Array | None = None
    num_splits: int = 0
    learnable_sink: Array | None = None
    qv: Array | None = None
    attention_chunk: int = 0
    cu_seqlens_q: Array | None = None
    max_seqlen_q: int | None = None
    cu_seqlens_k_new: Array | None = None
    rotary_seqlens: Array | None = None
    stored: Rounding = oracle.exact

    @property
    def batch(self) -> int:
        return len(self.q) if self.cu_seqlens_q is None else len(self.cu_seqlens_q) - 1

    @property
    def capacity(self) -> int:
        """Slots of one sequence."""
        slots = self.k_cache.shape[1]
        return slots if self.block_table is None else slots * self.block_table.shape[1]

    def rows_of(self, b: int, bounds: Array | None) -> int | slice:
        """Index of sequence b's tokens in a dense or a packed tensor."""
        return b if bounds is None else slice(int(bounds[b]), int(bounds[b + 1]))

    def new_tokens(self, b: int) -> int:
        return 0 if self.k is None else len(self.k[self.rows_of(b, self.cu_seqlens_k_new)])

    def length_before(self, b: int) -> int:
        if self.cache_seqlens is None:
            return self.capacity
        return int(np.broadcast_to(self.cache_seqlens, self.batch)[b])

    def first_slot(self, b: int) -> int:
        return 0 if self.cache_leftpad is None else int(self.cache_leftpad[b])

    def place(self, b: int, slot: int) -> Place | None:
        """Where sequence b's slot lies; None on a page that is not there."""
        row = b if self.cache_batch_idx is None else int(self.cache_batch_idx[b])
        if self.block_table is None:
            return row, slot
        block, slot_of_page = divmod(slot, self.k_cache.shape[1])
        page = int(self.block_table[row, block])
        return None if page < 0 else (page, slot_of_page)

    def seen_places(self, b: int) -> list[Place | None]:
        """Where each of sequence b's keys lies, once the new ones are there."""
        return [self.place(b, slot) for slot in range(self.first_slot(b), self.length_before(b) + self.new_tokens(b))]

    def new_places(self, b: int) -> list[Place | None]:
        begin = self.length_before(b)
        return [self.place(b, slot) for slot in range(begin, begin + self.new_tokens(b))]

    def marked(self, places_of: str) -> Array:
        """bool, as the first two axes of the caches: where any sequence's `seen_places` or `new_places` lie."""
        mask = np.zeros(self.k_cache.shape[:2], bool)
        for b in range(self.batch):
            for place in getattr(self, places_of)(b):
                if place is not None:
                    mask[place] = True
        return mask

    def rotary_base(self, b: int) -> int:
        return self.length_before(b) if self.rotary_seqlens is None else int(self.rotary_seqlens[b])

    def turned(self, x: Array, positions: Array) -> Array:
        if self.rotary_cos is None:
            return x
        return self.stored(rotate(x, self.rotary_cos, self.rotary_sin, positions, self.rotary_interleaved))

    def new_keys(self, b: int) -> Array:
        """Sequence b's new keys as they are stored."""
        keys = self.k[self.rows_of(b, self.cu_seqlens_k_new)]
        return self.turned(keys, self.rotary_base(b) + np.arange(len(keys)))

    def queries(self, b: int) -> Array:
        """Sequence b's queries, rotated. Without a mask on the diagonal all are at one position, as upstream has it."""
        q = self.q[self.rows_of(b, self.cu_seqlens_q)]
        advance = self.causal or max(self.window_size) >= 0
        return self.turned(q, self.rotary_base(b) + np.arange(len(q)) * advance)

    def appended(self) -> tuple[Array, Array]:
        """The caches with the new tokens in place."""
        k_cache, v_cache = self.k_cache.copy(), self.v_cache.copy()
        if self.k is not None:
            for b in range(self.batch):
                keys, values = self.new_keys(b), self.v[self.rows_of(b, self.cu_seqlens_k_new)]
                for t, place in enumerate(self.new_places(b)):
                    if place is not None:
                        k_cache[place], v_cache[place] = keys[t], values[t]
        return k_cache, v_cache

    def attended(self, k_cache: Array, v_cache: Array, rounding: Rounding) -> tuple[Array, Array]:
        """(out, lse) over caches that hold the new tokens already."""
        out = np.zeros(self.q.shape[:-1] + v_cache.shape[-1:])
        lse = np.full(self.q.shape[:-1], -np.inf)  # heads last, as q; turned at the end
        for b in range(self.batch):
            places = self.seen_places(b)
            keys, values = (np.zeros((1, len(places), *x.shape[2:])) for x in (k_cache, v_cache))
            for j, place in enumerate(places):
                if place is not None:
                    keys[0, j], values[0, j] = k_cache[place], v_cache[place]
            own = self.rows_of(b, self.cu_seqlens_q)
            slopes = self.alibi_slopes
            result = oracle.attention(
                self.queries(b)[None],
                keys,
                values,
                softmax_scale=self.softmax_scale,
                causal=self.causal,
                window_size=self.window_size,
                softcap=self.softcap,
                alibi_slopes=slopes if slopes is None or slopes.ndim == 1 else slopes[b],
                learnable_sink=self.learnable_sink,
                attn_mask=np.array([place is not None for place in places], bool),
                qv=None if self.qv is None else self.qv[own][None],
                attention_chunk=self.attention_chunk,
                rounding=rounding,
            )
            out[own], lse[own] = result.out[0], result.lse[0].T
        return out, lse.swapaxes(-1, -2)

    def result(self, rounding: Rounding = oracle.exact) -> Result:
        k_cache, v_cache = self.appended()
        return Result(*self.attended(k_cache, v_cache, rounding), k_cache, v_cache)

    def with_caches(self, k_cache: Array, v_cache: Array) -> Call:
        return replace(self, k_cache=k_cache, v_cache=v_cache)
