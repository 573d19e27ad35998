"""A kernel's text: as it is recorded, or put together from a file of src/metal and its #defines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[3] / "src"

# A kernel without features, for a file on its own.
DEFAULT_DEFINES = {
    "FA_T": "half",
    "FA_D": "64",
    "FA_DV": "64",
    "FA_GROUP": "1",
    "FA_BQ": "32",
    "FA_BK": "32",
    "FA_SIMDGROUPS": "4",
    "FA_SPLIT_D": "1",
}
# ... but for what the kernel is there for.
NEEDED_DEFINES = {
    "mask_gradient": {"FA_ATTN_MASK": "1", "FA_MASK_T": "half"},
    "decode": {"FA_CACHED": "1", "FA_SEQUSED_K": "1"},
    "rotary": {"FA_ROTARY_DIM": "32"},
}

# What a call may bring, in the order of a launch: its element type, and the flag that says it is there.
OPTIONAL_INPUTS = {
    "attn_mask": ("FA_MASK_T", "FA_ATTN_MASK"),
    "learnable_sink": ("float", "FA_SINK"),
    "alibi_slopes": ("float", "FA_ALIBI"),
    "cu_seqlens_q": ("int", "FA_VARLEN"),
    "cu_seqlens_k": ("int", "FA_VARLEN"),
    "seqused_q": ("int", "FA_SEQUSED_Q"),
    "seqused_k": ("int", "FA_SEQUSED_K"),
    "dropout_key": ("uint", "FA_DROPOUT"),
    "k_scales": ("FA_CODE_SCALE_T", "FA_K_CODES"),
    "k_biases": ("FA_CODE_SCALE_T", "FA_K_CODES"),
    "v_scales": ("FA_CODE_SCALE_T", "FA_V_CODES"),
    "v_biases": ("FA_CODE_SCALE_T", "FA_V_CODES"),
    "qv": ("FA_T", "FA_QV"),
    "block_table": ("int", "FA_PAGED"),
    "cache_batch_idx": ("int", "FA_BATCH_IDX"),
    "cache_leftpad": ("int", "FA_LEFTPAD"),
}
GRADIENT_INPUTS = {"dout": "FA_T", "lse": "float", "delta": "float"}
# Kernels that do not read q, k, v and the optional inputs.
OWN_INPUTS = {
    "delta": {"out": "FA_T", "dout": "FA_T", "dlse": "float"},
    "combine": {"out_partial": "float", "lse_partial": "float"},
    "rotary": {"x": "FA_T", "rotary_base": "int", "rotary_cos": "FA_T", "rotary_sin": "FA_T"},
}
OUTPUTS = {
    "forward": {"out": "FA_T", "lse": "float"},
    "decode": {"out": "FA_T", "lse": "float", "out_partial": "float", "lse_partial": "float"},
    "combine": {"out": "FA_T", "lse": "float"},
    "delta": {"delta": "float"},
    "backward_dq": {"dq": "FA_T"},
    "backward_dkv": {"dk": "FA_T", "dv": "FA_T"},
    "mask_gradient": {"dmask": "float"},
    "rotary": {"rotated": "FA_T"},
}
CODES = {"1": "char", "2": "uint", "3": "uint"}  # FA_K_CODES, FA_V_CODES
POSITIONS = {
    "thread_position_in_grid": "uint3",
    "threadgroup_position_in_grid": "uint3",
    "thread_position_in_threadgroup": "uint3",
    "thread_index_in_threadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
}


@dataclass(frozen=True)
class KernelText:
    """What the Metal compiler gets after MLX's own words."""

    name: str
    text: str


def flatten(path: Path, root: Path = SOURCES, seen: set[Path] | None = None) -> str:
    """The file with its includes from `root` in their places, each once, without comments and blank lines."""
    seen = set() if seen is None else seen
    seen.add(path.resolve())
    lines = []
    for line in without_comments(path.read_text()).splitlines():
        include = re.match(r'\s*#\s*include\s+[<"](.*)[>"]', line)
        if include is None:
            if line.strip() and not re.match(r"\s*#\s*pragma\s+once", line):
                lines.append(line.rstrip())
        elif not (root / include[1]).exists():
            lines.append(line)
        elif (root / include[1]).resolve() not in seen:
            lines.append(flatten(root / include[1], root, seen))
    return "\n".join(lines)


def without_comments(text: str) -> str:
    """Block comments keep their line breaks."""
    text = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def kernel_of_file(path: Path, defines: dict[str, str], small_arrays: str = "device") -> KernelText:
    """The text of a file of src/metal, with the signature that MLX would write.

    MLX passes arrays of fewer than eight elements as `constant`; a body has to compile either way, so `small_arrays` is the
    space of the optional ones.
    """
    defines = DEFAULT_DEFINES | NEEDED_DEFINES.get(path.stem, {}) | defines
    header, *body = re.split(r"^FA_BODY$", flatten(path), flags=re.MULTILINE)
    lines = [f"#define {name} {value}" for name, value in defines.items()]
    lines.append(header)
    if body:
        lines.append(
            f"[[kernel]] void {path.stem}(\n  {_signature(path.stem, body[0], defines, small_arrays)}) {{\n{body[0]}\n}}"
        )
    return KernelText(path.stem, "\n".join(lines))


def _signature(kernel: str, body: str, defines: dict[str, str], small_arrays: str) -> str:
    def named(word: str) -> bool:
        return re.search(rf"\b{word}\b", body) is not None

    outputs = OUTPUTS.get(kernel, {})
    parameters = []
    for name, element in _inputs(kernel, defines).items():
        space = small_arrays if name in OPTIONAL_INPUTS else "device"
        parameters.append(f"const {space} {element}* {name}")
        if f"{name}_shape" in body:
            parameters.append(f"const constant int* {name}_shape")
        if f"{name}_strides" in body:
            parameters.append(f"const constant int64_t* {name}_strides")
        if f"{name}_ndim" in body:
            parameters.append(f"const constant int& {name}_ndim")
    parameters += [f"device {element}* {name}" for name, element in outputs.items() if named(name)]
    parameters = [f"{parameter} [[buffer({i})]]" for i, parameter in enumerate(parameters)]
    parameters += [f"{kind} {name} [[{name}]]" for name, kind in POSITIONS.items() if named(name)]
    return ",\n  ".join(parameters)


def _inputs(kernel: str, defines: dict[str, str]) -> dict[str, str]:
    """Element types by name, in the order of a launch."""
    if kernel in OWN_INPUTS:
        return {"params": "int", **OWN_INPUTS[kernel]}
    inputs = {"params": "int", "q": "FA_T"}
    inputs |= {name: CODES.get(defines.get(f"FA_{name.upper()}_CODES", ""), "FA_T") for name in ("k", "v")}
    for name, (element, flag) in OPTIONAL_INPUTS.items():
        exact_codes = name.endswith("_biases") and defines.get(flag) == "1"
        starts_of_a_cache = name == "cu_seqlens_k" and "FA_CACHED" in defines
        if flag in defines and not exact_codes and not starts_of_a_cache:
            inputs[name] = element
    return inputs | (GRADIENT_INPUTS if kernel in OUTPUTS and kernel not in ("forward", "decode") else {})
