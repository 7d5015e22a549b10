"""Classic control as batched environments on any device: Gymnasium's tasks (to the bit in float64 on the CPU), and
small tasks of gradient estimation, some with exact returns and gradients.
"""

from envs.classic.acrobot import Acrobot
from envs.classic.base import ClassicEnv
from envs.classic.cartpole import CartPole
from envs.classic.exact import Exact, flat_parameters
from envs.classic.linear_quadratic import LQR, Bandit
from envs.classic.mountain_car import MountainCar, MountainCarContinuous, MountainCarTwoActions
from envs.classic.pendulum import Pendulum
from envs.classic.ship import ShipSteering
from envs.classic.tabular import RandomMDP, RandomWalk, TabularMDP

__all__ = [
    "LQR",
    "Acrobot",
    "Bandit",
    "CartPole",
    "ClassicEnv",
    "Exact",
    "MountainCar",
    "MountainCarContinuous",
    "MountainCarTwoActions",
    "Pendulum",
    "RandomMDP",
    "RandomWalk",
    "ShipSteering",
    "TabularMDP",
    "flat_parameters",
]
