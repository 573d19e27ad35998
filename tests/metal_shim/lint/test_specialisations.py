"""The recorded texts cover the kernels and their flags."""

from __future__ import annotations

import re

import pytest
import specialisations
from address_space import errors_of
from kernel_text import SOURCES
from metal_support import shim
from rules import MOST_BYTES


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    shim()  # skips without it
    return specialisations.recorded(readable=True)


def test_a_text_that_is_sent_has_one_for_people(texts):
    assert specialisations.recorded().keys() == texts.keys()


def test_a_text_with_all_features_at_once_is_sound_and_not_much_longer():
    shim()
    texts = specialisations.recorded_at_once()
    assert max(len(text.encode()) for text in texts.values()) <= 1.2 * MOST_BYTES
    for text in texts.values():
        assert errors_of(text) == ""


def test_every_kernel_is_recorded(texts):
    kernels = {file.stem for file in (SOURCES / "metal").glob("*.metal") if "FA_BODY" in file.read_text()}
    assert kernels == {re.fullmatch(r"flash_attn_(\w+)_[0-9a-f]{16}", name)[1] for name in texts}


def test_every_flag_of_the_sources_is_defined_somewhere(texts):
    tested = {
        flag
        for file in (SOURCES / "metal").glob("*.metal")
        for line in re.findall(r"^#(?:if|elif).*$", file.read_text(), flags=re.MULTILINE)
        for flag in re.findall(r"\bFA_\w+", line)
    }
    defined = {flag for text in texts.values() for flag in re.findall(r"^#define (FA_\w+)", text, flags=re.MULTILINE)}
    assert tested <= defined


def test_every_dtype_and_head_dim_is_recorded(texts):
    forwards = [text for name, text in texts.items() if name.startswith("flash_attn_forward_")]
    assert {re.search(r"#define FA_T (\w+)", text)[1] for text in forwards} == {"half", "bfloat16_t", "float"}
    for dim, _ in specialisations.HEAD_DIMS:
        assert any(f"#define FA_D {dim}\n" in text for text in forwards)


def test_the_prelude_is_mlx_and_not_ours():
    prelude = specialisations.prelude()
    assert "struct Limits" in prelude
    assert "#include <metal_stdlib>" in prelude
    assert "flash_attn" not in prelude
