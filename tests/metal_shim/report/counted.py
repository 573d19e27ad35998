"""Runs a case under the shim and relates what it counted to what the case needs."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import needed
import numpy as np
from cases import Case
from generated_code import GeneratedCode, generated_code
from kernel_text import flatten
from metal_support import metal_graph, shim
from mlx_kernels import KERNELS, text_of
from rules import MOST_BYTES
from specialisations import READABLE

from flash_attn.flash_attn_mlx import flash_attn_func, flash_attn_with_kvcache

MOST_THREADGROUP_BYTES = 32 * 1024


@dataclass
class Row:
    """One kernel of one case. Ratios are to what the case needs; None is what a kernel has not."""

    case: str
    kernel: str
    flops: float
    bytes: float | None
    threadgroup_bytes_a_flop: float
    barriers_a_block: float | None
    instructions_a_product: float
    threadgroup_bytes: int
    registers: int
    stack_bytes: int
    text_bytes: int | None

    def exceeded(self, case: Case) -> list[str]:
        bounds = {
            "flops": case.flops,
            "bytes": case.bytes,
            "threadgroup_bytes": MOST_THREADGROUP_BYTES,
            "text_bytes": MOST_BYTES,
        }
        values = asdict(self)
        return [
            f"{self.case}, {self.kernel}: {name} {values[name]:.5g} exceeds {bound:.5g}"
            for name, bound in bounds.items()
            if bound is not None and values[name] is not None and values[name] > bound
        ]


def rows_of(case: Case) -> list[Row]:
    with metal_graph("record", readable=True) as module:
        run(case)
        readable = module.recorded_texts()
    with metal_graph("hooks") as module:
        module.clear_reports()
        run(case)
        texts = module.recorded_texts()
        found = []
        for report in module.reports():
            name = re.search(r"flash_attn_(\w+?)_[0-9a-f]{16}", report["function"])
            if name[1] in needed.MATRIX_PRODUCTS and not (case.backward and name[1] == "forward"):
                found.append(our_row(case, name[1], report, texts[name[0]], numbers_of(readable[name[0] + READABLE])))
    return found


def run(case: Case) -> None:
    dtype = getattr(mx, case.dtype)
    random = np.random.default_rng(7)

    def normal(*shape: int) -> mx.array:
        return mx.array(random.standard_normal(shape, np.float32)).astype(dtype)

    q = normal(1, case.seqlen_q, case.heads, case.head_dim)
    if case.page_size is None:
        k, v = (normal(1, case.seqlen_k, case.heads_k, case.head_dim) for _ in range(2))

        def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return flash_attn_func(q, k, v, causal=case.causal, window_size=case.window)

        mx.eval(mx.vjp(attention, [q, k, v], [normal(*q.shape)]) if case.backward else attention(q, k, v))
        return
    rows = case.page_size or case.seqlen_k
    pages = -(-case.seqlen_k // rows)
    k_cache, v_cache = (normal(pages, rows, case.heads_k, case.head_dim) for _ in range(2))
    table = mx.array(random.permutation(pages)[None], mx.int32) if case.page_size else None
    lengths = mx.array([case.seqlen_k], mx.int32)
    mx.eval(flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lengths, block_table=table, causal=True))


def numbers_of(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"^#define (FA_\w+) (\d+)$", text, flags=re.MULTILINE)}


def our_row(case: Case, kernel: str, report: dict[str, Any], text: str, defines: dict[str, int]) -> Row:
    block, step = defines["FA_BQ"], defines["FA_BK"]
    if kernel == "backward_dkv":
        block, step = step, block
    code = generated_code(text, 32 * defines["FA_SIMDGROUPS"])
    return row_of(case, kernel, report, code, block, step, defines["FA_GROUP"], needed.STREAMED[kernel], len(text.encode()))


def row_of(
    case: Case,
    kernel: str,
    report: dict[str, Any],
    code: GeneratedCode,
    block: int,
    step: int,
    group: int,
    streamed: tuple[str, ...],
    text_bytes: int | None,
) -> Row:
    algorithm = "forward" if kernel == STEEL else kernel
    read = sum(report["device_bytes_read"][name] for name in streamed)
    threadgroup = report["threadgroup_bytes_read"] + report["threadgroup_bytes_written"]
    turns = needed.streamed_blocks(case, algorithm, block, step, group) if kernel != "decode" else None
    return Row(
        case=case.name,
        kernel=kernel,
        flops=report["matrix_flops"] / needed.flops(case, algorithm),
        bytes=read / needed.streamed_bytes(case, algorithm, block, group),
        threadgroup_bytes_a_flop=threadgroup / report["matrix_flops"],
        barriers_a_block=report["barriers"] / turns if turns else None,
        instructions_a_product=code.instructions_a_product(),
        threadgroup_bytes=report["threadgroup_bytes_allocated"],
        registers=code.registers,
        stack_bytes=code.stack_bytes,
        text_bytes=text_bytes,
    )


# ---- MLX's own kernel

STEEL = "MLX's steel"
STEEL_HEADER = "steel/attn/kernels/steel_attention.h"
STEEL_WRAPPER = """
[[kernel]] void steel(
    const device {T}* Q [[buffer(0)]],
    const device {T}* K [[buffer(1)]],
    const device {T}* V [[buffer(2)]],
    device {T}* O [[buffer(3)]],
    const constant AttnParams* params [[buffer(4)]],
    uint simd_lane_id [[thread_index_in_simdgroup]],
    uint simd_group_id [[simdgroup_index_in_threadgroup]],
    uint3 tid [[threadgroup_position_in_grid]],
    uint3 lid [[thread_position_in_threadgroup]]) {{
  {function}(Q, K, V, O, params, nullptr, nullptr, nullptr, nullptr, simd_lane_id, simd_group_id, tid, lid);
}}
"""


def steel_row(case: Case) -> Row:
    """steel_attention from the headers of the installed MLX, in the shape that MLX launches it in before NAX."""
    block, step = 32, 32 if case.head_dim < 128 else 16
    element = {"float16": "half", "float32": "float"}[case.dtype]
    function = f"attention<{element}, {block}, {step}, {case.head_dim}, {case.head_dim}, 4, 1, float>"
    constants = {
        "align_Q": case.seqlen_q % block == 0,
        "align_K": case.seqlen_k % step == 0,
        "do_causal": case.causal,
    }
    text = text_of(STEEL_HEADER, **constants)
    random = np.random.default_rng(7)
    dtype = np.dtype(case.dtype)
    q, k, v, out = (
        random.standard_normal((1, heads, length, case.head_dim)).astype(dtype)
        for heads, length in (
            (case.heads, case.seqlen_q),
            (case.heads_k, case.seqlen_k),
            (case.heads_k, case.seqlen_k),
            (case.heads, case.seqlen_q),
        )
    )
    nothing = np.zeros(8, np.uint8)
    buffers = [
        ("q", q, False),
        ("k", k, False),
        ("v", v, False),
        ("out", out, True),
        ("params", steel_params(case, block, step), False),
    ]
    buffers += [("mask_params", nothing, False), ("mask", nothing, False), ("sinks", nothing, False), ("lse", nothing, False)]
    blocks = -(-case.seqlen_q // block)
    report = shim().run_text(text, function, buffers, [32 * blocks, 4 * case.heads, 1], [32, 4, 1], "hooks")
    code = generated_code(with_address_spaces(constants) + STEEL_WRAPPER.format(T=element, function=function), 128)
    return row_of(case, STEEL, report, code, block, step, 1, ("k", "v"), None)


def with_address_spaces(constants: dict[str, bool]) -> str:
    """The text as it is; for the shim, all address spaces are one."""
    text = flatten(KERNELS / STEEL_HEADER, KERNELS.parents[3])
    for name in re.findall(r"constant bool (\w+) \[\[", text):
        text = re.sub(
            rf"constant bool {name} [^;]*", f"constant constexpr bool {name} = {int(constants.get(name, False))}", text
        )
    return text


def steel_params(case: Case, block: int, step: int) -> np.ndarray:
    """AttnParams of MLX's steel/attn/params.h."""
    full_q, full_k = case.seqlen_q // block, case.seqlen_k // step
    integers = [1, case.heads, case.head_dim, case.seqlen_q, case.seqlen_k, case.heads // case.heads_k]
    blocks = [-(-case.seqlen_q // block), -(-case.seqlen_k // step), full_q, full_k]
    rest = [case.seqlen_q - full_q * block, case.seqlen_k - full_k * step, case.seqlen_k - case.seqlen_q]
    strides = [
        stride
        for heads, length in (
            (case.heads, case.seqlen_q),
            (case.heads_k, case.seqlen_k),
            (case.heads_k, case.seqlen_k),
            (case.heads, case.seqlen_q),
        )
        for stride in (heads * length * case.head_dim, length * case.head_dim, case.head_dim)
    ]
    parts = [
        np.array(integers, np.int32),
        np.array([case.head_dim**-0.5], np.float32),
        np.array(blocks + rest, np.int32),
        np.array(strides, np.int64),
    ]
    return np.frombuffer(b"".join(part.tobytes() for part in parts), np.uint8).copy()
