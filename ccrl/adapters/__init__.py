"""Bridges between :class:`ccrl.batched_env.BatchedEnv` and the environments of other libraries.

=============================  ==============================================  =========================
from                           to                                              with
=============================  ==============================================  =========================
gymnasium vector env           BatchedEnv                                      :class:`GymnasiumEnv`
gymnasium single env           BatchedEnv                                      :func:`from_gymnasium`
SB3 VecEnv                     BatchedEnv                                      :class:`SB3Env`
Isaac Lab, mjlab               BatchedEnv                                      :class:`LabEnv`
BatchedEnv                     gymnasium vector env (numpy)                    :func:`as_vector_env`
BatchedEnv of one copy         gymnasium single env (numpy)                    :class:`SingleEnv`
BatchedEnv                     SB3 VecEnv                                      :func:`as_vec_env`
=============================  ==============================================  =========================
"""

from ccrl.adapters.gymnasium_export import SingleEnv, TorchVectorEnv, as_vector_env
from ccrl.adapters.gymnasium_import import GymnasiumEnv, from_gymnasium
from ccrl.adapters.lab import LabEnv
from ccrl.adapters.sb3_import import SB3Env, as_vec_env

__all__ = [
    "GymnasiumEnv",
    "LabEnv",
    "SB3Env",
    "SingleEnv",
    "TorchVectorEnv",
    "as_vec_env",
    "as_vector_env",
    "from_gymnasium",
]
