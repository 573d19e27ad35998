"""Results are bit for bit the same on every run and for every number of threads; every ISA level meets the oracle."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from support import DTYPES, Cotangents, cotangents_of, digest, name_of, packed_qkv, qkv, run, run_python

from flash_attn.flash_attn_mlx import _core


def fingerprint(arguments: dict, cotangents: Cotangents) -> str:
    result = run(arguments, cotangents)
    return digest({"out": result.out, "lse": result.lse} | result.gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 239), (239, 1), (3, 799), (799, 3), (128, 217), (300, 300)])
def test_repeated_runs(rng, seqlen_q, seqlen_k, dtype):
    arguments = qkv(rng, 3, seqlen_q, seqlen_k, 4, 2, dtype=dtype) | {"causal": seqlen_q <= seqlen_k}
    cotangents = cotangents_of(arguments, rng)
    assert len({fingerprint(arguments, cotangents) for _ in range(15)}) == 1


def test_repeated_runs_of_packed_sequences(rng):
    arguments = packed_qkv(rng, [100, 1, 0, 61], [70, 9, 5, 61]) | {"causal": True}
    cotangents = cotangents_of(arguments, rng)
    assert len({fingerprint(arguments, cotangents) for _ in range(30)}) == 1


THREADED = """
import mlx.core as mx
import numpy as np
import combinations
from support import cotangents_of, digest, qkv, run
mx.set_default_device(mx.cpu)
rng = np.random.default_rng(0)
calls = [combinations.build(rng, features) for features in combinations.sample(25, seed=2)]
calls += [qkv(rng, 1, 300, 280, 6, 2, dtype=mx.bfloat16) | {"causal": True}, qkv(rng, 1, 1, 3000, 8, 1)]
for arguments in calls:
    result = run(arguments, cotangents_of(arguments, rng))
    print(digest({"out": result.out, "lse": result.lse} | result.gradients))
"""


def test_every_number_of_threads():
    want = run_python(THREADED, FLASH_ATTENTION_MLX_THREADS="1")
    assert len(want.split()) == 27
    for threads in ("2", "3", "7"):
        assert run_python(THREADED, FLASH_ATTENTION_MLX_THREADS=threads) == want


def test_the_number_of_threads_is_what_the_variable_says():
    script = "from flash_attn.flash_attn_mlx import _core; print(_core.num_threads())"
    assert run_python(script, FLASH_ATTENTION_MLX_THREADS="3").strip() == "3"


LEVEL = """
import mlx.core as mx
import numpy as np
import combinations
from flash_attn.flash_attn_mlx import _core
from support import check, qkv
mx.set_default_device(mx.cpu)
rng = np.random.default_rng(0)
for features in combinations.sample(12, seed=3):
    check(combinations.build(rng, features), rng)
for dtype in (mx.float32, mx.bfloat16, mx.float16):
    check(qkv(rng, 1, 130, 140, 4, 2, 72, 40, dtype=dtype) | {"causal": True}, rng)
print(_core.isa_level())
"""


@pytest.mark.parametrize("level", sorted({"baseline", _core.isa_level()}))
def test_every_isa_level_meets_the_oracle(level):
    assert run_python(LEVEL, FLASH_ATTENTION_MLX_ISA=level).strip() == level


def test_a_fork_leaves_both_processes_working():
    script = """
import os
import mlx.core as mx
from flash_attn import flash_attn_func
mx.set_default_device(mx.cpu)
x = mx.ones((1, 300, 2, 32))
mx.eval(flash_attn_func(x, x, x))
child = os.fork()
if child == 0:
    from flash_attn.flash_attn_mlx import _core
    os._exit(0 if _core.num_threads() >= 1 else 1)
assert os.waitpid(child, 0)[1] == 0
print(float(flash_attn_func(x, x, x).sum()))
"""
    assert float(run_python(script)) == pytest.approx(300 * 2 * 32)


def test_inputs_are_not_written(rng):
    arguments = qkv(rng, 2, 50, 60, 4, 2) | {"causal": True}
    before = {name: np.array(x) for name, x in arguments.items() if isinstance(x, mx.array)}
    run(arguments, cotangents_of(arguments, rng))
    for name, x in before.items():
        np.testing.assert_array_equal(np.array(arguments[name]), x)
