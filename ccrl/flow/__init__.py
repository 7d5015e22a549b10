"""Flow and diffusion policies on generation tasks: what a task is, and rollouts whose rows are denoising steps."""

from ccrl.flow.collector import FlowCollector, Generated, Sampling
from ccrl.flow.task import Conditions, ExactTask, FlowTask, resolve_flow_task

__all__ = ["Conditions", "ExactTask", "FlowCollector", "FlowTask", "Generated", "Sampling", "resolve_flow_task"]
