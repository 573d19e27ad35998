"""What flash attention runs on here, and whether it works: `python -m flash_attn.flash_attn_mlx.device`.

With --self-test it also tries the GPU's matrix units and measures speed, and writes what it found as JSON, for a bug report.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from . import _build_info, _core, self_test
from .interface import flash_attn_func


def check_mlx_requirements(self_test: bool = True) -> dict[str, Any]:
    """Everything that decides whether and how flash attention runs in this process.

    Returns a dict:
        version: of this package.
        compiler, build_type: what it was built with.
        mlx_built, mlx_found: MLX's version at build and now; they must be equal, since MLX's C++ ABI changes in patch releases.
        abi_ok: they are equal and the compiled module accepts an mx.array.
        backends: {"cpu", "metal", "cuda"} to what runs there: "kernels", "MLX ops" or "absent".
        isa_level: instruction-set level of the CPU kernels in use; threads: how many a call may use.
        cpu, gpu: names of the devices; gpu is None where MLX has none.
        self_test: {test name: largest error over what rounding allows}, below 1 is a pass; empty unless `self_test`.
        ok: abi_ok, and every self-test passed.
    """
    mlx_found = version("mlx")
    report: dict[str, Any] = {
        "version": _build_info.VERSION,
        "compiler": _build_info.COMPILER,
        "build_type": _build_info.BUILD_TYPE,
        "mlx_built": _build_info.MLX_VERSION,
        "mlx_found": mlx_found,
        "abi_ok": mlx_found == _build_info.MLX_VERSION and _accepts_arrays(),
        "backends": {
            "cpu": "kernels",
            "metal": "kernels" if mx.metal.is_available() else "absent",
            "cuda": "MLX ops" if mx.cuda.is_available() else "absent",
        },
        "isa_level": _core.isa_level(),
        "threads": _core.num_threads(),
        "cpu": mx.device_info(mx.cpu).get("device_name"),
        "gpu": mx.device_info(mx.gpu).get("device_name") if mx.is_available(mx.gpu) else None,
        "self_test": _errors() if self_test else {},
    }
    report["ok"] = report["abi_ok"] and all(error < 1 for error in report["self_test"].values())
    return report


def full_self_test() -> dict[str, Any]:
    """What check_mlx_requirements finds, and more, for a bug report.

    Adds to it:
        system: the operating system and Python.
        gpu_info: what MLX says of the GPU.
        simdgroup_matrices: products_right, and elements_of_lanes, the two elements of an 8 x 8 matrix that each lane holds.
        speeds: of each device, {call, unit, ours, mlx}.
        warnings: what was warned of on the way.
        error: where there was one, after which nothing more was tried.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = check_mlx_requirements()
        report["system"] = f"{platform.platform()}, Python {platform.python_version()}"
        report["gpu_info"] = dict(mx.device_info(mx.gpu)) if mx.is_available(mx.gpu) else None
        report["speeds"] = {}
        try:
            if mx.metal.is_available():
                report["simdgroup_matrices"] = self_test.simdgroup_matrices()
                report["ok"] = report["ok"] and report["simdgroup_matrices"]["products_right"]
            for device in _devices():
                report["speeds"][_name_of(device)] = self_test.speeds(device)
        except Exception as error:  # the rest of the report is worth having
            report["ok"] = False
            report["error"] = f"{type(error).__name__}: {error}"
    report["warnings"] = [str(warning.message) for warning in caught]
    return report


def _accepts_arrays() -> bool:
    array = mx.zeros((1, 1, 1, 1), stream=self_test.CPU)
    try:
        flash_attn_func(array, array, array, stream=self_test.CPU)
    except TypeError:  # what nanobind raises when the two modules do not share their types
        return False
    return True


def _devices() -> list[mx.Device]:
    """Those with kernels of ours."""
    return [self_test.CPU, *([mx.Device(mx.gpu)] if mx.metal.is_available() else [])]


def _name_of(device: mx.Device) -> str:
    return "cpu" if device == self_test.CPU else "metal"


def _errors() -> dict[str, float]:
    found: dict[str, float] = {}
    for device in _devices():
        errors = self_test.errors(device)
        found |= {f"{name}, {_name_of(device)}": error for name, error in errors.items()}
    return found


def _print_report(report: dict[str, Any]) -> None:
    print(f"flash-attn-mlx {report['version']}, {report['compiler']}, {report['build_type']}")
    print(f"  MLX         built against {report['mlx_built']}, found {report['mlx_found']}")
    print(f"  ABI check   {'pass' if report['abi_ok'] else 'FAIL'}")
    print(f"  backends    {', '.join(f'{name}: {state}' for name, state in report['backends'].items())}")
    print(f"  CPU         {report['cpu']}, ISA level {report['isa_level']}, {report['threads']} threads")
    print(f"  GPU         {report['gpu'] or 'none'}")
    print("  self-test   error / what rounding allows")
    for name, error in report["self_test"].items():
        print(f"    {name:<40} {error:7.3f}  {'pass' if error < 1 else 'FAIL'}")
    if matrices := report.get("simdgroup_matrices"):
        print(f"  simdgroup_matrix products: {'pass' if matrices['products_right'] else 'FAIL'}")
        print(f"    elements of the lanes: {matrices['elements_of_lanes']}")
    for device, calls in report.get("speeds", {}).items():
        print(f"  speed on {device:<55} {'ours':>9} {'MLX':>9}")
        for call in calls:
            print(f"    {call['call']:<60} {call['ours']:9.3f} {call['mlx']:9.3f} {call['unit']}")
    for warning in report.get("warnings", []):
        print(f"  warning: {warning}")
    if "error" in report:
        print(f"  error: {report['error']}")
    print("pass" if report["ok"] else "FAIL")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flash_attn.flash_attn_mlx.device", description=__doc__)
    parser.add_argument("--self-test", action="store_true", help="also measure, and write everything as JSON")
    parser.add_argument("--json", type=Path, default=Path("flash_attn_self_test.json"), help="where (default: %(default)s)")
    arguments = parser.parse_args()
    report = full_self_test() if arguments.self_test else check_mlx_requirements()
    _print_report(report)
    if arguments.self_test:
        arguments.json.write_text(json.dumps(report, indent=1, default=str) + "\n")
        print(f"attach {arguments.json} to a bug report")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
