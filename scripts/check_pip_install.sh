#!/usr/bin/env bash
# Installs the package with pip into a fresh environment and runs its self-test there: scripts/check_pip_install.sh [-e]
set -euo pipefail
cd "$(dirname "$0")/.."
project=$PWD
# The other builds' CMake: one that orders flags otherwise would compile again what a compiler cache knows.
[ -x .venv/bin/cmake ] && export PATH="$PWD/.venv/bin:$PATH"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/venv"
"$work/venv/bin/pip" --disable-pip-version-check -q install "$@" "$project"
cd "$work" # away from the sources
venv/bin/python -m flash_attn.flash_attn_mlx.device
