"""The self-test: it passes here, and it fails when something is wrong."""

from __future__ import annotations

import json
import math
import re
import warnings

import mlx.core as mx
import numpy as np
import pytest
from metal_support import metal_graph, shim

from flash_attn.flash_attn_mlx import device, self_test


@pytest.fixture
def two_cases(monkeypatch):
    """Of every kind one, for time."""
    cases = list(self_test._cases())[:1]
    monkeypatch.setattr(self_test, "_cases", lambda: iter(cases))
    monkeypatch.setattr(self_test, "speeds", lambda device: [{"call": "some", "unit": "GB/s", "ours": 2.0, "mlx": 1.0}])


def test_every_call_of_the_self_test_passes():
    report = device.check_mlx_requirements()
    assert report["ok"]
    assert len(report["self_test"]) > 30
    assert all(0 <= error < 1 for error in report["self_test"].values())


def test_every_call_of_the_self_test_passes_on_the_metal_kernels(monkeypatch):
    monkeypatch.setattr(self_test, "_TOLERANCE", {mx.float16: self_test._TOLERANCE[mx.float16]})
    with metal_graph("fast") as module:
        module.clear_reports()
        errors = self_test.errors(self_test.CPU)
        kernels = {re.search(r"flash_attn_(\w+?)_[0-9a-f]{16}", report["function"])[1] for report in module.reports()}
    assert all(0 <= error < 1 for error in errors.values())
    assert {"forward", "delta", "backward_dq", "backward_dkv", "decode", "rotary"} <= kernels


def test_wrong_numbers_fail(monkeypatch, two_cases):
    right = self_test.flash_attn_func
    calls = []

    def wrong_at_first(q, k, v, **options):
        calls.append(q)
        return right(q, k, v, **options) * (1.05 if len(calls) == 1 else 1.0)

    monkeypatch.setattr(self_test, "flash_attn_func", wrong_at_first)
    errors = self_test.errors(self_test.CPU)
    assert errors.pop("full, float32") > 1
    assert all(error < 1 for error in errors.values())


def test_nan_fails():
    zeros = mx.zeros(3)
    assert self_test._largest_error([mx.array([0.0, math.nan, 0.0])], [zeros], (1.0,)) == math.inf


def test_a_kernel_that_is_replaced_fails_with_the_reason():
    def falls_back() -> list[mx.array]:
        warnings.warn("[flash_attn] a Metal kernel is not used: it gives wrong numbers", RuntimeWarning, stacklevel=1)
        return [mx.zeros(3)]

    with pytest.warns(RuntimeWarning, match="wrong numbers"):
        assert self_test._by_kernels(falls_back) is None


def test_a_kernel_that_raises_fails_with_the_reason():
    def raises() -> list[mx.array]:
        raise RuntimeError("does not compile")

    with pytest.warns(UserWarning, match="does not compile"):
        assert self_test._by_kernels(raises) is None


def test_self_test_writes_one_json(tmp_path, monkeypatch, capsys, two_cases):
    path = tmp_path / "report.json"
    monkeypatch.setattr("sys.argv", ["device", "--self-test", "--json", str(path)])
    assert device.main() == 0
    report = json.loads(path.read_text())
    assert report["ok"]
    assert report["speeds"]["cpu"]
    assert report["warnings"] == []
    assert "Python" in report["system"]
    assert str(path) in capsys.readouterr().out


def test_an_error_is_part_of_the_report(monkeypatch, two_cases):
    def fails(device):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(self_test, "speeds", fails)
    report = device.full_self_test()
    assert not report["ok"]
    assert report["error"] == "RuntimeError: out of memory"


def test_speeds_are_numbers_of_both():
    q = self_test._forward_speed(self_test.CPU, mx.float32, 64, 2, 32, True)
    assert q["ours"] > 0
    assert q["mlx"] > 0


def test_the_probe_of_matrix_products_computes_a_product():
    a = mx.arange(64, dtype=mx.float32)
    b = 63 - a
    (d,) = shim().run_kernel(
        "product",
        {"a": a, "b": b},
        {"d": ((64,), mx.float32)},
        self_test.PRODUCT_SOURCE,
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
    )
    expected = np.array(a).reshape(8, 8) @ np.array(b).reshape(8, 8)
    np.testing.assert_array_equal(np.array(d).reshape(8, 8), expected)
