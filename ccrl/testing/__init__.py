"""For tests: a scripted environment, tiny tasks, and the contracts that environments and agents keep.

A new environment is tested by a subclass::

    class TestMyEnv(EnvContract):
        env = MyEnv
        options = {"size": 3}

and a new agent by :class:`AgentContract`, which sets a class, a small config and an id.
"""

from ccrl.testing.agent_contract import AgentContract, SpacesEnv, prepare_rollout
from ccrl.testing.clock import ClockEnv, Episode
from ccrl.testing.contract import EnvContract
from ccrl.testing.env_checks import sample_actions
from ccrl.testing.tasks import FactorTask, PixelTask, RecallTask

__all__ = [
    "AgentContract", "ClockEnv", "EnvContract", "Episode", "FactorTask", "PixelTask", "RecallTask", "SpacesEnv",
    "prepare_rollout", "sample_actions",
]  # fmt: skip
