"""The names, order and defaults of upstream v2's functions, then our extras; what each call returns."""

from __future__ import annotations

import inspect

import mlx.core as mx
import pytest
from support import integers, qkv

import flash_attn
import flash_attn.flash_attn_mlx
from flash_attn import bert_padding

TAIL = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
SEQLENS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
UPSTREAM = {
    "flash_attn_func": (["q", "k", "v"], TAIL),
    "flash_attn_qkvpacked_func": (["qkv"], TAIL),
    "flash_attn_kvpacked_func": (["q", "kv"], TAIL),
    "flash_attn_varlen_func": (["q", "k", "v", *SEQLENS], TAIL | {"block_table": None}),
    "flash_attn_varlen_qkvpacked_func": (["qkv", "cu_seqlens", "max_seqlen"], TAIL),
    "flash_attn_varlen_kvpacked_func": (["q", "kv", *SEQLENS], TAIL),
}
EXTRAS = {
    "learnable_sink": None,
    "attn_mask": None,
    "qv": None,
    "attention_chunk": 0,
    "seqused_q": None,
    "seqused_k": None,
    "dropout_key": None,
    "num_splits": 0,
    "return_softmax_lse": False,
    "stream": None,
    "pack_gqa": None,
    "sm_margin": None,
    "scheduler_metadata": None,
}


@pytest.mark.parametrize("module", [flash_attn, flash_attn.flash_attn_mlx], ids=lambda module: module.__name__)
@pytest.mark.parametrize("name", UPSTREAM)
def test_signature_is_upstreams_then_keyword_only_extras(module, name):
    required, defaults = UPSTREAM[name]
    parameters = inspect.signature(getattr(module, name)).parameters
    positional = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == [*required, *defaults]
    assert {p.name: p.default for p in positional if p.default is not p.empty} == defaults
    assert {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY} == EXTRAS
    assert len(positional) + len(EXTRAS) == len(parameters)


def test_the_routed_entry_points_take_every_option_of_flash_attn_func_by_keyword():
    options = set(TAIL) | set(EXTRAS) | {"block_table"}
    for function in (flash_attn.flash_attention_mlx, flash_attn._can_use_mlx_sdpa, flash_attn._route):
        parameters = inspect.signature(function).parameters
        positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert positional == ["q", "k", "v"]
        assert {p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY} == options


def test_padding_functions_have_upstreams_signatures():
    signatures = {
        "unpad_input": "(hidden_states, attention_mask, unused_mask=None)",
        "pad_input": "(hidden_states, indices, batch, seqlen)",
        "unpad_input_for_concatenated_sequences": "(hidden_states, attention_mask_in_length)",
    }
    for name, want in signatures.items():
        parameters = inspect.signature(getattr(bert_padding, name)).parameters.values()
        bare = [p.replace(annotation=p.empty) for p in parameters]
        assert str(inspect.Signature(bare)) == want


def test_combine_has_upstreams_signature():
    parameters = list(inspect.signature(flash_attn.flash_attn_combine).parameters)
    assert parameters[:2] == ["out_partial", "lse_partial"]
    assert "out_dtype" in parameters


@pytest.mark.parametrize("name", [*UPSTREAM, "flash_attention_mlx", "flash_attn_combine", "_can_use_mlx_sdpa", "_route"])
def test_both_modules_offer_the_same_function_and_it_is_documented(name):
    assert getattr(flash_attn, name) is getattr(flash_attn.flash_attn_mlx, name)
    assert getattr(flash_attn, name).__doc__


def _call(name: str, **options: object):
    q, k, v = mx.ones((2, 5, 4, 8)), mx.ones((2, 5, 4, 8)), mx.ones((2, 5, 4, 8))
    bounds = integers(0, 5, 10)
    flat = [x.reshape(10, 4, 8) for x in (q, k, v)]
    arguments = {
        "flash_attn_func": (q, k, v),
        "flash_attn_qkvpacked_func": (mx.stack([q, k, v], 2),),
        "flash_attn_kvpacked_func": (q, mx.stack([k, v], 2)),
        "flash_attn_varlen_func": (*flat, bounds, bounds, 5, 5),
        "flash_attn_varlen_qkvpacked_func": (mx.stack(flat, 1), bounds, 5),
        "flash_attn_varlen_kvpacked_func": (flat[0], mx.stack(flat[1:], 1), bounds, bounds, 5, 5),
    }
    return getattr(flash_attn, name)(*arguments[name], **options)


