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

# Element type of each array that a body may name, in the order of a launch.
INPUT_TYPES = {
    "params": "int",
    "q": "FA_T",
    "k": "FA_T",
    "v": "FA_T",
    "attn_mask": "FA_MASK_T",
    "learnable_sink": "float",
    "alibi_slopes": "float",
    "cu_seqlens_q": "int",
    "cu_seqlens_k": "int",
    "seqused_q": "int",
    "seqused_k": "int",
    "dropout_key": "uint",
    "k_scales": "FA_CODE_SCALE_T",
    "k_biases": "FA_CODE_SCALE_T",
    "v_scales": "FA_CODE_SCALE_T",
    "v_biases": "FA_CODE_SCALE_T",
    "qv": "FA_T",
    "block_table": "int",
    "cache_batch_idx": "int",
    "cache_leftpad": "int",
    "rotary_cos": "FA_T",
    "rotary_sin": "FA_T",
    "out": "FA_T",
    "dout": "FA_T",
    "dlse": "float",
    "lse": "float",
    "delta": "float",
    "out_partial": "float",
    "lse_partial": "float",
}
OUTPUT_TYPES = {
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


def flatten(path: Path, seen: set[Path] | None = None) -> str:
    """The file with its includes in their places, each once, without comments and blank lines."""
    seen = set() if seen is None else seen
    seen.add(path.resolve())
    lines = []
    for line in without_comments(path.read_text()).splitlines():
        include = re.match(r'\s*#\s*include\s+[<"](.*)[>"]', line)
        if include is None:
            if line.strip() and not re.match(r"\s*#\s*pragma\s+once", line):
                lines.append(line.rstrip())
        elif (SOURCES / include[1]).exists() and (SOURCES / include[1]).resolve() not in seen:
            lines.append(flatten(SOURCES / include[1], seen))
    return "\n".join(lines)


def without_comments(text: str) -> str:
    """Block comments keep their line breaks."""
    text = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def kernel_of_file(path: Path, defines: dict[str, str], small_arrays: str = "device") -> KernelText:
    """The text of a file of src/metal, with the signature that MLX would write.

    MLX passes arrays of fewer than eight elements as `constant`; a body has to compile either way, so `small_arrays` is the
    space of all arrays but params, q, k, v and the results.
    """
    defines = DEFAULT_DEFINES | defines
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

    outputs = OUTPUT_TYPES.get(kernel, {})
    parameters = []
    for name, element in INPUT_TYPES.items():
        if name in outputs or not named(name):
            continue
        if name in ("k", "v") and (codes := defines.get(f"FA_{name.upper()}_CODES")):
            element = CODES[codes]
        elif element == "FA_CODE_SCALE_T":
            element = defines.get(element, "float")
        elif element == "FA_MASK_T":
            element = defines.get(element, "bool")
        space = "device" if name in ("params", "q", "k", "v", "out", "dout") else small_arrays
        parameters.append(f"const {space} {element}* {name}")
        if named(f"{name}_shape"):
            parameters.append(f"const constant int* {name}_shape")
        if named(f"{name}_strides"):
            parameters.append(f"const constant int64_t* {name}_strides")
        if named(f"{name}_ndim"):
            parameters.append(f"const constant int& {name}_ndim")
    parameters += [f"device {element}* {name}" for name, element in outputs.items() if named(name)]
    parameters = [f"{parameter} [[buffer({i})]]" for i, parameter in enumerate(parameters)]
    parameters += [f"{kind} {name} [[{name}]]" for name, kind in POSITIONS.items() if named(name)]
    return ",\n  ".join(parameters)
