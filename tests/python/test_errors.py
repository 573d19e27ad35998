"""Bad input is refused at the call, by an error that names the argument, what it got and what it needs."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from support import integers, run_python

from flash_attn import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn.bert_padding import pad_input, unpad_input

Q = mx.zeros((2, 5, 4, 8))
K = mx.zeros((2, 7, 2, 8))
V = mx.zeros((2, 7, 2, 6))
NAN, INF = float("nan"), float("inf")

TENSORS = {
    "q of rank 3": ((Q[0], K, V), ValueError, "q"),
    "k of rank 3": ((Q, K[0], V), ValueError, "k"),
    "v of rank 5": ((Q, K, V[None]), ValueError, "v"),
    "scalar q": ((mx.array(1.0), K, V), ValueError, "q"),
    "integer q": ((Q.astype(mx.int32), K, V), TypeError, "q"),
    "complex q": ((Q.astype(mx.complex64), K, V), TypeError, "q"),
    "mixed dtypes of q and k": ((Q.astype(mx.float16), K, V), TypeError, "k"),
    "mixed dtypes of k and v": ((Q, K, V.astype(mx.bfloat16)), TypeError, "v"),
    "batch of k": ((Q, K[:1], V[:1]), ValueError, "k"),
    "batch of v": ((Q, K, V[:1]), ValueError, "v"),
    "seqlen of v": ((Q, K, V[:, :3]), ValueError, "v"),
    "heads of v": ((Q, K, V[:, :, :1]), ValueError, "v"),
    "heads that do not divide": ((mx.zeros((2, 5, 3, 8)), K, V), ValueError, "k"),
    "no heads": ((Q[:, :, :0], K[:, :, :0], V[:, :, :0]), ValueError, "q"),
    "head dim of k": ((Q, K[..., :7], V), ValueError, "k"),
    "head dim 0": ((Q[..., :0], K[..., :0], V), ValueError, "q"),
    "head dim 577": ((mx.zeros((1, 1, 1, 577)),) * 3, ValueError, "q"),
    "value head dim 577": ((mx.zeros((1, 1, 1, 8)), mx.zeros((1, 1, 1, 8)), mx.zeros((1, 1, 1, 577))), ValueError, "v"),
    "numpy q": ((np.zeros((2, 5, 4, 8), np.float32), K, V), TypeError, "q"),
    "k is None": ((Q, None, V), TypeError, "k"),
    "k without a value": ((Q, mx.array.__new__(mx.array), V), TypeError, "k"),
    "all of them": (("q", "k", "v"), TypeError, "q"),
    "v is a list": ((Q, K, [1.0]), TypeError, "v"),
}

OPTIONS = {
    "dropout of 1": ({"dropout_p": 1.0}, ValueError, "dropout_p"),
    "negative dropout": ({"dropout_p": -0.1}, ValueError, "dropout_p"),
    "NaN dropout": ({"dropout_p": NAN}, ValueError, "dropout_p"),
    "dropout as text": ({"dropout_p": "0.1"}, TypeError, "dropout_p"),
    "NaN scale": ({"softmax_scale": NAN}, ValueError, "softmax_scale"),
    "infinite scale": ({"softmax_scale": INF}, ValueError, "softmax_scale"),
    "scale beyond float32": ({"softmax_scale": 1e39}, ValueError, "softmax_scale"),
    "scale as an array": ({"softmax_scale": mx.array(1.0)}, TypeError, "softmax_scale"),
    "negative softcap": ({"softcap": -1.0}, ValueError, "softcap"),
    "NaN softcap": ({"softcap": NAN}, ValueError, "softcap"),
    "infinite softcap": ({"softcap": INF}, ValueError, "softcap"),
    "window of one side": ({"window_size": (1,)}, ValueError, "window_size"),
    "window as a number": ({"window_size": 3}, TypeError, "window_size"),
    "fractional window": ({"window_size": (1.5, 0)}, TypeError, "window_size"),
    "window beyond 32 bits": ({"window_size": (2**40, 0)}, ValueError, "window_size"),
    "slopes of another number of heads": ({"alibi_slopes": mx.zeros((3,))}, ValueError, "alibi_slopes"),
    "slopes of another batch": ({"alibi_slopes": mx.zeros((3, 4))}, ValueError, "alibi_slopes"),
    "slopes of rank 3": ({"alibi_slopes": mx.zeros((1, 2, 4))}, ValueError, "alibi_slopes"),
    "slopes of 16 bits": ({"alibi_slopes": mx.zeros((4,), mx.float16)}, TypeError, "alibi_slopes"),
    "sink of another number of heads": ({"learnable_sink": mx.zeros((2,))}, ValueError, "learnable_sink"),
    "integer sink": ({"learnable_sink": mx.zeros((4,), mx.int32)}, TypeError, "learnable_sink"),
    "mask that does not broadcast": ({"attn_mask": mx.zeros((5, 6))}, ValueError, "attn_mask"),
    "mask for kv heads": ({"attn_mask": mx.zeros((2, 2, 5, 7))}, ValueError, "attn_mask"),
    "mask of rank 5": ({"attn_mask": mx.zeros((1, 1, 1, 5, 7))}, ValueError, "attn_mask"),
    "integer mask": ({"attn_mask": mx.zeros((5, 7), mx.int32)}, TypeError, "attn_mask"),
    "numpy mask": ({"attn_mask": np.zeros((5, 7), np.float32)}, TypeError, "attn_mask"),
    "qv of q's head dim": ({"qv": mx.zeros((2, 5, 4, 8))}, ValueError, "qv"),
    "qv of another dtype": ({"qv": mx.zeros((2, 5, 4, 6), mx.float16)}, TypeError, "qv"),
    "negative chunk": ({"attention_chunk": -1}, ValueError, "attention_chunk"),
    "fractional chunk": ({"attention_chunk": 1.5}, TypeError, "attention_chunk"),
    "several chunks": ({"attention_chunk": np.ones(2)}, TypeError, "attention_chunk"),
    "chunk of 64 bits": ({"attention_chunk": -(2**63)}, ValueError, "attention_chunk"),
    "negative splits": ({"num_splits": -1}, ValueError, "num_splits"),
    "seqused of another batch": ({"seqused_k": integers(1, 2, 3)}, ValueError, "seqused_k"),
    "seqused of 64 bits": ({"seqused_q": mx.zeros((2,), mx.int64)}, TypeError, "seqused_q"),
    "seqused above the length": ({"seqused_k": integers(1, 8)}, ValueError, "seqused_k"),
    "negative seqused": ({"seqused_q": integers(-1, 5)}, ValueError, "seqused_q"),
    "dropout key of one word": ({"dropout_p": 0.1, "dropout_key": mx.zeros((1,), mx.uint32)}, ValueError, "dropout_key"),
    "signed dropout key": ({"dropout_p": 0.1, "dropout_key": integers(1, 2)}, TypeError, "dropout_key"),
    "stream as text": ({"stream": "cpu"}, TypeError, "stream"),
}


def assert_refused(error: type[Exception], argument: str, function, *arguments: object, **options: object) -> None:
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    assert type(caught.value) is error
    message = str(caught.value)
    assert argument in message
    assert "got" in message
    assert "need" in message


@pytest.mark.parametrize(("tensors", "error", "argument"), TENSORS.values(), ids=TENSORS.keys())
def test_bad_tensors(tensors, error, argument):
    assert_refused(error, argument, flash_attn_func, *tensors)


@pytest.mark.parametrize(("options", "error", "argument"), OPTIONS.values(), ids=OPTIONS.keys())
def test_bad_options(options, error, argument):
    assert_refused(error, argument, flash_attn_func, Q, K, V, **options)


def test_packed_tensors_need_their_axis_of_three_or_two():
    assert_refused(ValueError, "qkv", flash_attn_qkvpacked_func, mx.zeros((2, 5, 2, 4, 8)))
    assert_refused(ValueError, "qkv", flash_attn_qkvpacked_func, mx.zeros((2, 5, 3, 4)))
    assert_refused(ValueError, "kv", flash_attn_kvpacked_func, Q, mx.zeros((2, 7, 3, 2, 8)))
    assert_refused(ValueError, "kv", flash_attn_kvpacked_func, Q, mx.zeros((1, 7, 2, 2, 8)))
    assert_refused(ValueError, "qkv", flash_attn_varlen_qkvpacked_func, mx.zeros((9, 2, 4, 8)), integers(0, 9), 9)
    assert_refused(TypeError, "qkv", flash_attn_qkvpacked_func, None)


PACKED = (mx.zeros((9, 4, 8)), mx.zeros((11, 2, 8)), mx.zeros((11, 2, 8)))
GOOD = {"cu_seqlens_q": integers(0, 4, 9), "cu_seqlens_k": integers(0, 3, 11), "max_seqlen_q": 5, "max_seqlen_k": 8}
VARLEN = {
    "bounds of 64 bits": ({"cu_seqlens_q": mx.array([0, 4, 9], mx.int64)}, TypeError, "cu_seqlens_q"),
    "floating bounds": ({"cu_seqlens_k": mx.array([0.0, 3.0, 11.0])}, TypeError, "cu_seqlens_k"),
    "bounds of rank 2": ({"cu_seqlens_q": integers(0, 4, 9)[None]}, ValueError, "cu_seqlens_q"),
    "no bounds": ({"cu_seqlens_q": mx.zeros((0,), mx.int32)}, ValueError, "cu_seqlens_q"),
    "two batch sizes": ({"cu_seqlens_k": integers(0, 1, 3, 11)}, ValueError, "cu_seqlens_k"),
    "bounds that fall": ({"cu_seqlens_q": integers(0, 4, 3)}, ValueError, "cu_seqlens_q"),
    "negative bounds": ({"cu_seqlens_q": integers(-1, 4, 9)}, ValueError, "cu_seqlens_q"),
    "bounds past the tensor": ({"cu_seqlens_k": integers(0, 4, 12)}, ValueError, "cu_seqlens_k"),
    "queries longer than max_seqlen": ({"max_seqlen_q": 4}, ValueError, "max_seqlen_q"),
    "keys longer than max_seqlen": ({"max_seqlen_k": 7}, ValueError, "max_seqlen_k"),
    "negative max_seqlen": ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q"),
    "max_seqlen as an array": ({"max_seqlen_q": mx.array(5)}, TypeError, "max_seqlen_q"),
    "fractional max_seqlen": ({"max_seqlen_k": 8.0}, TypeError, "max_seqlen_k"),
    "bounds as a list": ({"cu_seqlens_q": [0, 4, 9]}, TypeError, "cu_seqlens_q"),
    "dense q": ({}, ValueError, "q"),
    "seqused above its slot": ({"seqused_k": integers(4, 8)}, ValueError, "seqused_k"),
}


@pytest.mark.parametrize(("change", "error", "argument"), VARLEN.values(), ids=VARLEN.keys())
def test_bad_packing(change, error, argument):
    tensors = PACKED if change else (Q, *PACKED[1:])
    mx.eval(list(GOOD.values())[:2], [x for x in change.values() if isinstance(x, mx.array)])
    assert_refused(error, argument, flash_attn_varlen_func, *tensors, **(GOOD | change))


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError):
        flash_attn_func(Q, K, V, no_such_option=1)


def test_extras_are_keyword_only():
    with pytest.raises(TypeError):
        flash_attn_func(Q, K, V, 0.0, None, False, (-1, -1), 0.0, None, False, False, mx.zeros((4,)))


def test_bad_partial_results():
    out, lse = mx.zeros((3, 2, 5, 4, 8)), mx.zeros((3, 2, 5, 4))
    assert_refused(ValueError, "out_partial", flash_attn_combine, out[0], lse)
    assert_refused(ValueError, "lse_partial", flash_attn_combine, out, lse[:2])
    assert_refused(TypeError, "lse_partial", flash_attn_combine, out, lse.astype(mx.float16))
    assert_refused(TypeError, "out_partial", flash_attn_combine, out.astype(mx.int32), lse)
    assert_refused(TypeError, "out_dtype", flash_attn_combine, out, lse, mx.int32)


def test_bad_padding():
    x = mx.zeros((2, 5, 3))
    assert_refused(ValueError, "attention_mask", unpad_input, x, mx.ones((2, 4)))
    assert_refused(ValueError, "unused_mask", unpad_input, x, mx.ones((2, 5)), mx.ones((5,)))
    assert_refused(TypeError, "attention_mask", unpad_input, x, np.ones((2, 5)))
    assert_refused(ValueError, "indices", pad_input, x[0], integers(0, 1), 2, 5)


@pytest.mark.parametrize("variable", ["FLASH_ATTENTION_MLX_REF", "FLASH_ATTENTION_MLX_ROUTE"])
def test_an_environment_variable_that_means_nothing_is_refused(monkeypatch, variable):
    monkeypatch.setenv(variable, "perhaps")
    assert_refused(ValueError, variable, flash_attn_func, Q, K, V)


UNKNOWN_ISA = """
import mlx.core as mx
from flash_attn import flash_attn_func
mx.set_default_device(mx.cpu)
x = mx.zeros((1, 4, 1, 8))
try:
    flash_attn_func(x, x, x)
except ValueError as error:
    print(error)
"""


def test_an_unknown_isa_level_is_refused():
    assert "FLASH_ATTENTION_MLX_ISA" in run_python(UNKNOWN_ISA, FLASH_ATTENTION_MLX_ISA="pentium")


def test_a_failed_call_leaves_the_next_one_untouched():
    with pytest.raises(ValueError, match="dropout_p"):
        flash_attn_func(Q, K, V, dropout_p=2.0)
    assert flash_attn_func(Q, K, V).shape == (2, 5, 4, 6)
