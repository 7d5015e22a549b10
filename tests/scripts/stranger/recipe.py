"""A method of a stranger: group advantages, weighted anew in every rollout by what its groups show."""

from dataclasses import dataclass

import torch

from ccrl.estimators.groups import Groups
from ccrl.estimators.recipe import Method, MethodConfig, Recipe
from ccrl.estimators.stages import GroupBaseline
from ccrl.settings import Unit


@dataclass(frozen=True)
class AdaptiveConfig(MethodConfig):
    """GRPO's settings and one of its own."""

    weight: Unit = 0.5
    """Groups whose better half is the shorter one count with this weight."""


class AdaptiveRecipe(Recipe):
    """``A = w (R - mean) / std``; ``w = 1`` where better completions are longer than the group's mean, else weight."""

    def stages(self):
        return (GroupBaseline(scale="std", single="zero"), self.adapt)

    def adapt(self, data):
        groups = Groups(data["group"])
        better = (data["advantage"].amax(0) > 0).double()
        length = data["valid"].sum(0).double()
        longer = groups.mean(better * (length - groups.mean(length)[groups.index])) >= 0
        w = torch.where(longer[groups.index], 1.0, self.config.weight)
        return data.derive(advantage=data["advantage"] * w.to(data["advantage"].dtype))


METHOD = Method(
    "adaptive", "a stranger's paper", AdaptiveConfig, AdaptiveRecipe, {"advantage": "weighted by lengths"},
    {"n_prompts": 4, "group_size": 4},
)  # fmt: skip
