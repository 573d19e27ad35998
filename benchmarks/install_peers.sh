#!/usr/bin/env bash
# Installs what the benchmark compares with beyond MLX itself, into the environment of $PYTHON: PyTorch, ONNX Runtime, OpenVINO.
#
# PyPI's Linux x86-64 build needs its CUDA libraries even to run on a CPU: some GiB of download. Where PyTorch's own index of CPU
# builds can be reached, PIP_INDEX_URL pointed at it makes that 200 MiB.
set -euo pipefail
python="${PYTHON:?set PYTHON to the interpreter of the environment, for example .venv/bin/python}"
"$python" -m pip install torch onnx onnxruntime openvino
"$python" -c 'import torch; print("PyTorch", torch.__version__, "with", torch.backends.cpu.get_cpu_capability())'
