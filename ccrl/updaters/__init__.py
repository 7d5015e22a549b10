"""Optimisers of surrogates: each updater owns one parameter set, its Adam moments and its learning rate.

``FlatUpdater``: small networks in one flat vector; forward, backward, clip and Adam of several minibatches are ONE
compiled graph, with an eager twin. ``ModuleUpdater``: any module, any torch optimiser (large models, pathwise losses).
"""

from ccrl.estimators.updates import GradientEstimate, Stats, Updater
from ccrl.updaters.common import AdaptiveRate, can_compile, linear_decay
from ccrl.updaters.flat import FlatUpdater
from ccrl.updaters.module import ModuleUpdater

__all__ = [
    "AdaptiveRate",
    "FlatUpdater",
    "GradientEstimate",
    "ModuleUpdater",
    "Stats",
    "Updater",
    "can_compile",
    "linear_decay",
]
