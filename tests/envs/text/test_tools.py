"""Tool calls: what a tool writes is read, counted as present, and trained on by nobody."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from agents.llm.baselines import GRPO, DrGRPO
from agents.llm.preferences import SFT
from ccrl.collect import Request
from ccrl.data import Batching
from ccrl.estimators.evaluate import loss_of
from ccrl.llm.sampler import TokenCollector
from ccrl.llm.task import ConversationTask, Prompts, pad_left
from envs.text import make_task
from envs.text.tools import calculator


class Writes:
    """A policy that writes a text, whatever the tool says: its token ``t`` at position ``t``."""

    temperature = 1.0

    def __init__(self, task: Any, script: str) -> None:
        self.size, self.script = task.vocab.size, [*task.vocab.encode(script), task.vocab.eos]

    def logits(self, t: int, n: int) -> Tensor:
        logits = torch.zeros(n, self.size)
        logits[:, self.script[min(t, len(self.script) - 1)]] = 99.0
        return logits

    def start(self, prompts: Prompts, question: Tensor, steps: int) -> tuple[Any, Tensor]:
        return 0, self.logits(0, len(question))

    def step(self, state: int, token: Tensor, present: Tensor) -> tuple[int, Tensor]:
        return state + 1, self.logits(state + 1, len(token))

    def keep(self, state: int, rows: Tensor) -> int:
        return state


def asked(task: Any, text: str, truth: Any) -> Prompts:
    tokens, valid = pad_left([task.vocab.encode(text)], task.vocab.pad)
    return Prompts(tokens, valid, torch.tensor([0]), (truth,))


def test_a_call_is_answered_and_masked() -> None:
    """``2*3+1=`` with the completion ``<2*3>`` ``6;`` ``<6+1>`` ``7;`` ``7`` and the end token: 5 + 5 + 2 tokens are
    the model's, 2 + 2 the tool's."""
    task = make_task("calculator", calls=2)
    assert isinstance(task, ConversationTask)
    policy = Writes(task, "<2*3>??<6+1>??7")  # where the tool writes, it is not asked
    collector = TokenCollector(task, seed=0)
    request = Request(counts=torch.tensor([1]), prompts=asked(task, "2*3+1=", 7))
    data = collector.collect(request, policy)
    assert task.vocab.decode(data["action"][:, 0].tolist()) == "<2*3>6;<6+1>7;7"
    assert data["valid"][:, 0].tolist() == [1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 1]
    assert data["present"][:, 0].tolist() == [1.0] * 16
    assert data["length"].tolist() == [16]
    assert data["reward_components"].tolist() == [[1.0]]
    assert collector.tokens == 12
    assert data["reward"][:, 0].nonzero().flatten().tolist() == [15]


def test_losses_divide_by_what_the_model_wrote() -> None:
    """Two completions: ``<2*3>6;6`` + end (8 tokens, 2 of them the tool's) and ``6`` + end: 6 + 2 tokens are counted.
    With advantages 1 and -1 and ratios 1 the mean over tokens is -(6 * 1 + 2 * -1) / 8 = -1/2, and a token's gradient
    with respect to its log-probability is -A / 8, 0 on the tool's tokens."""
    task = make_task("calculator")
    collector = TokenCollector(task, seed=0)
    prompts = asked(task, "2*3=", 6)
    rows = []
    for script in ("<2*3>??6", "6"):
        found = collector.sample(Writes(task, script), prompts, torch.tensor([0]))
        rows.append({k: found[k].clone() for k in ("action", "valid", "present")})
    length = 8
    columns = {k: torch.cat([torch.nn.functional.pad(r[k], (0, 0, 0, length - len(r[k]))) for r in rows], 1)
               for k in rows[0]}  # fmt: skip
    assert columns["valid"].sum(0).tolist() == [6.0, 2.0]
    log_prob = torch.full((length, 2), -0.5, dtype=torch.float64)
    found = loss_of(
        DrGRPO, DrGRPO.Config(aggregate="token_mean"), log_prob=log_prob, old_log_prob=log_prob, mask=columns["valid"],
        reward=torch.tensor([2.0, 0.0]).double(), group=torch.tensor([0, 0]),
    )  # fmt: skip
    assert float(found.loss) == pytest.approx(-0.5)
    wanted = columns["valid"] * torch.tensor([-1.0, 1.0]) / 8
    torch.testing.assert_close(found.gradient, wanted.double())


def test_demonstrations_do_not_teach_what_the_tool_says() -> None:
    task = make_task("calculator", operands=2, digits=1)
    collector = TokenCollector(task, seed=0)
    data = collector.collect(Request(counts=torch.ones(3, dtype=torch.int64), demonstrations=True), None)
    for n in range(3):
        text = task.vocab.decode(data["action"][:, n].tolist())
        call, _, rest = text.partition(">")
        result = rest.partition(";")[0] + ";"
        valid = [1.0] * (len(call) + 1) + [0.0] * len(result) + [1.0] * (len(rest) - len(result) + 1)
        assert data["valid"][: len(valid), n].tolist() == valid
        assert int(data["length"][n]) == len(valid) == int(data["present"][:, n].sum())
    assert data["reward_components"].tolist() == [[1.0]] * 3
    batch = data.epoch(Batching("sequence", "full"), None)[0]
    assert int(batch["n_valid"]) == int(data["valid"].sum())


def test_a_model_learns_with_calls() -> None:
    """Supervised steps, then reinforcement: tokens of both are the model's alone."""
    sizes = {"model_layers": 1, "model_width": 32, "model_heads": 2}
    agent = GRPO("calculator", seed=0, env_kwargs={"operands": 2, "digits": 1}, n_prompts=2, group_size=4,
                 warm_start_steps=2, warm_start_batch=4, **sizes)  # fmt: skip
    agent.learn(8)
    assert agent.collector.tokens == int(agent.learner.last["valid"].sum())
    SFT("calculator", seed=0, env_kwargs={"operands": 2, "digits": 1}, n_prompts=2, **sizes).learn(2)


@pytest.mark.parametrize(
    ("text", "value"),
    [("12*7-90", "-6"), ("1/4", "0.25"), ("(2+3)*4", "20"), ("0.1+0.2", "0.3"), ("7//2", "3"), ("-7%3", "2")],
)
def test_calculator(text: str, value: str) -> None:
    assert calculator(text) == value


@pytest.mark.parametrize("text", ["", "2**9", "__import__('os')", "9" * 201, "1e9", "9" * 31, "1<2", "(" * 150])
def test_what_is_no_calculation(text: str) -> None:
    if text == "1e9":
        assert calculator(text) == "1000000000"
        return
    with pytest.raises(ValueError, match="expected"):
        calculator(text)


def test_failed_and_superfluous_calls() -> None:
    task: Any = make_task("calculator", calls=1)
    code = task.vocab.encode
    said = [task.vocab.decode(task.respond(0, code(text))) for text in ("<1-->", "<1+1>2;<2+2>", "1+1>", ">")]
    assert said == ["?;", "?;", "2;", "?;"]
    # a result of an earlier call is no right answer, and neither is one without an end token
    right = [task.judge(7, text).components[0] for text in ("7", "<3+4>7;7", "<3+4>7;", "7;6", "-7", "7 ", "07")]
    assert right == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{i}*{i}=", "answer": str(i * i)} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def double(x: str) -> str:
    return str(2 * int(x))


MARKS: dict[str, Any] = {"call": ("<", ">"), "result": ("", ";")}


def test_tools_for_prompts_of_ones_own(lines: Path) -> None:
    seen: list[Any] = []

    def reward(prompt: str, completion: str, record: dict[str, Any]) -> float:
        seen.append((completion, record["transcript"], record["tool_calls"]))
        return float(completion == record["answer"])

    task: Any = make_task("tools", path=lines, reward=reward, tools=["calculator", double], **MARKS)
    record = {"prompt": "3*3=", "answer": "9"}
    call = '{"name": "calculator", "arguments": {"expression": "3*3"}}'
    with pytest.raises(ValueError, match="with the unknown"):
        task.vocab.encode(call)  # characters of the file and of the marks alone
    single: Any = make_task("tools", path=lines, reward=reward, **MARKS)
    data = TokenCollector(single, seed=0).sample(
        Writes(single, "<3*3>009"), asked(single, "3*3=", ("here", record)), torch.tensor([0])
    )
    assert seen == [("9", "<3*3>9;9", 1)]
    assert data["valid"][:, 0].tolist() == [1, 1, 1, 1, 1, 0, 0, 1, 1]
    assert data["episode_reward"].tolist() == [1.0]


def test_demonstrations_of_ones_own_do_not_teach_results(tmp_path: Path) -> None:
    """A call that is answered, one that is not, and a semicolon that no tool wrote."""
    path = tmp_path / "shown.jsonl"
    shown = ["<1+1>2;2", "<1+1>", "1;<3>3;<4>4;5", "7"]
    path.write_text("".join(json.dumps({"prompt": f"{i}?", "answer": "", "demonstration": text}) + "\n"
                            for i, text in enumerate(shown)))  # fmt: skip
    task: Any = make_task("tools", path=path, test_path=path, **MARKS)
    prompts = task.ask(torch.arange(4), "train")
    written = [
        task.vocab.decode(row[(valid > 0) & (forced == 0)].tolist())
        for row, valid, forced in zip(
            prompts.demonstration, prompts.demonstration_valid, prompts.demonstration_forced, strict=True
        )
    ]
    assert written == ["<1+1>2", "<1+1>", "1;<3><4>5", "7"]
    assert task.ask(torch.tensor([1, 3]), "train").demonstration_forced is None


def test_calls_by_name_and_what_tools_raise(lines: Path) -> None:
    task: Any = make_task("tools", path=lines, tools=["calculator", double], **MARKS)
    said = [task._called(text) for text in (
        '{"name": "double", "arguments": {"x": "21"}}', '{"name": "double", "arguments": "4"}', '{"name": "triple"}',
        "3*3", '{"name": "double", "arguments": "x"}', "{",
    )]  # fmt: skip
    assert said[:2] == ["42", "8"]
    assert [text.split(":")[1].strip() for text in said[2:]] == ["KeyError", "ValueError", "ValueError",
                                                                 "JSONDecodeError"]  # fmt: skip


class Pieces:
    """A tokenizer with a token for the end of a call."""

    marks = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
    chars = "0123456789*=+ abcdefghijklmnopqrstuvwxyz:ENO"
    eos_token_id, pad_token_id, bos_token_id = 0, 0, None

    def __len__(self) -> int:
        return 1 + len(self.marks) + len(self.chars)

    def encode(self, text: str, **_: Any) -> list[int]:
        found = []
        while text:
            mark = next((m for m in self.marks if text.startswith(m)), text[0])
            found.append(1 + [*self.marks, *self.chars].index(mark))
            text = text[len(mark) :]
        return found

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return "".join(["", *self.marks, *self.chars][t] for t in tokens)


def test_marks_are_tokens_of_the_tokenizer(lines: Path) -> None:
    from ccrl.llm.vocabulary import HFVocabulary

    vocab = HFVocabulary(Pieces())
    task: Any = make_task("tools", path=lines, vocab=vocab, calls=1)
    assert task.turn == 2
    reply = task.respond(None, vocab.encode("well <tool_call>3*3</tool_call>"))
    assert vocab.decode(reply) == "<tool_response>9</tool_response>"
    again = [*vocab.encode("<tool_call>3*3</tool_call>"), *reply, *vocab.encode("<tool_call>3*3</tool_call>")]
    assert "no more than 1 calls" in vocab.decode(task.respond(None, again))
    with pytest.raises(ValueError, match="one token"):
        make_task("tools", path=lines, vocab=vocab, call=("[", "3*3"))
    with pytest.raises(ValueError, match="expected what stands before a call"):
        make_task("tools", path=lines, call=("", ">"), result=("", ";"))
    with pytest.raises(ValueError, match="expected one character as the end of a call"):
        make_task("tools", path=lines).prompts(1, None)
    with pytest.raises(ValueError, match="some of calculator or module:function"):
        make_task("tools", path=lines, tools="abacus", **MARKS)
    with pytest.raises(ValueError, match="expected at least one"):
        make_task("tools", path=lines, tools=[], **MARKS)


def test_questions_of_both_splits() -> None:
    task = make_task("calculator", operands=2, digits=1)
    train, test = (set(task.prompts(50, Generator().manual_seed(0), s).index.tolist()) for s in ("train", "test"))  # type: ignore[arg-type]
    assert not train & test
