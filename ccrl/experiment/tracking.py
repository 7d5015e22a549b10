"""The scalars of a run to a tracking service too: Weights & Biases or Trackio, under the same tags as in TensorBoard.

Both keep a local store (``RUN/wandb`` with ``WANDB_MODE=offline``; the folder ``TRACKIO_DIR``), so a run needs no
network.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ccrl.experiment.config import flatten
from ccrl.experiment.run import RunFolder
from ccrl.packages import require

__all__ = ["Service", "Tracker"]

Service = Literal["none", "wandb", "trackio"]


class Tracker:
    """One run of a project.

    A resumed run goes on under its name. Its steps may go back, to the checkpoint: W&B would drop them, so the step is
    a metric of its own there, the x axis of all others.

    Raises:
        ImportError: the service's package is not installed; the message has the pip command.
    """

    def __init__(self, service: Literal["wandb", "trackio"], project: str, run: RunFolder, config: Mapping[str, Any]):
        self.service = service
        self._module = require(service, service)
        name, flat = run.path.name, flatten(dict(config))
        if service == "wandb":
            # the folder's name is unique, with its time: the same folder resumed is the same run
            self._run = self._module.init(
                project=project, name=name, id=name.replace("/", "-")[-128:], config=flat, dir=str(run.path),
                resume="allow",
            )  # fmt: skip
            self._run.define_metric("*", step_metric="step")
        else:
            self._run = self._module.init(project=project, name=name, config=flat, resume="allow")

    @classmethod
    def of(cls, service: Service, project: str, run: RunFolder, config: Mapping[str, Any]) -> Tracker | None:
        """The tracker of a setting, which may be none."""
        return None if service == "none" else cls(service, project, run, config)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """One row, at ``step`` of the agent's clock."""
        if self.service == "wandb":
            self._run.log({"step": step, **scalars})
        else:
            self._module.log(dict(scalars), step=step)

    def finish(self, saved: Path | None) -> None:
        """Attach the last checkpoint, where there is one, and close the run."""
        if saved is not None:
            artifact = self._module.Artifact("checkpoint", type="model")
            artifact.add_file(str(saved))
            self._run.log_artifact(artifact)
        self._module.finish()
