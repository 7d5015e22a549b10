"""A rollout as the chain of points that GPTD reads: episode after episode, cut ones closed by a bootstrap pair."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Generator, Tensor

from ccrl.batched_env import Tree
from ccrl.collect import Actor
from ccrl.data import Data, tree_map

__all__ = ["chain_rows"]


@torch.no_grad()
def chain_rows(
    data: Data, policy: Actor, generator: Generator, time_limit: Literal["bootstrap", "terminal"] = "bootstrap"
) -> Data:
    """The valid rows of ``data [T, N]`` as one row ``[1, K]``, environment by environment, in the order of time.

    Where an episode is cut, by a time limit or by the end of the rollout, the true successor with an action drawn from
    ``policy`` follows as a point without reward. Columns: ``obs, action, reward, t, valid`` (ones), ``rewarded``
    (False on such points) and ``follows`` (the next point is this one's successor), both bool.

    :param time_limit: ``terminal`` treats time limits as terminations; the rollout's end is a cut all the same.
    """
    valid = data["valid"] > 0
    env, row = valid.T.nonzero(as_tuple=True)
    after = torch.cat([valid[1:], torch.zeros_like(valid[:1])])
    last = (data["carry"] == 0) | ~after
    ended = data["alive"] == 0
    if time_limit == "terminal":
        ended = ended | data["truncated"]
    cut = (last & ~ended)[row, env]
    place = torch.arange(row.shape[0], device=valid.device) + cut.cumsum(0) - cut.long()
    tail = place[cut] + 1
    total = row.shape[0] + tail.shape[0]

    def here(x: Tensor) -> Tensor:
        return x[row, env]

    def merge(rows: Tensor, tails: Tensor) -> Tensor:
        out = rows.new_zeros(total, *rows.shape[1:])
        out[place], out[tail] = rows, tails
        return out.unsqueeze(0)

    obs = tree_map(here, data["obs"])
    final: Tree = tree_map(lambda x: here(x)[cut], data.next_obs())
    action, t = here(data["action"]), here(data["t"])
    drawn = action[:0]
    if tail.shape[0]:
        drawn = policy.act(final, policy.draw_noise(tail.shape[0], generator, valid.device))["action"]
    rewarded, nothing = torch.ones_like(cut), torch.zeros_like(tail, dtype=torch.bool)
    columns: dict[str, Tree] = {
        "obs": {k: merge(obs[k], final[k]) for k in obs}
        if isinstance(obs, dict) and isinstance(final, dict)
        else merge(obs, final),  # type: ignore[arg-type]
        "action": merge(action, drawn),
        "reward": merge(here(data["reward"]), data["reward"].new_zeros(tail.shape[0])),
        "t": merge(t, t[cut] + 1),
        "valid": torch.ones(1, total, device=valid.device),
        "rewarded": merge(rewarded, nothing),
        "follows": merge(~last[row, env] | cut, nothing),
    }
    return Data(columns)
