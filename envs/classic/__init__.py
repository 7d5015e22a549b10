"""Classic control as batched torch environments on any device, with Gymnasium's dynamics to the bit (float64, CPU)."""

from envs.classic.acrobot import Acrobot
from envs.classic.base import ClassicEnv
from envs.classic.cartpole import CartPole
from envs.classic.mountain_car import MountainCar, MountainCarContinuous
from envs.classic.pendulum import Pendulum

__all__ = ["Acrobot", "CartPole", "ClassicEnv", "MountainCar", "MountainCarContinuous", "Pendulum"]
