#!/usr/bin/env bash
# Makes sure that the machine has what a target needs: setup_debian.sh build|test|neon|macos|lint
# Installs what is missing by apt when root, else prints the line to run and fails. CMake, Ninja and MLX come from PyPI.
set -euo pipefail

purpose=${1:?build, test, neon, macos or lint}
python=${PYTHON:-python3}
packages=()

needs() {  # needs PACKAGE COMMAND...: PACKAGE is missing when COMMAND fails
  local package=$1
  shift
  "$@" >/dev/null 2>&1 || packages+=("$package")
}
has_program() { command -v "$1"; }
has_header() { echo "#include <$1>" | c++ -E -x c++ -; }
has_python_headers() {
  "$python" -c 'import os, sysconfig; assert os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))'
}
has_fuzzer() { echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, long) { return 0; }' |
  clang++ -fsanitize=fuzzer,address,undefined -x c++ - -o /dev/null; }
has_libcxx() { echo '#include <version>' | clang++ -stdlib=libc++ -E -x c++ -; }

needs python3 has_program "$python"
needs python3-venv "$python" -c 'import ensurepip, venv'
needs python3-dev has_python_headers
needs g++ has_program c++
if [ "$purpose" = test ]; then
  needs libgtest-dev has_header gtest/gtest.h
  needs clang has_program clang++
  needs libclang-rt-dev has_fuzzer
  needs libboost-context-dev has_header boost/context/detail/fcontext.hpp
elif [ "$purpose" = neon ]; then
  needs g++-aarch64-linux-gnu has_program aarch64-linux-gnu-g++
  needs qemu-user has_program qemu-aarch64
  needs libgtest-dev test -f /usr/src/googletest/googletest/CMakeLists.txt
elif [ "$purpose" = macos ]; then
  needs clang has_program clang++
  needs libc++-dev has_libcxx
  needs g++-aarch64-linux-gnu has_program aarch64-linux-gnu-g++
elif [ "$purpose" = lint ]; then
  needs clang-tidy has_program clang-tidy
fi

if [ ${#packages[@]} -gt 0 ]; then
  install="apt-get install -y --no-install-recommends ${packages[*]}"
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "Missing: ${packages[*]}. On Debian run: sudo $install" >&2
    exit 1
  fi
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive $install
fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "$("$python" --version) is too old; Python 3.10 or newer is needed: make PYTHON=/path/to/python3" >&2
  exit 1
}
