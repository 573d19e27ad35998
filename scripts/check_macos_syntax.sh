#!/usr/bin/env bash
# What Linux can say of the build on a Mac: do all sources compile for arm64, by clang, with libc++, as if this were no Linux?
set -euo pipefail
cd "$(dirname "$0")/.."

site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')
python=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')
libcxx=$(clang++ -print-resource-dir)/../../../include/c++/v1

flags=(
  --target=aarch64-linux-gnu -U__linux__ -D_LIBCPP_HAS_THREAD_API_PTHREAD -std=c++20 -fsyntax-only -Wall -Wextra -Werror
  -nostdinc++ -isystem "$libcxx" -isystem /usr/aarch64-linux-gnu/include
  -isystem "$site/mlx/include" -isystem "$site/nanobind/include" -isystem "$python" -Isrc -Iinclude
)
git ls-files 'src/*.cpp' 'python/*.cpp' | grep -vE '^src/cpu/levels/avx' |
  xargs -P "$(nproc)" -n 1 clang++ "${flags[@]}"
