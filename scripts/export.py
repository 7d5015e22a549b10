"""Export the policy of a run: one file that runs without this project, normaliser and action map inside.

    python scripts/export.py runs/Hopper-v5__ppo__0__...                         # policy.onnx in the run folder
    python scripts/export.py RUN --format torchscript --checkpoint best --out hopper.ts
    python scripts/export.py RUN --out DIR                # a language model: AutoModelForCausalLM.from_pretrained(DIR)

ONNX needs the extra ``export``. The file is compared with the policy before the command ends. docs/export.md says what
is in it and how to run it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import agents
import ccrl
import envs  # noqa: F401  (registers the environments that runs name)
from ccrl import registry
from ccrl.experiment import checkpoint
from ccrl.experiment.run import RunFolder
from ccrl.llm.export import export_model
from ccrl.llm.vocabulary import HFVocabulary
from ccrl.policies.export import Deployed, Format, export, largest_difference
from ccrl.settings import Settings

__all__ = ["ExportConfig", "main"]

TOLERANCE = 1e-5
SUFFIX = {"onnx": ".onnx", "torchscript": ".ts"}


@dataclass(frozen=True)
class ExportConfig(Settings):
    """What to export and where to."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder is read from here."""
    format: Format | Literal["auto", "huggingface"] = "auto"
    """The policy is written as ONNX, for onnxruntime and its relatives, or TorchScript, for libtorch; a language model
    as a folder of Hugging Face's (huggingface), with adapters merged and with its tokenizer. Auto takes ONNX, and
    huggingface for language models."""
    checkpoint: str = "latest"
    """The policy is that of the newest checkpoint (latest), of the highest evaluation (best), or of a file."""
    out: Path | None = None
    """The file (of a language model the folder) is written here; unset, it is policy.onnx, policy.ts or model in the
    run folder."""
    trust: tuple[str, ...] = ()
    """Names of the form module:name that the run folder may import: repeat those you know, no others."""


def main(config: ExportConfig) -> Path:
    """Export, compare, and print what was written.

    :raises ValueError: a policy that has no exported form, or ``out`` is a folder.
    :raises RuntimeError: the file computes something else than the policy. A file that was there before stays.
    """
    torch.set_num_threads(1)
    run = RunFolder.open(config.run)
    path = run.checkpoint(config.checkpoint)
    if path is None:
        raise FileNotFoundError(f"{run.path}: expected a checkpoint {config.checkpoint!r}, found none")
    with registry.stored(str(run.path), config.trust):
        cls = agents.get_agent(run.info["agent"])
        text = getattr(cls, "text", False)
        if text != (config.format == "huggingface") and config.format != "auto":
            raise ValueError(f"format: expected auto or {'huggingface' if text else 'onnx or torchscript'} for "
                             f"{cls.name}, got {config.format}")  # fmt: skip
        if text:
            return _export_model(cls.load(path, trust=config.trust), config.out or run.path / "model")
        if not getattr(cls, "steps_env", True):
            raise ValueError(f"export: expected a policy that reads observations, got the one of {run.path}, which "
                             "generates samples")  # fmt: skip
        agent = cls.load(path, trust=config.trust)
    try:
        deployed = Deployed(agent.policy, agent.env.single_observation_space)
    finally:
        agent.close()
    form: Any = "onnx" if config.format == "auto" else config.format
    out = config.out or run.path / f"policy{SUFFIX[form]}"
    if out.is_dir():
        raise ValueError(f"out: expected the name of a file, got the folder {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"ccrl": ccrl.__version__, "agent": agent.name, "env": agent.env_id, "step": agent.num_timesteps}
    # beside it, so that a file of before stays where the new one is refused; ONNX reads the suffix
    made = out.with_name(f".{out.stem}.{os.getpid()}{out.suffix}")
    try:
        export(deployed, made, form, facts)
        gap = largest_difference(deployed, made, form)
        if not gap <= TOLERANCE:
            raise RuntimeError(f"export: expected actions within {TOLERANCE:g} of the policy's, got {gap:g}; not "
                               "written")  # fmt: skip
        os.replace(made, out)
    finally:
        made.unlink(missing_ok=True)
    print(f"{out}: {', '.join(deployed.inputs)} -> {', '.join(deployed.outputs)}; within {gap:.1e} of the policy")
    return out


def _export_model(agent: Any, out: Path) -> Path:
    gap = export_model(agent.policy, agent.task.vocab, out)
    tokenizer = (
        "with its tokenizer" if isinstance(agent.task.vocab, HFVocabulary) else "without a tokenizer: it has none"
    )
    print(f"{out}: for AutoModelForCausalLM.from_pretrained, {tokenizer}; within {gap:.1e} of the policy")
    return out


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # for --trust; last, so that it shadows nothing
    options = tyro.cli(ExportConfig, description=__doc__)
    try:
        main(options)
    except (ValueError, ImportError, OSError, RuntimeError, checkpoint.CheckpointError) as failure:
        sys.exit(f"error: {failure}")
