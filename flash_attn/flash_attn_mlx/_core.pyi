from typing import TypeAlias

import mlx.core as mx

Results: TypeAlias = tuple[mx.array, mx.array, mx.array, str]  # out, lse, S_dmask, route
StreamOrDevice: TypeAlias = mx.Stream | mx.Device | None

class AttentionOptions:
    def __init__(
        self,
        *,
        dropout_p: float,
        softmax_scale: float | None,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
        alibi_slopes: mx.array | None,
        deterministic: bool,
        return_attn_probs: bool,
        learnable_sink: mx.array | None,
        attn_mask: mx.array | None,
        qv: mx.array | None,
        attention_chunk: int,
        seqused_q: mx.array | None,
        seqused_k: mx.array | None,
        dropout_key: mx.array | None,
        num_splits: int,
        block_table: mx.array | None,
        return_softmax_lse: bool,
        stream: StreamOrDevice,
    ) -> None: ...

def flash_attn_func(q: mx.array, k: mx.array, v: mx.array, options: AttentionOptions, /) -> Results: ...
def flash_attn_qkvpacked_func(qkv: mx.array, options: AttentionOptions, /) -> Results: ...
def flash_attn_kvpacked_func(q: mx.array, kv: mx.array, options: AttentionOptions, /) -> Results: ...
def flash_attn_varlen_func(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    cu_seqlens_q: mx.array,
    cu_seqlens_k: mx.array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: AttentionOptions,
    /,
) -> Results: ...
def flash_attn_varlen_qkvpacked_func(
    qkv: mx.array, cu_seqlens: mx.array, max_seqlen: int, options: AttentionOptions, /
) -> Results: ...
def flash_attn_varlen_kvpacked_func(
    q: mx.array,
    kv: mx.array,
    cu_seqlens_q: mx.array,
    cu_seqlens_k: mx.array,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: AttentionOptions,
    /,
) -> Results: ...

class KVCacheArguments:
    def __init__(
        self,
        *,
        k: mx.array | None,
        v: mx.array | None,
        rotary_cos: mx.array | None,
        rotary_sin: mx.array | None,
        rotary_interleaved: bool,
        cache_seqlens: mx.array | None,
        cache_batch_idx: mx.array | None,
        cache_leftpad: mx.array | None,
        cu_seqlens_q: mx.array | None,
        max_seqlen_q: int | None,
        cu_seqlens_k_new: mx.array | None,
        rotary_seqlens: mx.array | None,
    ) -> None: ...

def flash_attn_with_kvcache(
    q: mx.array,
    k_cache: mx.array,
    k_scales: mx.array | None,
    k_biases: mx.array | None,
    v_cache: mx.array,
    v_scales: mx.array | None,
    v_biases: mx.array | None,
    arguments: KVCacheArguments,
    options: AttentionOptions,
    /,
) -> Results: ...
def update_paged_kv_cache(
    k_cache: mx.array,
    v_cache: mx.array,
    new_k: mx.array,
    new_v: mx.array,
    block_table: mx.array,
    cache_seqlens: mx.array,
    stream: StreamOrDevice,
    /,
) -> mx.array: ...
def validate_paged_kv_params(
    k_cache: mx.array, v_cache: mx.array, block_table: mx.array, cache_seqlens: mx.array, seqlen_new: int, /
) -> None: ...
def flash_attn_combine(
    out_partial: mx.array, lse_partial: mx.array, out_dtype: mx.Dtype | None, stream: StreamOrDevice
) -> tuple[mx.array, mx.array]: ...
def route(q: mx.array, k: mx.array, v: mx.array, options: AttentionOptions, /) -> tuple[str, str]: ...
def can_use_mlx_sdpa(q: mx.array, k: mx.array, v: mx.array, options: AttentionOptions, /) -> bool: ...
def isa_level() -> str: ...
def num_threads() -> int: ...

class OutOfPages(RuntimeError):
    needed: int
    available: int

Step: TypeAlias = tuple[mx.array, mx.array, mx.array, int]  # cache_seqlens, block_table, cu_seqlens, max_seqlen

class PagedKVCache:
    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        head_dim_v: int | None,
        dtype: mx.Dtype,
        layers: int,
        stream: StreamOrDevice,
    ) -> None: ...
    def k_caches(self) -> list[mx.array]: ...
    def v_caches(self) -> list[mx.array]: ...
    def k_scales(self) -> list[mx.array]: ...
    def v_scales(self) -> list[mx.array]: ...
    def add(self, prompt: list[int], /) -> int: ...
    def append_counts(self, seqs: list[int], counts: list[int], /) -> Step: ...
    def append_tokens(self, seqs: list[int], tokens: list[list[int]], /) -> Step: ...
    def reserve(self, seqs: list[int], counts: list[int], /) -> None: ...
    def fork(self, seq: int, /) -> int: ...
    def trim(self, seq: int, length: int, /) -> None: ...
    def free(self, seq: int, /) -> None: ...
    def grow(self, num_pages: int, /) -> None: ...
    def block_table(self, seqs: list[int], /) -> mx.array: ...
    def cache_seqlens(self, seqs: list[int], /) -> mx.array: ...
    def length(self, seq: int, /) -> int: ...
    def page_size(self) -> int: ...
    def num_pages(self) -> int: ...
    def statistics(self) -> dict[str, int]: ...
