#!/usr/bin/env bash
# Isaac Lab 3.0 on the Newton engine, without Kit, in an environment of its own (Python 3.12, 8 GB):
#   scripts/setup/isaac.sh FOLDER
# The first start compiles the engine's kernels, about 80 seconds of CPU.
set -euo pipefail
folder=$(realpath -m "${1:?usage: scripts/setup/isaac.sh FOLDER}")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

for python in "${PYTHON:-python3.12}" "$HOME"/.pyenv/versions/3.12*/bin/python none; do
  if "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then break; fi
done
[ "$python" != none ] || { echo 'expected Python 3.12 as python3.12 or in PYTHON, found none (uv python install 3.12)' >&2; exit 1; }
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -e "$root[isaac,export]" pytest 'moviepy<2'  # moviepy: for its recorder of videos

# Assets: Cartpole's are in this repository, Ant's model is in the newton package; others come from NVIDIA's server.
mkdir -p "$folder/assets/Isaac/Robots/IsaacSim/Ant"
cp -r "$root/scripts/setup/assets/." "$folder/assets"
newton=$("$folder/venv/bin/python" -c 'import importlib.util as u; print(u.find_spec("newton").submodule_search_locations[0])')
ln -sf "$newton/examples/assets/ant.usda" "$folder/assets/Isaac/Robots/IsaacSim/Ant/ant_instanceable.usd"

export ISAACSIM_ASSET_ROOT="$folder/assets"
"$folder/venv/bin/python" "$root/scripts/setup/check.py" isaac:Isaac-Cartpole-Direct
"$folder/venv/bin/python" "$root/scripts/setup/check.py" isaac:Isaac-Ant-Direct
printf 'ready:\n  export ISAACSIM_ASSET_ROOT=%s/assets\n  %s/venv/bin/python scripts/train.py ppo --env isaac:Isaac-Cartpole-Direct --num-envs 64\n' "$folder" "$folder"
