"""What ``bench robots`` counts and prints; its runs need a simulator."""

from __future__ import annotations

import torch

from ccrl.testing.lab import FakeLab, LabCfg
from scripts.bench import robots


def test_a_tally_sums_rewards_until_episodes_end():
    env = FakeLab(LabCfg(num_envs=3, limit=5))
    env.reset(seed=0)
    tally = robots.Tally(env)
    rewards = [env.step(torch.zeros(3, 1))[1].clone() for _ in range(12)]
    expected = torch.cat([torch.stack(rewards[:5]).sum(0), torch.stack(rewards[5:10]).sum(0)])
    torch.testing.assert_close(torch.tensor(list(tally.returns)), expected)
    assert tally.seconds > 0.0


def test_runs_that_are_there_are_summed_up(tmp_path, capsys):
    rows = [f"isaac:X,{who},{seed},40,{10 * seed + bonus},9,{seed},0.5"
            for who, bonus in (("ccrl", 1), ("rsl_rl", 0)) for seed in range(5)]  # fmt: skip
    (tmp_path / "robots.csv").write_text("\n".join([",".join(robots.COLUMNS), *rows]) + "\n")
    robots.main(robots.Config(env="isaac:X", out=tmp_path))
    # of 0, 10, 20, 30, 40 one is cut from each end; the median of the CPU seconds 0, 1, 2, 3, 4 is 2
    out = capsys.readouterr().out
    assert (
        "ccrl: return 21.00 (IQM of 5; 1.00 to 41.00), 9.0 s, of the CPU 2.0 s, of which 0.5 s in the simulator" in out
    )
    assert "rsl_rl: return 20.00" in out