@pytest.mark.parametrize("name", UPSTREAM)
def test_return_values(name):
    varlen = "varlen" in name
    out_shape, lse_shape = ((10, 4, 8), (4, 10)) if varlen else ((2, 5, 4, 8), (2, 4, 5))
    assert _call(name).shape == out_shape

    out, lse = _call(name, return_softmax_lse=True)
    assert (out.shape, lse.shape, lse.dtype) == (out_shape, lse_shape, mx.float32)

    out, lse, S_dmask = _call(name, return_attn_probs=True)
    assert (out.shape, lse.shape, S_dmask.shape) == (out_shape, lse_shape, (0,))

    out, lse, S_dmask = _call(name, return_attn_probs=True, return_softmax_lse=True, dropout_p=0.2)
    assert (out.shape, lse.shape, S_dmask.shape) == (out_shape, lse_shape, (2, 4, 5, 5))


@pytest.mark.parametrize("name", UPSTREAM)
def test_hints_of_other_backends_are_accepted(name):
    hints = {"deterministic": True, "num_splits": 3, "pack_gqa": True, "sm_margin": 2, "scheduler_metadata": object()}
    assert mx.array_equal(_call(name, **hints), _call(name))


def test_options_may_be_positional_in_upstreams_order(rng):
    q, k, v = qkv(rng).values()
    by_name = flash_attn.flash_attn_func(q, k, v, softmax_scale=0.3, causal=True, window_size=(4, 0), softcap=2.0)
    assert mx.array_equal(flash_attn.flash_attn_func(q, k, v, 0.0, 0.3, True, (4, 0), 2.0), by_name)


def test_flash_attention_mlx_equals_flash_attn_func(rng):
    q, k, v = qkv(rng).values()
    assert mx.array_equal(
        flash_attn.flash_attention_mlx(q, k, v, causal=True), flash_attn.flash_attn_func(q, k, v, causal=True)
    )


def test_the_route_says_where_and_why(rng, monkeypatch):
    q, k, v = qkv(rng).values()
    name, why = flash_attn._route(q, k, v)
    assert name == "kernel"
    assert why
    monkeypatch.setenv("FLASH_ATTENTION_MLX_REF", "1")
    assert flash_attn._route(q, k, v)[0] == "reference"
    monkeypatch.setenv("FLASH_ATTENTION_MLX_REF", "0")
    monkeypatch.setenv("FLASH_ATTENTION_MLX_ROUTE", "sdpa")
    assert flash_attn._route(q, k, v)[0] == "sdpa"


NEVER_SDPA = [
    {"window_size": (3, 0)},
    {"softcap": 1.0},
    {"dropout_p": 0.1},
    {"attention_chunk": 4},
    {"alibi_slopes": mx.zeros((4,))},
    {"seqused_k": integers(1, 1)},
    {"attn_mask": mx.zeros((33, 33))},
    {"return_softmax_lse": True},
]


@pytest.mark.parametrize("options", NEVER_SDPA, ids=lambda options: next(iter(options)))
def test_mlx_sdpa_is_never_asked_for_what_it_computes_otherwise(rng, options):
    q, k, v = qkv(rng).values()
    assert flash_attn._can_use_mlx_sdpa(q, k, v)
    assert not flash_attn._can_use_mlx_sdpa(q, k, v, **options)


def test_mlx_sdpa_is_not_asked_for_causal_rows_without_a_key(rng):
    q, k, v = qkv(rng, 2, 9, 4).values()
    assert flash_attn._can_use_mlx_sdpa(q, k, v)
    assert not flash_attn._can_use_mlx_sdpa(q, k, v, causal=True)


@pytest.mark.parametrize("route", ["auto", "kernel", "sdpa"])
@pytest.mark.parametrize("causal", [False, True])
def test_every_route_gives_the_same_answer(rng, monkeypatch, route, causal):
    q, k, v = qkv(rng, 2, 20, 30, 4, 2).values()
    want = flash_attn.flash_attn_func(q, k, v, causal=causal)
    monkeypatch.setenv("FLASH_ATTENTION_MLX_ROUTE", route)
    assert mx.allclose(flash_attn.flash_attn_func(q, k, v, causal=causal), want, atol=1e-5)
