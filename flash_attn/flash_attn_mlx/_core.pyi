from typing import TypeAlias

import mlx.core as mx

Results: TypeAlias = tuple[mx.array, mx.array, mx.array, str]  # out, lse, S_dmask, route

# What a caller gives is checked here: whatever it is, it may be passed.

class AttentionOptions:
    dropout_key: mx.array | None
    def __init__(
        self,
        *,
        causal: object,
        window_size: object,
        softcap: object,
        alibi_slopes: object,
        learnable_sink: object,
        qv: object,
        attention_chunk: object,
        num_splits: object,
        return_softmax_lse: object,
        stream: object,
        pack_gqa: object,
        sm_margin: object,
        scheduler_metadata: object,
        softmax_scale: object,
        dropout_p: object = 0.0,
        deterministic: object = False,
        return_attn_probs: object = False,
        attn_mask: object = None,
        seqused_q: object = None,
        seqused_k: object = None,
        dropout_key: object = None,
        block_table: object = None,
    ) -> None: ...
    @property
    def lacks_dropout_key(self) -> bool: ...

def flash_attn_func(q: object, k: object, v: object, options: AttentionOptions) -> Results: ...
def flash_attn_qkvpacked_func(qkv: object, options: AttentionOptions) -> Results: ...
def flash_attn_kvpacked_func(q: object, kv: object, options: AttentionOptions) -> Results: ...
def flash_attn_varlen_func(
    q: object,
    k: object,
    v: object,
    cu_seqlens_q: object,
    cu_seqlens_k: object,
    max_seqlen_q: object,
    max_seqlen_k: object,
    options: AttentionOptions,
) -> Results: ...
def flash_attn_varlen_qkvpacked_func(
    qkv: object, cu_seqlens: object, max_seqlen: object, options: AttentionOptions
) -> Results: ...
def flash_attn_varlen_kvpacked_func(
    q: object,
    kv: object,
    cu_seqlens_q: object,
    cu_seqlens_k: object,
    max_seqlen_q: object,
    max_seqlen_k: object,
    options: AttentionOptions,
) -> Results: ...
def flash_attn_with_kvcache(
    q: object,
    k_cache: object,
    v_cache: object,
    options: AttentionOptions,
    *,
    k: object,
    v: object,
    rotary_cos: object,
    rotary_sin: object,
    rotary_interleaved: object,
    cache_seqlens: object,
    cache_batch_idx: object,
    cache_leftpad: object,
    cu_seqlens_q: object,
    max_seqlen_q: object,
    cu_seqlens_k_new: object,
    rotary_seqlens: object,
    k_scale: object,
    v_scale: object,
) -> Results: ...
def update_paged_kv_cache(
    k_cache: object,
    v_cache: object,
    new_k: object,
    new_v: object,
    block_table: object,
    cache_seqlens: object,
    stream: object,
) -> mx.array: ...
def validate_paged_kv_params(
    k_cache: object, v_cache: object, block_table: object, cache_seqlens: object, seqlen_new: object
) -> None: ...
def flash_attn_combine(
    out_partial: object, lse_partial: object, out_dtype: object, stream: object
) -> tuple[mx.array, mx.array]: ...
def route(q: object, k: object, v: object, options: AttentionOptions) -> tuple[str, str]: ...
def can_use_mlx_sdpa(q: object, k: object, v: object, options: AttentionOptions) -> bool: ...
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
        num_pages: object,
        page_size: object,
        kv_heads: object,
        head_dim: object,
        head_dim_v: object,
        dtype: object,
        layers: object,
        stream: object,
    ) -> None: ...
    def k_caches(self) -> list[mx.array]: ...
    def v_caches(self) -> list[mx.array]: ...
    def k_scales(self) -> list[mx.array]: ...
    def v_scales(self) -> list[mx.array]: ...
    def add(self, tokens: object) -> int: ...
    def append_counts(self, seqs: object, counts: object) -> Step: ...
    def append_tokens(self, seqs: object, tokens: object) -> Step: ...
    def reserve(self, seqs: object, counts: object) -> None: ...
    def fork(self, seq: object) -> int: ...
    def trim(self, seq: object, length: object) -> None: ...
    def free(self, seq: object) -> None: ...
    def grow(self, num_pages: object) -> None: ...
    def block_table(self, seqs: object) -> mx.array: ...
    def cache_seqlens(self, seqs: object) -> mx.array: ...
    def length(self, seq: object) -> int: ...
    def page_size(self) -> int: ...
    def num_pages(self) -> int: ...
    def statistics(self) -> dict[str, int]: ...
