"""What a compiler for a GPU makes of a kernel's text: clang's AMD backend, wave32, with registers of 32 bits a lane.

Not an Apple GPU, but the same kind of machine, with a register allocator that counts: how many registers a thread needs, what
spills, what a feature costs. And what must not be left after optimisation: calls, data of the program, doubles, arrays in
memory because they are indexed by a variable.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from address_space import FLOAT_FLAGS, WORDS, find_clang, for_clang

GPU = ["-target", "amdgcn-amd-amdhsa", "-mcpu=gfx1030", "-nogpulib", "-O2"]
LANGUAGE = ["-x", "c++", "-std=c++17", "-nostdinc", "-w", "-fno-exceptions", "-fno-rtti", "-D__METAL_VERSION__=320"]
NUMBERS = ["-ffp-contract=fast", "-fno-math-errno", *FLOAT_FLAGS]

# What the positions are on this machine; the same for all lanes of a simdgroup where the hardware knows it.
POSITIONS = {
    "thread_position_in_grid": "uint3{__builtin_amdgcn_workgroup_id_x() * THREADS + __builtin_amdgcn_workitem_id_x(), 0, 0}",
    "threadgroup_position_in_grid": f"uint3{{{', '.join(f'__builtin_amdgcn_workgroup_id_{axis}()' for axis in 'xyz')}}}",
    "thread_position_in_threadgroup": "uint3{__builtin_amdgcn_workitem_id_x(), 0, 0}",
    "thread_index_in_threadgroup": "__builtin_amdgcn_workitem_id_x()",
    "thread_index_in_simdgroup": "__builtin_amdgcn_workitem_id_x() % 32",
    "simdgroup_index_in_threadgroup": "__builtin_amdgcn_readfirstlane(__builtin_amdgcn_workitem_id_x() / 32)",
}


@dataclass(frozen=True)
class GeneratedCode:
    ir: str
    assembly: str

    def number(self, name: str) -> int:
        return int(re.search(rf"; {name}: (\d+)", self.assembly)[1])

    @property
    def registers(self) -> int:
        """Of 32 bits, a thread."""
        return self.number("NumVgprs")

    @property
    def stack_bytes(self) -> int:
        """Of memory, a thread: what spills, and arrays indexed by a variable."""
        return self.number("ScratchSize")

    @property
    def threadgroup_bytes(self) -> int:
        return self.number("LDSByteSize")

    def instructions_a_product(self) -> float:
        """Those that each lane pays for, in the outermost loop around the matrix products, for each product.

        Moves between registers are left out: they come of how a product is modelled, as one instruction on register pairs.
        """
        main = self._main_loop()
        products = sum("; matrix product" in line for line in main)
        return sum(bool(re.match(r"\s+(?:v_(?!mov_b32)|ds_|global_|flat_|scratch_)", line)) for line in main) / products

    def _main_loop(self) -> list[str]:
        loops: dict[str, list[str]] = {}
        block = header = ""  # of the line, and of the outermost loop around it
        for line in self.assembly.splitlines():
            if label := re.match(r"(?:\.L|; %)(\w+):", line):
                block, header = label[1], ""
            if re.search(r"=>\s*This (?:Inner )?Loop Header: Depth=1\b", line):
                header = block
            elif of := re.search(r"(?:Parent Loop |in Loop: Header=)(\w+) Depth=1\b", line):
                header = of[1]
            if header:
                loops.setdefault(header, []).append(line)
        return max((lines for lines in loops.values() if any("; matrix product" in line for line in lines)), key=len)


def generated_code(text: str, threads: int) -> GeneratedCode:
    """Of a kernel that is launched with so many threads a threadgroup."""
    source = f"#include <metal_stdlib>\n#include <gpu_words.h>\n{for_clang(_with_positions(text))}\n"
    words = ["-isystem", str(WORDS), f"-DTHREADS={threads}"]
    ir = _clang([*LANGUAGE, *NUMBERS, *words, "-emit-llvm", "-S", "-o", "-", "-"], source)
    # clang 14 has no words for these: a kernel's convention and size, and threadgroup memory that starts as garbage.
    ir = re.sub(r"^define hidden void @", "define amdgpu_kernel void @", ir, flags=re.MULTILINE)
    ir = ir.replace("attributes #0 = {", f'attributes #0 = {{ "amdgpu-flat-work-group-size"="{threads},{threads}"', 1)
    ir = re.sub(r"(addrspace\(3\) global .*) zeroinitializer", r"\1 undef", ir)
    only_the_back_end = ["-Xclang", "-disable-llvm-passes", "-mllvm", "-disable-promote-alloca-to-lds"]
    return GeneratedCode(ir, _clang(["-x", "ir", *only_the_back_end, "-S", "-o", "-", "-"], ir))


def objections(code: GeneratedCode) -> list[str]:
    found = list(_objections(code.ir))
    if code.stack_bytes:
        arrays = re.findall(r"= alloca (.*?),", code.ir)
        found.append(f"{code.stack_bytes} bytes of stack: what spills, or is indexed by a variable: {', '.join(arrays)}")
    return found


def _objections(ir: str) -> Iterator[str]:
    for name, kind in re.findall(r"^@(\S+) = (.*)$", ir, flags=re.MULTILINE):
        if name.startswith("_ZTV"):
            yield f"virtual functions: {name}"
        elif re.search(r"\bglobal\b", kind) and "addrspace(3)" not in kind and not name.startswith("llvm."):
            yield f"data that a kernel could write at program scope: {name}"
    for name in re.findall(r"^declare [^@]*@([\w.]+)", ir, flags=re.MULTILINE):
        if not name.startswith("llvm."):
            yield f"a function that Metal does not have: {name}"
    kernels = re.findall(r"^define [^@]*@(\w+)", ir, flags=re.MULTILINE)
    for name in kernels:
        if len(kernels) > 1 and re.search(rf"call [^@\n]*@{name}\(", ir):
            yield f"a call that cannot be inlined: {name}"
    if re.search(r"\bcall [^@\n]*%\w+\(", ir):
        yield "a call through a pointer"
    for line in re.findall(r"^\s.*\bdouble\b.*$", ir, flags=re.MULTILINE)[:1]:
        yield f"arithmetic in double: {line.strip()}"


def _with_positions(text: str) -> str:
    """Positions are no arguments of a kernel here."""
    kernel = re.search(r"\[\[kernel\]\] void (\w+)\((.*?)\)\s*\{", text, flags=re.DOTALL)
    parameters = [parameter.strip() for parameter in kernel[2].split(",")]
    buffers = [parameter for parameter in parameters if "[[buffer(" in parameter]
    positions = [re.match(r"(\w+)\s+(\w+)\s*\[\[(\w+)\]\]", parameter) for parameter in parameters if parameter not in buffers]
    values = "".join(f"const {position[1]} {position[2]} = {POSITIONS[position[3]]};\n" for position in positions)
    return f"{text[: kernel.start()]}void {kernel[1]}({', '.join(buffers)}) {{\n{values}{text[kernel.end() :]}"


def _clang(arguments: list[str], source: str) -> str:
    run = subprocess.run([find_clang(), *GPU, *arguments], input=source, capture_output=True, text=True)
    if run.returncode:
        raise ValueError(run.stderr)
    return run.stdout
