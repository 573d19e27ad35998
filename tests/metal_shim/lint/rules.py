"""Rules for a kernel's text that neither the shim nor clang can check: what Metal refuses, or hardware does not forgive.

Each rule is a function from a text to the places where it is broken, and its docstring is the reason that a reader is shown. A
text is looked at as the compiler sees it, after the preprocessor, except where a rule is about macros.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections.abc import Callable, Iterator

from address_space import find_clang

Rule = Callable[[str], Iterator[str]]

# MLX puts a text together for every node: 6 us at this size.
MOST_BYTES = 15 * 1024
MOST_BUFFERS = 31

SPACES = {"device", "constant", "threadgroup", "thread"}
FLOATS = {"half", "bfloat", "float", "float16_t", "bfloat16_t"}
INTEGERS = {"bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "size_t"}
SCALARS = FLOATS | INTEGERS | {f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)}
VECTORS = {f"{scalar}{n}" for scalar in SCALARS for n in (2, 3, 4)}
SPECIFIERS = {"const", "volatile", "static", "constexpr", "inline", "typename", "metal", "flash_attn", "::"}

COLLECTIVES = r"(?:threadgroup_barrier|simdgroup_barrier|simd_\w+|simdgroup_multiply_accumulate)"
LANE_WORDS = r"\b(?:lane|row|column|col|lane_id|thread_index_in_simdgroup|thread_position_in_threadgroup)\b"


def broken(text: str, but: Rule | None = None, only: Rule | None = None) -> list[str]:
    """One line for each place where a rule is broken: the rule, the place, the reason."""
    preprocessed = _preprocessed(text)
    found = []
    for rule in RULES:
        if rule is but or only not in (None, rule):
            continue
        seen = text if rule in RULES_OF_RAW_TEXT else preprocessed
        reason = " ".join((rule.__doc__ or "").split())
        found += [f"{rule.__name__}: {' '.join(place.split())}\n    {reason}" for place in rule(seen)]
    return found


def pointers_have_an_address_space(text: str) -> Iterator[str]:
    """Metal refuses a pointer or reference without device, constant, threadgroup or thread."""
    tokens = _tokens(text)
    types = _type_names(text)
    for i, token in enumerate(tokens):
        if token not in ("*", "&") or (i and tokens[i - 1] in SPACES):
            continue
        start = _start_of_type(tokens, i, types)
        if start is None:
            continue
        before = start
        while before and tokens[before - 1] in SPECIFIERS | SPACES:
            before -= 1
        if not SPACES & set(tokens[before:i]):
            yield " ".join(tokens[before : i + 2])


def pointers_are_not_cast_as_in_c(text: str) -> Iterator[str]:
    """A C cast can change the address space unseen; reinterpret_cast cannot."""
    tokens = _tokens(text)
    types = _type_names(text)
    for i in range(1, len(tokens) - 2):
        if tokens[i] != "*" or tokens[i + 1] != ")" or _start_of_type(tokens, i, types) is None:
            continue
        opening = _opening(tokens, i + 1)
        if tokens[opening - 1] == "return" or not re.match(r"\w|>", tokens[opening - 1]):
            yield " ".join(tokens[opening : i + 3])


def threadgroup_arrays_are_plain(text: str) -> Iterator[str]:
    """`threadgroup T name[N];` with scalar T, one a line, in the kernel's body: what the shim can give guards and poison."""
    scalars = SCALARS | set(re.findall(r"\busing\s+(\w+)\s*=", text)) - VECTORS
    in_kernel = False
    for line in text.splitlines():
        in_kernel |= "[[kernel]]" in line
        is_declaration = re.search(r"\bthreadgroup\s+(?:const\s+)?[\w:]+(?:<[^<>]*>)?\s+\w+\s*(\[|=|;)", line)
        plain = re.fullmatch(r"\s*threadgroup (\w+) \w+\[[^\[\];]+\];\s*", line)
        if is_declaration and not (plain and plain[1] in scalars and in_kernel):
            yield line


