#!/usr/bin/env bash
# clang-tidy on our sources, with the flags of the build folder given. Of the ISA levels, which include the same kernels, only one.
set -euo pipefail

build=${1:?build folder with compile_commands.json}
jobs=${2:-2}
level=$([ "$(uname -m)" = x86_64 ] && echo avx2 || echo neon)

{
  git ls-files 'src/*.cpp' 'python/*.cpp' | grep -v '^src/cpu/levels/'
  echo "src/cpu/levels/$level.cpp"
} | xargs -P "$jobs" -n 1 clang-tidy --quiet -p "$build" --extra-arg=-Wno-unknown-warning-option
