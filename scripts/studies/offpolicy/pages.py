"""What the pages say: agents for continuous actions on MuJoCo and on Pendulum, for discrete ones on CartPole, and SAC
with other settings."""

from __future__ import annotations

from scripts.studies.offpolicy.report import Page, Panel

__all__ = ["CONTINUOUS", "DISCRETE", "PAGES", "PENDULUM", "PUBLISHED"]

CONTINUOUS_HEAD = """# Off-policy agents: learning curves

SAC, TD3, CrossQ and off-policy MDPO over 100,000 environment steps, the mean of ten deterministic episodes every
5,000; settings in [study.yaml](../scripts/studies/offpolicy/study.yaml), which are the agents' defaults but for
warm-up and widths named there. Pages of the methods: [sac](sac.md), [td3](td3.md), [crossq](crossq.md),
[mdpo_off_policy](mdpo_off_policy.md); discrete actions: [Q-learning](q_learning_curves.md).

    python scripts/benchmark.py --study scripts/studies/offpolicy/study.yaml --out results/offpolicy
    python scripts/studies/offpolicy results/offpolicy

The first command trains, goes on where it was stopped, and takes some hours on one core; the second writes [every
evaluation](figures/offpolicy_runs.csv) (with commit, versions, threads, compile mode, processor time), the figure and
this page, from whatever runs there are.

**Published curves.** Ten seeds each of SAC and CrossQ from the raw results that the authors of SimbaV2 publish
(repository `dojeon-ai/SimbaV2`, commit 14fafb2, `results/baseline`), the [part up to 200,000
steps](figures/offpolicy_published.csv), of CrossQ every fifth evaluation. They are of the **v4** tasks, ours of **v5**:
HalfCheetah is the same task in both; Hopper and Walker2d differ (healthy reward, contact and friction), so a
difference there may be the task's. The point of SAC's nearest to 100,000 steps is at 99,996.

**The settings behind them.** SAC's file holds 301 evaluations a run, every 16,666 steps up to 4,999,800. That is
5,000,000 // 300, the grid of CrossQ's `train.py` (repository `adityab/CrossQ`, commit a318a26) for runs of 5,000,000
steps; other rows of the same file, SimbaV2's own, lie on round numbers up to 1,000,000. So they are very probably the
SAC baseline of CrossQ's paper, whose command (`slurm/submit_everything.sh` there) differs from ours in three settings:

| setting | CrossQ's SAC baseline | here |
|---|---|---|
| Adam's step size of actor, critics and temperature | 1e-3 | 3e-4 |
| uniform steps before the first update | 5,000 | 10,000 |
| episodes per evaluation | 1 | 10 |

Networks, batch, discount, average, Adam's moments, updates per step and target entropy are the same. It moves the
average before the actor, and its temperature has the gradient times alpha; neither changes a step's size with Adam.
Theirs are ahead from the first evaluations on (HalfCheetah at 50,000 steps: 4,212), which a step size three times ours
and 5,000 more updates may explain; [runs of ours with both](sac_published_curves.md) are compared with them.
CrossQ's curves are SimbaV2's own runs (evaluations every 2,000 steps up to 1,000,000, seeds 0, 1,000, ...); their
settings are not in that repository.

**Rule**, written when seed 0 of SAC and TD3 on HalfCheetah had finished and no other run. At 100,000 steps, with
Student's 95 % interval of our mean and the range of the published seeds: *below* or *above* if interval and range do
not meet; *agrees* if our mean lies in the range and the published mean in our interval; *open* otherwise, and while
runs are missing. With three runs the interval is 2.5 standard deviations to each side, so *agrees* excludes little: the
half width is beside it. The difference to the published seeds (Welch's interval) was added after five runs of SAC, and
no verdict hangs on it. Seeds are 0, 1, 2 (SAC on HalfCheetah to 4), nothing was tuned, and no difference between
methods is claimed from so few runs ([protocol](protocol.md)): those below are reported with Welch's interval and Holm's
p value. Ours and SB3's begin with 10,000 uniform steps without updates.
"""

CONTINUOUS = Page(
    name="offpolicy", file="off_policy_curves.md", spec="study.yaml", head=CONTINUOUS_HEAD, at=100_000,
    panels=(
        Panel("HalfCheetah-v5", ("sac", "sb3:sac"), ("sac", "HalfCheetah-v4")),
        Panel("HalfCheetah-v5", ("crossq", "td3"), ("crossq", "HalfCheetah-v4")),
        Panel("Hopper-v5", ("sac", *(f"mdpo_off_policy tsallis={q}" for q in (1.0, 1.4))), ("sac", "Hopper-v4")),
        Panel("Walker2d-v5", ("sac",), ("sac", "Walker2d-v4")),
    ),
    pairs=(
        ("HalfCheetah-v5", "sac", "sb3:sac"), ("HalfCheetah-v5", "td3", "sac"), ("HalfCheetah-v5", "crossq", "sac"),
        ("Hopper-v5", "mdpo_off_policy tsallis=1.0", "sac"), ("Hopper-v5", "mdpo_off_policy tsallis=1.4", "sac"),
        ("Hopper-v5", "mdpo_off_policy tsallis=1.4", "mdpo_off_policy tsallis=1.0"),
    ),
    compared={
        ("HalfCheetah-v5", "sac"): ("sac", "HalfCheetah-v4"), ("HalfCheetah-v5", "sb3:sac"): ("sac", "HalfCheetah-v4"),
        ("HalfCheetah-v5", "crossq"): ("crossq", "HalfCheetah-v4"), ("Hopper-v5", "sac"): ("sac", "Hopper-v4"),
        ("Walker2d-v5", "sac"): ("sac", "Walker2d-v4"),
    },
    names={"crossq": "CrossQ, critics 512 wide (published: 2,048)", "sb3:sac": "SAC of SB3"},
)  # fmt: skip

