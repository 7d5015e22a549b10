#!/usr/bin/env bash
# mujoco-warp 4.0 beside MuJoCo, the engine of envs.make(id, engine="warp"), in an environment of its own:
#   scripts/setup/warp.sh FOLDER
# The first start of a task compiles its kernels, some minutes of CPU.
set -euo pipefail
folder=$(realpath -m "${1:?usage: scripts/setup/warp.sh FOLDER}")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -e "$root[warp,export]" pytest

"$folder/venv/bin/python" "$root/scripts/setup/check.py" HalfCheetah-v5 --engine warp
(cd "$root" && "$folder/venv/bin/python" -m pytest tests/envs/mujoco/test_warp.py -k "TestHalfCheetah or one_step_is_mujocos and HalfCheetah")
printf 'ready:\n  %s/venv/bin/python scripts/train.py ppo --env HalfCheetah-v5 --env-kwargs %s --device cuda\n' "$folder" "'{\"engine\": \"warp\"}'"
