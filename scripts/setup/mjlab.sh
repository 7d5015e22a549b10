#!/usr/bin/env bash
# mjlab 1.6 in an environment of its own (Python 3.11 or newer):
#   scripts/setup/mjlab.sh FOLDER
set -euo pipefail
folder=$(realpath -m "${1:?usage: scripts/setup/mjlab.sh FOLDER}")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -e "$root[mjlab,export]" pytest

"$folder/venv/bin/python" "$root/scripts/setup/check.py" mjlab:Mjlab-Cartpole-Balance
"$folder/venv/bin/python" "$root/scripts/setup/check.py" mjlab:Mjlab-Velocity-Flat-Unitree-G1
printf 'ready:\n  %s/venv/bin/python scripts/train.py ppo --env mjlab:Mjlab-Cartpole-Balance --num-envs 64\n' "$folder"