DISCRETE_HEAD = """# Q-learning agents: learning curves

[DQN](dqn.md), double DQN and [QR-DQN](qr_dqn.md) on CartPole-v1 (returns up to 500) over 50,000 environment steps, the
mean of ten deterministic episodes every 2,500, beside SB3's DQN with the same settings. They are those that RL
Baselines3 Zoo publishes (repository `DLR-RM/rl-baselines3-zoo`, commit 22e3ff2), carried over one by one in
[discrete.yaml](../scripts/studies/offpolicy/discrete.yaml), which says where a name means something else here. Nothing
was tuned. Agents for continuous actions: [off-policy curves](off_policy_curves.md).

    python scripts/benchmark.py --study scripts/studies/offpolicy/discrete.yaml --out results/discrete
    python scripts/studies/offpolicy results/discrete --which discrete

The first command trains and goes on where it was stopped; the second writes [every
evaluation](figures/discrete_runs.csv) (with commit, versions, threads, compile mode, processor time), the figure and
this page.

**Rule**, written before any run. A policy of DQN jumps between evaluations, so runs are compared by the mean of their
evaluations in the second half of the training, not by the last one. Differences have Welch's 95 % interval and Holm's
p value; seeds are those of the [protocol](protocol.md), but five of them, so a difference that an interval excludes is
reported and none is claimed.
"""

DISCRETE = Page(
    name="discrete", file="q_learning_curves.md", spec="discrete.yaml", head=DISCRETE_HEAD, at=50_000, since=25_000,
    panels=(Panel("CartPole-v1", ("dqn", "dqn double=True", "qr_dqn", "sb3:dqn")),),
    pairs=(
        ("CartPole-v1", "dqn", "sb3:dqn"), ("CartPole-v1", "dqn double=True", "dqn"), ("CartPole-v1", "qr_dqn", "dqn"),
    ),
    names={"sb3:dqn": "DQN of SB3", "dqn double=True": "double DQN"},
)  # fmt: skip

PENDULUM_HEAD = """# Off-policy agents on Pendulum-v1: a small check

SAC and TD3 beside SB3's with the same settings, and CrossQ with critics 256 wide, over 8,000 steps of Pendulum-v1
(CrossQ: 6,000): networks of 64-64, step sizes of 1e-3 everywhere, 1,000 uniform steps, one update a step
([pendulum.yaml](../scripts/studies/offpolicy/pendulum.yaml)). An evaluation is ten deterministic episodes from the same
ten starts for every agent and seed, so the best mean is the same for all: about -146. What is asked is a policy that
swings up from all ten: a mean of at least -160. SB3's TD3 was added when the other 33 runs had been made.

    python scripts/benchmark.py --study scripts/studies/offpolicy/pendulum.yaml --out results/pendulum
    python scripts/studies/offpolicy results/pendulum --which pendulum

Every evaluation is in [pendulum_runs.csv](figures/pendulum_runs.csv), with commit, versions, threads, compile mode and
processor time. Seeds are those of the [protocol](protocol.md).
"""

PENDULUM = Page(
    name="pendulum", file="pendulum_curves.md", spec="pendulum.yaml", head=PENDULUM_HEAD, at=8_000, least=-160.0,
    panels=(Panel("Pendulum-v1", ("sac", "sb3:sac", "td3", "sb3:td3", "crossq")),),
    pairs=(("Pendulum-v1", "sac", "sb3:sac"), ("Pendulum-v1", "td3", "sb3:td3")),
    names={"sb3:sac": "SAC of SB3", "sb3:td3": "TD3 of SB3", "crossq": "CrossQ (6,000 steps)"},
)  # fmt: skip

PUBLISHED_HEAD = """# SAC with the settings of the published curves

SAC's mean at 100,000 steps of HalfCheetah is below that of the [published seeds](off_policy_curves.md), whose settings
very probably differ from ours: step sizes of 1e-3 for 3e-4, and 5,000 uniform steps before the first update for 10,000.
Here SAC has both, and is otherwise the same
([published.yaml](../scripts/studies/offpolicy/published.yaml)).

    python scripts/benchmark.py --study scripts/studies/offpolicy/published.yaml --out results/sac_published
    python scripts/studies/offpolicy results/sac_published --which published

Every evaluation is in [sac_published_runs.csv](figures/sac_published_runs.csv), with commit, versions, threads, compile
mode and processor time. **Rule**, that of the off-policy curves, kept before any of these runs: *below* or *above* if
the published range and Student's 95 % interval of our mean do not meet; *agrees* if our mean lies in the range and the
published mean in our interval; *open* otherwise. Seeds are those of SAC there, nothing was tuned.
"""

PUBLISHED = Page(
    name="sac_published", file="sac_published_curves.md", spec="published.yaml", head=PUBLISHED_HEAD, at=100_000,
    panels=(Panel("HalfCheetah-v5", ("sac",), ("sac", "HalfCheetah-v4")),), pairs=(),
    compared={("HalfCheetah-v5", "sac"): ("sac", "HalfCheetah-v4")},
)  # fmt: skip

PAGES = {"continuous": CONTINUOUS, "discrete": DISCRETE, "pendulum": PENDULUM, "published": PUBLISHED}