def globals_are_constant(text: str) -> Iterator[str]:
    """Metal has no other data at program scope."""
    for statement in _statements_outside_functions(text):
        if "(" in statement.split("=")[0] or re.match(
            r"(?:template|using|typedef|struct|enum|static_assert|namespace|union)\b", statement
        ):
            continue
        if not re.search(r"\bconstant\b", statement):
            yield statement


def locals_are_not_static(text: str) -> Iterator[str]:
    """A static local is program-scope data, which Metal has only as `constant`."""
    for body in _functions(text).values():
        yield from re.findall(r"\bstatic\b[^;]*;", body)


def floats_are_single(text: str) -> Iterator[str]:
    """Metal has no double; 0.5 would be one here and a silent float there. `h` is no suffix of C++."""
    yield from _lines_with(r"\bdouble\b", text)
    number = r"(?<![\w.])(?:\d+\.\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)(?![fF\w.])"
    yield from re.findall(number, text)
    yield from re.findall(r"(?<![\w.])[\d.]+(?:[eE][+-]?\d+)?[hH]\b", text)


def only_words_of_metal(text: str) -> Iterator[str]:
    """Metal's C++ has none of these, or no GPU of our list has them."""
    words = r"goto|new|delete|virtual|throw|try|catch|dynamic_cast|typeid|asm|std|long long|atomic\w*|__builtin\w*"
    yield from _lines_with(rf"\b(?:{words})\b", text)
    yield from re.findall(r"\[\s*[&=]?\s*\]\s*[({][^\n]*", text)  # lambdas
    yield from re.findall(r"\(\s*\*\s*\w+\s*\)\s*\([^\n]*", text)  # pointers to functions
    yield from re.findall(r"\b\w+\s+\w+\s*:\s*\d+\s*;", text)  # bit-fields


def functions_do_not_call_themselves(text: str) -> Iterator[str]:
    """A GPU thread has no call stack."""
    for name, body in _functions(text).items():
        if re.search(rf"(?<![\w.:])(?:flash_attn::)?{name}\s*(?:<[^;(){{}}]*>)?\(", body):
            yield f"{name} calls {name}"


def swizzles_are_plain(text: str) -> Iterator[str]:
    """x, y, z, w, xy and zw are what the shim's vectors have."""
    structs = re.findall(r"\b(?:struct|union)\s+\w+\s*\{[^{}]*", text)
    members = {member for struct in structs for member in re.findall(r"\b(\w+)(?:\[\w*\])?\s*[;,=]", struct)}
    for swizzle in re.findall(r"(?<=[\w)\]])\.([xyzw]{2,4}|[rgba]{1,4}|lo|hi|even|odd)\b(?!\s*\()", text):
        if swizzle not in ("xy", "zw") and swizzle not in members:
            yield f".{swizzle}"


def macros_begin_with_fa(text: str) -> Iterator[str]:
    """They come after MLX's and Metal's headers in one text, and a one-letter name breaks those. An array that a call lacks may
    be defined as Absent."""
    for name, value in re.findall(r"^\s*#\s*define\s+(\w+)([^\n]*)", text, flags=re.MULTILINE):
        if not name.startswith("FA_") and value.strip() != "flash_attn::Absent()":
            yield f"#define {name}{value}"


def nothing_is_named_thread(text: str) -> Iterator[str]:
    """It is an address space, which the shim's compiler does not see: `uint thread` is a parameter without a name there."""
    yield from re.findall(r"\b(?!const\b)\w+[>&*]*\s+thread\s*[,)=;[][^\n]*", text)


def kernels_are_attributed(text: str) -> Iterator[str]:
    """MLX writes [[kernel]]; the keyword `kernel` would shadow it."""
    yield from re.findall(r"^\s*kernel\s+void[^\n]*", text, flags=re.MULTILINE)


