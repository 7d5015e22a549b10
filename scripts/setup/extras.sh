#!/usr/bin/env bash
# Whether extras of pyproject.toml install and work: an environment for each, checked, with the seconds it took:
#   scripts/setup/extras.sh FOLDER [EXTRA ...]       no names: the light ones
# Simulators have scripts of their own beside this one (isaac.sh, mjlab.sh, verl.sh, warp.sh). An environment has its own
# torch: some hundred MB each (KEEP=1 keeps them).
set -euo pipefail
folder=$(realpath -m "${1:?usage: scripts/setup/extras.sh FOLDER [EXTRA ...]}")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
shift
(($#)) || set -- tune gp export mujoco sb3 offline notebooks wandb trackio llm reasoning
cd "$root"
export PIP_DISABLE_PIP_VERSION_CHECK=1
failed=()
for extra in "$@"; do
  start=$SECONDS
  pins=constraints.txt
  [ "$extra" != trackio ] || { pins=$(mktemp) && grep -v "^pillow==" constraints.txt > "$pins"; }  # which wants an older one
  if "${PYTHON:-python3}" -m venv "$folder/$extra" &&
    "$folder/$extra/bin/pip" install -q -c "$pins" -e ".[$extra]" &&
    "$folder/$extra/bin/python" scripts/setup/extra_check.py "$extra"; then
    echo "extra $extra: $((SECONDS - start)) s"
  else
    failed+=("$extra")
  fi
  [ -n "${KEEP:-}" ] || rm -rf "${folder:?}/$extra"
done
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}" >&2; exit 1; }
