#!/usr/bin/env bash
# mujoco-warp 4.0 beside MuJoCo, and one step of a model on both engines:
#   scripts/setup/warp.sh FOLDER
set -euo pipefail
folder=$(realpath -m "${1:?usage: scripts/setup/warp.sh FOLDER}")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -e "$root[warp]"

cd "$root"
"$folder/venv/bin/python" - <<'PYTHON'
import mujoco
import mujoco_warp
import numpy as np

from envs.mujoco.model import load_model

model = load_model("half_cheetah.xml")
data = mujoco.MjData(model)
data.qpos[:] += np.random.default_rng(0).uniform(-0.1, 0.1, model.nq)
mujoco.mj_forward(model, data)
engine, batch = mujoco_warp.put_model(model), mujoco_warp.put_data(model, data, nworld=4)
mujoco.mj_step(model, data)
mujoco_warp.step(engine, batch)
gap = np.abs(batch.qvel.numpy() - data.qvel).max()
print(f"one step of HalfCheetah: velocities within {gap:.1e} of MuJoCo's")
assert gap < 1e-4
PYTHON
