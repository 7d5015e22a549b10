#!/usr/bin/env bash
# Seconds from a clone to the first learning curve, in a fresh environment:
#   scripts/setup/first_curve.sh FOLDER
set -euo pipefail
folder=$(realpath -m "${1:?usage: scripts/setup/first_curve.sh FOLDER}")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
mkdir -p "$folder"
unset PYTHONPATH
say() { echo "$1: $((SECONDS - last)) s"; last=$SECONDS; }
last=$SECONDS
git clone -q "$root" "$folder/ccrl" && cd "$folder/ccrl"
say clone
"${PYTHON:-python3}" -m venv .venv
.venv/bin/pip install -q --disable-pip-version-check -c constraints.txt -e .
say install
.venv/bin/ccrl train ppo --env CartPole-v1 --tuned --total-timesteps 50000 --eval-every 10000 --no-progress
say train
.venv/bin/ccrl plot runs --out curve
say plot
echo "first learning curve, $folder/ccrl/curve_curves.png: $SECONDS s"
