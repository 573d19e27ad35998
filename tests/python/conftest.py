from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import mlx.core as mx
import numpy as np
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--metal-shim", choices=("fast", "hooks", "sanitize"), help="run every call on the Metal kernels, under the shim"
    )
    parser.addoption("--share", help="I/N: every Nth test, from the Ith on")
    parser.addoption("--gpu", action="store_true", help="run on the GPU of a Mac")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: a share of upstream's whole test matrix; runs when FRACTION is set")
    mx.set_default_device(mx.gpu if config.getoption("--gpu") else mx.cpu)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if share := config.getoption("--share"):
        first, step = (int(number) for number in share.split("/"))
        items[:] = items[first::step]
    if "FRACTION" in os.environ:
        return
    skip = pytest.mark.skip(reason="set FRACTION, the share of upstream's matrix to run")
    for item in items:
        if "full" in item.keywords:
            item.add_marker(skip)


NOT_ON_METAL = (
    "FLASH_ATTENTION_MLX_ROUTE=kernel: head dim",  # above 256: the reference, and these tests ask for kernels
    "on Metal attention cannot be traced with shapeless=True",
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """On the Metal graph a test of what has no Metal kernel is skipped, by the error that says so."""
    try:
        return (yield)
    except (ValueError, NotImplementedError) as error:
        on_metal = item.config.getoption("--metal-shim") or item.config.getoption("--gpu")
        if on_metal and any(reason in str(error) for reason in NOT_ON_METAL):
            pytest.skip(str(error))
        raise


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
