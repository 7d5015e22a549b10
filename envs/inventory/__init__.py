"""Inventory networks: differentiable simulators, exact costs to check against, the same tasks for any agent.

:func:`make_task` names an instance, :class:`InventoryEnv` is its simulator as pure functions, :class:`InventoryVector`
the same as a batched environment, :mod:`envs.inventory.oracle` computes what is optimal.
"""

from functools import partial

from envs.inventory.batched import InventoryVector
from envs.inventory.demand import Normal, Poisson, Recorded, load_series, synthetic_series
from envs.inventory.retail import retail_sales
from envs.inventory.sales import read_sales
from envs.inventory.simulator import InventoryEnv, Policy, Trace, simulate
from envs.inventory.tasks import TASKS, Task, make_task

__all__ = [
    "TASKS",
    "InventoryEnv",
    "InventoryVector",
    "Normal",
    "Poisson",
    "Policy",
    "Recorded",
    "Task",
    "Trace",
    "load_series",
    "make_task",
    "read_sales",
    "retail_sales",
    "simulate",
    "synthetic_series",
]

# What the registered ids build.
one_store_lost = partial(InventoryVector, "one_store_lost", id="ccrl/InventoryOneStoreLost-v0")
one_store_backlogged = partial(InventoryVector, "one_store_backlogged", id="ccrl/InventoryOneStoreBacklogged-v0")
serial_system = partial(InventoryVector, "serial_system", id="ccrl/InventorySerial-v0")
transshipment_backlogged = partial(InventoryVector, "transshipment_backlogged", id="ccrl/InventoryTransshipment-v0")
one_warehouse_lost_demand = partial(
    InventoryVector, "one_warehouse_lost_demand", id="ccrl/InventoryOneWarehouseLost-v0"
)
many_warehouses_lost_demand = partial(
    InventoryVector, "many_warehouses_lost_demand", id="ccrl/InventoryManyWarehousesLost-v0"
)
one_store_real_data = partial(InventoryVector, "one_store_real_data", id="ccrl/InventoryOneStoreRecorded-v0")
own_demand = partial(InventoryVector, "own_demand", id="ccrl/InventoryOwn-v0")
many_warehouses_real_data = partial(
    InventoryVector, "many_warehouses_real_data", id="ccrl/InventoryManyWarehousesRecorded-v0"
)
