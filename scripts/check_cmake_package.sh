#!/usr/bin/env bash
# Installs the release build's CMake package into a temporary folder and builds and runs a consumer of it.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cmake --preset release --log-level=WARNING
cmake --build --preset release --target flash_attn
cmake --install build/release --prefix "$work/prefix" --component cpp >/dev/null
cmake -S examples/cmake_consumer -B "$work/build" -G Ninja --log-level=WARNING \
  -DCMAKE_PREFIX_PATH="$work/prefix" -DCMAKE_BUILD_TYPE=Release
cmake --build "$work/build"
"$work/build/consumer"