def collectives_meet_all_lanes(text: str) -> Iterator[str]:
    """A barrier, shuffle or matrix product that some lanes of a simdgroup skip is undefined: none stands under a condition on a
    lane, row or column, nor after such a condition has left the function or loop."""
    functions = _functions(text)
    collective = _names_with_collectives(functions)
    for body in functions.values():
        if not re.search(collective, body):
            continue
        for condition, controlled, rest in _conditionals(body):
            if not re.search(LANE_WORDS, condition):
                continue
            if re.search(collective, controlled):
                yield f"({condition}) {controlled}"
            leaves = re.search(r"\b(?:return|continue|break)\b", controlled)
            if leaves and re.search(collective, rest):
                yield f"({condition}) {controlled}"
        for statement in re.split(r"[;{}]", body):
            if (
                "?" in statement
                and re.search(LANE_WORDS, statement.split("?")[0])
                and re.search(collective, statement.split("?", 1)[1])
            ):
                yield statement


def matrices_are_plain(text: str) -> Iterator[str]:
    """simdgroup_load and store fix a layout that thread_elements leaves open, simdgroup_matrix(x) is a diagonal matrix, and
    asynchronous copies are undocumented."""
    yield from re.findall(r"\bsimdgroup_(?:load|store|async_copy|event)\b[^\n]*", text)
    yield from re.findall(r"\bsimdgroup_matrix\s*<[^<>]*>\s*\([^)\n][^\n]*", text)
    yield from re.findall(r"\bsimdgroup_(?:float|half|bfloat)8x8\s*\([^)\n][^\n]*", text)
    yield from re.findall(r"\bsimdgroup_matrix\s*<[^<>]*>\s+\w+\s*[({][^\n]*", text)


def text_is_short(text: str) -> Iterator[str]:
    """What MLX builds and hashes has its price: see MOST_BYTES."""
    if len(text.encode()) > MOST_BYTES:
        yield f"{len(text.encode())} bytes"


def buffers_are_few(text: str) -> Iterator[str]:
    """Metal has 31 buffer slots."""
    if text.count("[[buffer(") > MOST_BUFFERS:
        yield f"{text.count('[[buffer(')} buffers"


RULES: tuple[Rule, ...] = (
    pointers_have_an_address_space,
    pointers_are_not_cast_as_in_c,
    threadgroup_arrays_are_plain,
    globals_are_constant,
    locals_are_not_static,
    floats_are_single,
    only_words_of_metal,
    functions_do_not_call_themselves,
    swizzles_are_plain,
    macros_begin_with_fa,
    nothing_is_named_thread,
    kernels_are_attributed,
    collectives_meet_all_lanes,
    matrices_are_plain,
    text_is_short,
    buffers_are_few,
)
RULES_OF_RAW_TEXT = (macros_begin_with_fa, text_is_short, buffers_are_few)


# ---- as much grammar as the rules need


def _preprocessed(text: str) -> str:
    command = [find_clang(), "-E", "-P", "-x", "c++", "-nostdinc", "-D__METAL_VERSION__=320", "-"]
    without_includes = re.sub(r"^\s*#\s*include.*$", "", text, flags=re.MULTILINE)
    return subprocess.run(command, input=without_includes, capture_output=True, text=True, check=True).stdout


def _lines_with(pattern: str, text: str) -> Iterator[str]:
    return (line for line in text.splitlines() if re.search(pattern, line))


@functools.lru_cache(maxsize=8)
def _tokens(text: str) -> list[str]:
    return re.findall(r"\w+|::|&&|\|\||\[\[|\]\]|\S", text)


def _type_names(text: str) -> set[str]:
    declared = re.findall(r"\b(?:struct|class|typename|using|enum|union)\s+(?:\.\.\.\s*)?(\w+)", text)
    return SCALARS | VECTORS | {"void", "auto", "vec"} | set(declared)


def _opening(tokens: list[str], closing: int) -> int:
    pair = {")": "(", ">": "<"}[tokens[closing]]
    depth = 0
    for i in range(closing, -1, -1):
        depth += (tokens[i] == tokens[closing]) - (tokens[i] == pair)
        if depth == 0:
            return i
    return 0


def _start_of_type(tokens: list[str], declarator: int, types: set[str]) -> int | None:
    """Where the type before a `*` or `&` starts, or None where that is a product or an address."""
    at = declarator - 1
    while at >= 0 and tokens[at] in ("const", *SPACES):
        at -= 1
    if at >= 0 and tokens[at] == ">":
        at = _opening(tokens, at) - 1
    return at if at >= 0 and tokens[at] in types else None


