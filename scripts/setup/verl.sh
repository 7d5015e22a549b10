#!/usr/bin/env bash
# verl 0.9.1 on torch 2.13.0, without vLLM, in an environment of its own (Python 3.11, about 2 GB beside torch), and the
# suite's losses and advantages through verl's own core_algos on a batch that the suite sampled:
#   scripts/setup/verl.sh FOLDER
# TORCH=torch==2.13.0+cpu takes the wheels without CUDA, where pip is told of their index.
set -euo pipefail
folder=$(realpath -m "${1:?usage: scripts/setup/verl.sh FOLDER}")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
torch=${TORCH:-torch==2.13.0}

"${PYTHON:-python3.11}" -m venv "$folder/venv"
# the three after it: what verl 0.9.1 imports without asking for it
"$folder/venv/bin/pip" install "$torch" "verl==0.9.1" cachetools fastapi uvicorn -e "$root[verl]"

cd "$root"
"$folder/venv/bin/python" scripts/verl_check.py
printf 'ready:\n  %s/venv/bin/python -m verl.trainer.main_ppo ... (docs/llm/bridges.md has the whole command)\n' "$folder"
