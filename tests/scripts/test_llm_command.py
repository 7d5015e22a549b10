"""By command: a model's folder with a tokenizer, a file of prompts, reward functions of one's own."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ccrl.packages import require

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``base`` (a Llama of one layer with a tokenizer of characters and a chat template), ``data.jsonl``
    (texts and chat messages) and ``my_rewards.py``."""
    try:
        require("transformers", "llm")
    except ImportError as error:
        pytest.skip(str(error))
    work = tmp_path_factory.mktemp("engineer")
    command("llm_example", "--out", str(work), cwd=work)
    return work


def command(script: str, *argv: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *argv],
        cwd=cwd, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def page(script: str, which: int = 0) -> list[str]:
    """The arguments of the page's command of a script, of the first one or a later one."""
    text = (ROOT / "docs/own_language_model.md").read_text(encoding="utf-8")
    lines = re.findall(rf"^python scripts/{script}\.py (?!--resume)(.*)$", text, flags=re.MULTILINE)
    return shlex.split(lines[which])


MEMORY = ("--dtype", "bfloat16", "--gradient-checkpointing", "--logits-chunk-size", "8", "--microbatch", "8")
SAMPLING = ("--top-p", "0.9", "--top-k", "20", "--learning-rate", "3e-4", "--lr-warmup", "0.5")
SIZES = ("--n-prompts", "4", "--group-size", "4", "--max-new-tokens", "4", "--checkpoint-every", "32")


@pytest.fixture(scope="module")
def run(work: Path) -> Path:
    """Trained by command, with paths relative to the folder one works in."""
    pytest.importorskip("peft")
    command(
        "train", *page("train"), "--lora-rank", "2", "--total-timesteps", "64", "--eval-every", "32", "--eval-episodes",
        "4", "--run-root", "runs", *SIZES, *MEMORY, *SAMPLING, cwd=work,
    )  # fmt: skip
    (found,) = (work / "runs").iterdir()
    return found


def test_the_run_holds_out_questions_and_two_rewards(run: Path) -> None:
    from ccrl.experiment.run import RunFolder

    config = RunFolder.open(run).config()
    assert Path(config["agent"]["model"]).is_absolute()
    assert config["env"] == "jsonl"
    assert Path(config["env_kwargs"]["path"]).is_absolute()
    assert config["env_kwargs"]["max_new_tokens"] == 4
    head = (run / "progress.csv").read_text().splitlines()[0].split(",")
    assert {"rollout/digits", "rollout/short", "rollout/success"} <= set(head)
    assert (run / "eval.csv").is_file()


def test_tensorboard_shows_completions_and_groups_without_spread(run: Path) -> None:
    accumulators = require("tensorboard.backend.event_processing.event_accumulator", "tensorboard")
    found = accumulators.EventAccumulator(str(run), size_guidance={"tensors": 0})
    found.Reload()
    scalars = {e.value for e in found.Scalars("rollout/zero_spread")}
    assert scalars
    assert all(0.0 <= value <= 1.0 for value in scalars)
    # 64 completions in 4 iterations, warm-up over the first half: 1/2 and 1 of the step size, then half a cosine from
    # 1/2 of the run on: 1 and (1 + cos(pi / 2)) / 2 = 1/2
    rates = [e.value for e in found.Scalars("train/learning_rate")][:4]
    assert rates == pytest.approx([1.5e-4, 3e-4, 3e-4, 1.5e-4])
    (first, *_) = found.Tensors("rollout/samples/text_summary")
    text = first.tensor_proto.string_val[0].decode()
    assert "reward " in text
    assert "+1" in text


def test_export_is_opened_by_transformers(
    work: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merged: no adapter is left; the tokenizer has its chat template; a second export into the folder is refused."""
    transformers = require("transformers", "llm")
    trust = ("--trust", "my_rewards:digits", "my_rewards:short")
    named = {"RUN": str(run), "merged": str(tmp_path / "merged")}
    out = command("export", *(named.get(word, word) for word in page("export")), cwd=work)
    assert "with its tokenizer" in out
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert not [name for name in model.state_dict() if "lora" in name]
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3+1"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = model.generate(**asked, max_new_tokens=3, do_sample=False)
    assert written.shape[1] > asked["input_ids"].shape[1]
    from scripts import export

    monkeypatch.syspath_prepend(work)

    with pytest.raises(ValueError, match="out: expected a new or an empty folder"):
        export.main(export.ExportConfig(run, out=tmp_path / "merged", trust=trust[1:]))
    with pytest.raises(ValueError, match="format: expected auto or huggingface for bnpo, got onnx"):
        export.main(export.ExportConfig(run, "onnx", trust=trust[1:]))


def test_it_goes_on_from_another_folder(work: Path, run: Path, tmp_path: Path) -> None:
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("total_timesteps: 64", "total_timesteps: 96"))
    trust = ("--trust", "my_rewards:digits", "my_rewards:short")
    out = command("train", "--resume", str(run), *trust, cwd=tmp_path, PYTHONPATH=f"{ROOT}{os.pathsep}{work}")
    assert "96 steps" in out
    asked = [str(run) if word == "RUN" else word for word in page("evaluate")]
    said = command("evaluate", *asked, cwd=tmp_path, PYTHONPATH=f"{ROOT}{os.pathsep}{work}")
    assert "pass@1" in said


def test_a_server_writes_and_a_reward_model_judges(work: Path) -> None:
    """The page's last command, against the small server."""
    from ccrl.testing.completions_server import CompletionsServer

    shutil.copytree(work / "base", work / "served")
    with CompletionsServer(work / "served", "mine") as server:
        argv = [server.url if word.startswith("http") else word for word in page("train", 2)]
        command(
            "train", *argv, "--total-timesteps", "32", "--eval-every", "0", "--run-root", "served_runs", "--lora-rank",
            "2", *SIZES, *SAMPLING, cwd=work,
        )  # fmt: skip
        assert server.told == ["collective_rpc", "reset_prefix_cache"] * 2
        assert len(server.asked) == 8
    (run,) = (work / "served_runs").iterdir()
    rows = list(csv.DictReader((run / "progress.csv").open()))
    assert all(float(row["rollout/server_gap"]) < 1e-4 for row in rows)
    assert all(abs(float(row["rollout/judge"])) > 0 for row in rows)
    assert "completions come from a server" in json.loads((run / "run.json").read_text())["resume_note"]


def test_several_turns_with_a_tool(work: Path) -> None:
    """The page's second command: the model's folder has a chat template and a token for the end of a call."""
    command(
        "train", *page("train", 1), "--total-timesteps", "16", "--eval-every", "0", "--run-root", "tool_runs", *SIZES,
        cwd=work,
    )  # fmt: skip
    (run,) = (work / "tool_runs").iterdir()
    assert "tools__grpo" in run.name
    from agents.llm.baselines import GRPO
    from ccrl.experiment.checkpoint import latest

    agent = GRPO.load(latest(run / "checkpoints"))
    vocab, task = agent.task.vocab, agent.task
    called = vocab.encode("<tool_call>12*7</tool_call>")
    assert called[-1] == task.turn
    assert vocab.decode(task.respond(None, called)) == "<tool_response>84</tool_response>"
