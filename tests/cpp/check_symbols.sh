#!/bin/sh
# check_symbols.sh NM LIBRARY LEVELS_FOLDER: no object of an ISA level may define a weak symbol. The linker keeps one copy of
# those for the whole program, and a copy with AVX-512 instructions would then run on every machine.
set -eu
nm=$1 library=$2 levels=$3

checked=0
failed=0
for source in "$levels"/*.cpp; do
  object=$(basename "$source").o
  symbols=$("$nm" -A -C --defined-only "$library" | grep "[:/]$object:") || continue # a level of another architecture
  checked=$((checked + 1))
  # W, V: weak; u: unique. DW.ref.* is a pointer, not code.
  if printf '%s\n' "$symbols" | grep -E ' [WVu] ' | grep -v 'DW\.ref\.'; then failed=1; fi
done
if [ "$checked" -eq 0 ]; then echo "no level's object found in $library"; exit 1; fi
if [ "$failed" -ne 0 ]; then echo "the weak symbols above leak from a level"; exit 1; fi
echo "$checked levels define no weak symbol"
