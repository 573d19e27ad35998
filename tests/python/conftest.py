from __future__ import annotations

import os
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--metal-shim", choices=("fast", "hooks", "sanitize"), help="run every call on the Metal kernels, under the shim"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: a share of upstream's whole test matrix; runs when FRACTION is set")
    mx.set_default_device(mx.cpu)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "FRACTION" in os.environ:
        return
    skip = pytest.mark.skip(reason="set FRACTION, the share of upstream's matrix to run")
    for item in items:
        if "full" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def metal_shim_for_all(request: pytest.FixtureRequest) -> Iterator[None]:
    mode = request.config.getoption("--metal-shim")
    if mode is None:
        yield
        return
    from metal_support import metal_graph

    with metal_graph(mode):
        yield


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """One stream of numbers a test, the same on every run."""
    return np.random.default_rng(list(request.node.name.encode()))
