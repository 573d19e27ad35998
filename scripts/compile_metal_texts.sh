#!/usr/bin/env bash
# Compiles the texts that `make metal-texts` wrote by Apple's compiler: compile_metal_texts.sh FOLDER STANDARD...
# A standard that this Xcode does not know is an error: name those it has, as metal3.1.
set -euo pipefail

folder=${1:?folder of .metal files}
shift
[ $# -gt 0 ] || { echo "which standards? for example metal3.1 metal3.2" >&2; exit 1; }
jobs=$(sysctl -n hw.ncpu)
texts=$(find "$folder" -name '*.metal' | wc -l | tr -d ' ')
[ "$texts" -gt 0 ] || { echo "no .metal files in $folder" >&2; exit 1; }

for standard in "$@"; do
  # MLX compiles with IEEE semantics (its math mode "safe"); fast::exp2 and the like say themselves that they are fast.
  find "$folder" -name '*.metal' -print0 |
    xargs -0 -P "$jobs" -I{} xcrun -sdk macosx metal -std="$standard" -fno-fast-math -c {} -o /dev/null
  echo "$texts texts compile as $standard"
done
