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
def flash_attn_combine(
    out_partial: mx.array, lse_partial: mx.array, out_dtype: mx.Dtype | None, stream: StreamOrDevice
) -> tuple[mx.array, mx.array]: ...
def route(q: mx.array, k: mx.array, v: mx.array, options: AttentionOptions, /) -> tuple[str, str]: ...
def can_use_mlx_sdpa(q: mx.array, k: mx.array, v: mx.array, options: AttentionOptions, /) -> bool: ...
def isa_level() -> str: ...
def num_threads() -> int: ...
