"""Every kind of text that MLX gets: calls that together use each feature, dtype and head dim, recorded and not run.

`python tests/metal_shim/lint/specialisations.py FOLDER` writes each as a file that `xcrun metal -c` takes, and one to read
into FOLDER_readable.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[2]
if str(TESTS / "python") not in sys.path:
    sys.path.append(str(TESTS / "python"))

import combinations  # noqa: E402
import kvcache_combinations  # noqa: E402
import kvcache_support  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
import support  # noqa: E402
from kernel_text import flatten  # noqa: E402
from metal_support import metal_graph  # noqa: E402
from test_kvcache_quantised import FORMATS, quantised  # noqa: E402
from test_paged_varlen import paged  # noqa: E402

from flash_attn import flash_attn_with_kvcache  # noqa: E402

HEAD_DIMS = ((8, 8), (33, 33), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256))
CACHE_HEAD_DIMS = (*HEAD_DIMS, (576, 512))
COMBINATIONS = 24
READABLE = "_readable"
ALL_FEATURES = frozenset(combinations.FEATURES) - {"boolean_mask"}  # a call has one mask


def recorded(readable: bool = False) -> dict[str, str]:
    """Texts by the names of their kernels. Those for people have #defines, and the names that the sources have."""
    with metal_graph("record", readable=readable) as module:
        module.clear_texts()
        for arguments in dense_calls():
            support.run(arguments, support.cotangents_of(arguments, np.random.default_rng(1)))
        for arguments in cached_calls():
            mx.eval(flash_attn_with_kvcache(**kvcache_support.copied(arguments), return_softmax_lse=True))
        return {name.removesuffix(READABLE): text for name, text in module.recorded_texts().items()}


def recorded_at_once() -> dict[str, str]:
    """Texts of calls that use all that goes together at once."""
    random = np.random.default_rng(20220527)
    dense = combinations.build(random, ALL_FEATURES, mx.bfloat16)
    dense["seqused_q"] = support.integers(3, 0, 1)
    pages = paged(random, combinations.build(random, ALL_FEATURES, mx.bfloat16), 16)
    cached = [kvcache_combinations.build(random, frozenset(kvcache_combinations.FEATURES), mx.bfloat16) for _ in range(4)]
    coded = kvcache_support.cache_call(random, 3, 2, 75, 4, 1, 64, dtype=mx.bfloat16)
    coded |= {name: cached[0][name] for name in ("softcap", "attention_chunk", "window_size", "num_splits")}
    coded |= {"learnable_sink": mx.zeros(4), "alibi_slopes": mx.zeros(4), "cache_leftpad": mx.zeros(3, mx.int32)}
    coded = quantised(kvcache_support.page(random, coded, 16), "mlx4")
    with metal_graph("record") as module:
        module.clear_texts()
        support.run(dense, support.cotangents_of(dense, np.random.default_rng(1)))
        mx.eval(support.attention(**pages))
        for arguments in (*cached, coded):
            mx.eval(flash_attn_with_kvcache(**kvcache_support.copied(arguments), return_softmax_lse=True))
        return dict(module.recorded_texts())


def dense_calls() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(20220527)
    alone = [frozenset(), *(frozenset({feature}) for feature in combinations.FEATURES)]
    for dtype in support.DTYPES:
        for features in alone:
            yield combinations.build(random, features, dtype)
        yield combinations.build(random, frozenset({"seqused"}), dtype) | {"seqused_q": support.integers(3, 0, 1)}
        for dim, dim_v in HEAD_DIMS:
            yield support.qkv(random, 1, 40, 40, 2, 1, dim, dim_v, dtype)
    for features in combinations.sample(COMBINATIONS, seed=7):
        yield combinations.build(random, features)


def cached_calls() -> Iterator[dict[str, Any]]:
    random = np.random.default_rng(20220527)
    features = kvcache_combinations.FEATURES
    alone = [frozenset({feature}) for feature in features if feature not in kvcache_combinations.NEEDS]
    for dtype in support.DTYPES:
        for chosen in [frozenset(), *alone]:
            yield kvcache_combinations.build(random, chosen, dtype)
        for dim, dim_v in CACHE_HEAD_DIMS:
            yield kvcache_support.cache_call(random, 2, 1, 64, 4, 1, dim, dim_v, dtype=dtype)
        for format_ in FORMATS:
            for seqlen_q, dim in ((1, 64), (1, 128), (40, 128)):
                contiguous = kvcache_support.cache_call(random, 2, seqlen_q, 64, 4, 1, dim, dtype=dtype)
                for call in (contiguous, kvcache_support.page(random, contiguous, 16)):
                    yield quantised(call, format_)
    for chosen in kvcache_combinations.sample(COMBINATIONS, seed=7):
        yield kvcache_combinations.build(random, chosen)


def prelude() -> str:
    """What MLX puts before every kernel: its utils.h, from the installed headers."""
    root = Path(next(iter(find_spec("mlx").submodule_search_locations))) / "include"
    return "#include <metal_stdlib>\nusing namespace metal;\n" + flatten(root / "mlx/backend/metal/kernels/utils.h", root)


def main() -> None:
    mx.set_default_device(mx.cpu)
    write(Path(sys.argv[1]), recorded())
    write(Path(f"{sys.argv[1]}_readable"), recorded(readable=True))


def write(folder: Path, texts: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.metal").write_text(f"{prelude()}\n{text}\n")
    print(f"{len(texts)} texts in {os.path.relpath(folder)}")


if __name__ == "__main__":
    main()