def _past_braces(text: str, opening: int) -> int:
    """Past the bracket that closes the one at `opening`."""
    pair = {"(": ")", "{": "}"}[text[opening]]
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == text[opening]) - (text[i] == pair)
        if depth == 0:
            return i + 1
    return len(text)


def _function_heads(text: str) -> Iterator[tuple[str, int]]:
    """Name, and where its body's brace is."""
    for head in re.finditer(r"(?<![\w.])(operator\s*\W+|~?\w+)\s*\(", text):
        if head[1] in ("if", "for", "while", "switch", "return", "sizeof", "decltype", "static_assert"):
            continue
        after = _past_braces(text, head.end() - 1)
        qualifiers = re.match(r"\s*(?:const|thread|device|threadgroup|constant|noexcept|\s)*(?::[^{};]*)?\{", text[after:])
        if qualifiers and not re.search(r"[=?]\s*$", text[: head.start()]):
            yield head[1].strip(), after + qualifiers.end() - 1


@functools.lru_cache(maxsize=8)
def _functions(text: str) -> dict[str, str]:
    """Bodies by name; those of overloads together."""
    bodies: dict[str, str] = {}
    for name, brace in _function_heads(text):
        bodies[name] = bodies.get(name, "") + text[brace : _past_braces(text, brace)]
    return bodies


def _statements_outside_functions(text: str) -> Iterator[str]:
    """Those of namespaces: functions and types are left out."""
    outside = text
    for _, brace in sorted(_function_heads(text), key=lambda head: -head[1]):
        if brace < len(outside):
            outside = outside[:brace] + ";" + outside[_past_braces(outside, brace) :]
    outside = re.sub(r"\b(?:inline\s+)?namespace\s+[\w:]*\s*\{", "", outside)
    while match := re.search(r"\b(?:struct|enum|union|class)\b[^;{}]*\{", outside):
        outside = outside[: match.start()] + outside[_past_braces(outside, match.end() - 1) :]
    for statement in outside.split(";"):
        statement = re.sub(r"^[\s}]+", "", re.sub(r"\[\[.*?\]\]", "", statement)).strip()
        if statement:
            yield statement


def _names_with_collectives(functions: dict[str, str]) -> str:
    """A pattern of every call that meets a barrier, a simd operation or a matrix product, however deep."""
    names: set[str] = set()
    pattern = rf"\b{COLLECTIVES}\s*\("
    while more := {name for name, body in functions.items() if re.search(pattern, body)} - names:
        names |= more
        pattern = rf"\b(?:{COLLECTIVES}|{'|'.join(map(re.escape, sorted(names)))})\s*(?:<[^;(){{}}]*>)?\("
    return pattern


def _conditionals(body: str) -> Iterator[tuple[str, str, str]]:
    """Condition, what it controls, and what follows, for each if, for and while; an else belongs to its if."""
    for word in re.finditer(r"\b(?:if(?:\s+constexpr)?|for|while)\s*\(", body):
        after = _past_braces(body, word.end() - 1)
        condition = body[word.end() : after - 1]
        if word[0].startswith("for"):
            condition = condition.split(";")[1] if condition.count(";") == 2 else condition
        end = _past_statement(body, after)
        while word[0].startswith("if") and (otherwise := re.match(r"\s*else\b", body[end:])):
            end = _past_statement(body, end + otherwise.end())
        yield condition, body[after:end].strip(), body[end:]


def _past_statement(body: str, at: int) -> int:
    at += len(body[at:]) - len(body[at:].lstrip())
    if body[at : at + 1] == "{":
        return _past_braces(body, at)
    if head := re.match(r"(?:if(?:\s+constexpr)?|for|while)\s*\(", body[at:]):
        return _past_statement(body, _past_braces(body, at + head.end() - 1))
    semicolon = body.find(";", at)
    return len(body) if semicolon < 0 else semicolon + 1
