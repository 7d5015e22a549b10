"""Training whose completions a server writes: against a server of a model's folder that speaks vLLM's protocol."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from agents.llm.baselines import GRPO
from agents.llm.epo import EPO
from ccrl import registry
from ccrl.llm.models import tiny_model
from ccrl.llm.served import ServerError
from ccrl.packages import require
from ccrl.testing.completions_server import CompletionsServer
from envs.text import make_task

SIZE = {"n_prompts": 2, "group_size": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer; the task's tokens are its own, since the folder has no tokenizer."""
    try:
        require("transformers", "llm")
    except ImportError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    (folder / "data.jsonl").write_text("".join(f'{{"prompt": "{i}+"}}\n' for i in range(10, 40)))
    vocab = task(folder).vocab
    model: Any = tiny_model(vocab.size, layers=1, width=16, heads=2)
    model.generation_config.eos_token_id = vocab.eos
    model.save_pretrained(folder)
    return folder


def task(folder: Path) -> Any:
    return make_task("jsonl", path=folder / "data.jsonl", reward=ones, max_new_tokens=5)


def ones(completions: list[str]) -> list[float]:
    return [text.count("1") - 0.1 * len(text) for text in completions]


@pytest.fixture
def server(base: Path, tmp_path: Path) -> Iterator[CompletionsServer]:
    """Started from a copy of the model: the training writes into it."""
    served = tmp_path / "served"
    served.mkdir()
    for path in base.iterdir():
        (served / path.name).write_bytes(path.read_bytes())
    with CompletionsServer(served, "mine") as server:
        yield server


def agent(server: CompletionsServer, base: Path, method: Any = GRPO, **options: Any) -> Any:
    settings: dict[str, Any] = {"generation": server.url, "generation_model": "mine", "generation_weights": "reload",
                                "generation_folder": server.folder, "model": str(base)}  # fmt: skip
    return method(task(base), seed=0, **{**SIZE, **settings, **options})


def test_the_server_writes_with_the_weights_of_each_iteration(server: CompletionsServer, base: Path) -> None:
    trained = agent(server, base, lora_rank=2 if _has_peft() else 0)
    for i in (1, 2):
        trained.learn(8)
        assert trained.scalars["rollout/server_gap"] < 1e-4  # the same weights, in the same number format
        assert trained.scalars["rollout/server_behind"] == 0
        assert trained.scalars["time/server_sent"] == i
    assert server.told == ["collective_rpc", "reset_prefix_cache"] * 2
    assert len(server.asked) == 4  # two iterations of two prompts
    assert {body["n"] for body in server.asked} == {4}
    assert len({body["seed"] for body in server.asked}) == 4
    data = trained.learner.last
    assert data["valid"].sum(0).tolist() == data["length"].tolist()
    assert trained.collector.tokens >= 16
    # flags: the last token is an end token, or the cap cut it
    last = data["action"][data["length"] - 1, torch.arange(8)]
    assert torch.equal(data["capped"], last != trained.task.vocab.eos)
    assert bool((data["terminated"] | data["truncated"]).sum() == 8)


def test_old_weights_are_said_to_be_old(server: CompletionsServer, base: Path) -> None:
    """Sent every second iteration: the second one is written by the policy before the first update."""
    trained = agent(server, base, generation_every=2)
    behind, gaps = [], []
    for _ in range(4):
        trained.learn(8)
        behind.append(trained.scalars["rollout/server_behind"])
        gaps.append(float(trained.scalars["rollout/server_gap"]))
    assert behind == [0, 1, 0, 1]
    assert max(gaps[0], gaps[2]) < 1e-4 < 1e-3 < min(gaps[1], gaps[3])


def test_nothing_is_sent_where_the_user_says_so(server: CompletionsServer, base: Path) -> None:
    trained = agent(server, base, generation_weights="none", generation_folder=None)
    trained.learn(16)
    assert server.told == []
    assert trained.scalars["rollout/server_behind"] == 1
    assert float(trained.scalars["rollout/server_gap"]) > 1e-3


def test_a_server_that_keeps_its_weights_is_found_out(server: CompletionsServer, base: Path) -> None:
    trained = agent(server, base, generation_tolerance=1e-4)
    server.reload = lambda: None  # type: ignore[method-assign]
    trained.learn(8)  # the weights of the start are those that it has
    with pytest.raises(ServerError, match="did not take them"):
        trained.learn(8)


def test_a_function_brings_the_weights(server: CompletionsServer, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    heard = []
    module = types.ModuleType("my_server")
    module.push = lambda folder, url, model: (heard.append((folder, url, model)), server.reload())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_server", module)
    agent(server, base, generation_weights="my_server:push").learn(8)
    assert heard == [(server.folder, server.url, "mine")]
    assert not server.told


def test_what_does_not_fit_is_refused(server: CompletionsServer, base: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"generation_weights": ""}, "expected how trained weights reach the server"),
        ({"generation_model": ""}, "expected the model's name at the server"),
        ({"generation_weights": "none"}, "expected none with generation_weights 'none'"),
        ({"generation_folder": None}, "expected a folder with generation_weights 'reload'"),
        ({"generation_folder": base}, "another folder than the model's own"),
        ({"generation_weights": "nowhere:push"}, "expected none, reload or module:function"),
        ({"temperature": 0.7}, "expected 1 with generation"),
        ({"generation": ""}, "expected generation, the URL of a server"),
        ({"method": EPO}, "which a server does not send"),
    ):
        with pytest.raises(ValueError, match=message):
            agent(server, base, **options)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="which has other files"):
        agent(server, base, generation_folder=tmp_path / "mine")
    with pytest.raises(ServerError, match=r"refuses the request \(400\): .*no model 'yours'"):
        agent(server, base, generation_model="yours").learn(8)


def _has_peft() -> bool:
    import importlib.util

    return importlib.util.find_spec("peft") is not None


def test_a_resumed_run_sends_its_weights_first(server: CompletionsServer, base: Path, tmp_path: Path) -> None:
    """The server has those of another run by then."""
    options = {"path": str(base / "data.jsonl"), "reward": "json:dumps", "max_new_tokens": 5}
    settings = {"generation": server.url, "generation_model": "mine", "generation_weights": "reload",
                "generation_folder": server.folder, "model": str(base), **SIZE}  # fmt: skip
    first = GRPO("jsonl", seed=0, env_kwargs=options, **settings)
    first.save(tmp_path / "run.pt")
    agent(server, base).learn(16)
    with registry.stored("a run", ["json:dumps"]):
        again = GRPO.load(tmp_path / "run.pt", trust=["json:dumps"])
    prompts = again.collector.draw(2)
    again.collector.generate(again.policy, prompts, torch.arange(2))
    assert again.collector.sent == 1
    assert again.collector.log["rollout/server_gap"] < 1e-4
    assert "sends it the weights again" in again.collector.resume_note
