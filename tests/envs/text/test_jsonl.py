"""A user's own prompts and reward: what works, and what the errors say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator

from ccrl.llm.sampler import TokenCollector
from ccrl.llm.task import TextTask, pad_right
from envs.text import make_task
from envs.text.vocabulary import CharVocabulary, HFVocabulary

RECORDS = [{"prompt": f"say {i}!", "answer": str(i)} for i in range(40)]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(records: list[Any], name: str = "prompts.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
        return path

    return write


def small(path: Path, **options: Any) -> TextTask:
    """Of a file that is too small to lose a tenth: its training questions are its test."""
    return make_task("jsonl", path=path, test_path=path, **options)


def rewards(task: TextTask, text: str, n: int = 3) -> list[list[float]]:
    prompts = task.prompts(n, Generator().manual_seed(0))
    tokens = pad_right([[*task.vocab.encode(text), task.vocab.eos]] * n, task.vocab.pad).t()
    return task.score(prompts, torch.arange(n), tokens, torch.full((n,), len(tokens))).components.tolist()


def length_of(prompt: str, completion: str, record: dict[str, Any]) -> float:
    return len(completion) + record["bonus"]


def test_a_function_gets_prompt_completion_and_record(write: Write) -> None:
    task = small(write([{"prompt": "a7", "bonus": 0.5}] * 3), reward=length_of)
    assert rewards(task, "7a7") == [[3.5]] * 3


def test_a_function_by_name(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text("def same(prompt, completion, record):\n    return completion in prompt\n")
    monkeypatch.syspath_prepend(tmp_path)
    task = small(write([{"prompt": "say 7"}]), reward="my_rewards:same")
    assert rewards(task, "7") == [[1.0]] * 3
    assert rewards(task, "77") == [[0.0]] * 3


def test_without_a_function_the_answer_decides(write: Write) -> None:
    task = small(write([{"prompt": "1+1 =", "answer": " 2"}] * 2))
    assert rewards(task, "2") == rewards(task, " 2 ") == [[1.0]] * 3
    assert rewards(task, "1") == [[0.0]] * 3


def test_components(write: Write) -> None:
    path = write(RECORDS)
    both = make_task("jsonl", path=path, reward=lambda p, c, r: {"b": 2, "a": True}, components=("a", "b"))
    assert rewards(both, "1") == [[1.0, 2.0]] * 3
    with pytest.raises(
        ValueError, match=r"prompts\.jsonl:\d+: the reward of '1': expected the components \('a',\), got"
    ):
        rewards(make_task("jsonl", path=path, reward=lambda p, c, r: {"b": 2}, components=("a",)), "1")
    with pytest.raises(ValueError, match=r"expected a mapping with the components \('a', 'b'\), got 1.0"):
        rewards(make_task("jsonl", path=path, reward=lambda p, c, r: 1.0, components=("a", "b")), "1")
    with pytest.raises(ValueError, match="expected a list of at least one name, none of them twice, got 'accuracy'"):
        make_task("jsonl", path=path, components="accuracy")


@pytest.mark.parametrize(
    ("reward", "error"), [(float("nan"), ValueError), (float("inf"), ValueError), (None, TypeError)]
)
def test_rewards_that_are_no_numbers(write: Write, reward: Any, error: type[Exception]) -> None:
    task = make_task("jsonl", path=write(RECORDS), reward=lambda p, c, r: reward)
    with pytest.raises(error, match=rf"prompts\.jsonl:\d+: the reward of '7': expected .*, got {reward}"):
        rewards(task, "7")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": "a"'], r"prompts\.jsonl:1: expected a JSON object, got '\{\"prompt\": \"a\"' \("),
        ([RECORDS[0], "", "[1]"], r"prompts\.jsonl:3: expected a JSON object, got list"),
        ([{"promt": "a", "answer": "b"}], r":1: expected the field 'prompt', got \['answer', 'promt'\] \(did you mean"),
        ([{"prompt": "a"}], r":1: expected the field 'answer', got \['prompt'\]; add it or give a reward function"),
        ([{"prompt": 3, "answer": "b"}], ":1: expected a string or a list of messages as 'prompt', got 3"),
        ([{"prompt": "a", "answer": 3}], ":1: expected a string as 'answer', got 3"),
        ([{"prompt": "a", "answer": "b", "demonstration": None}], ":1: expected a string as 'demonstration', got None"),
        (
            [{"prompt": "a", "answer": "b", "demonstration": "b" * 64}],
            ":1: expected a demonstration of at most 64 tokens",
        ),
        ([""], "expected one JSON object per line, got an empty file"),
    ],
)
def test_bad_lines(write: Write, lines: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task("jsonl", path=write(lines))


def test_bad_rewards(write: Write) -> None:
    path = write(RECORDS)
    with pytest.raises(ValueError, match="expected 'module:function' or the folder of a reward model, got 'json'"):
        make_task("jsonl", path=path, reward="json")
    with pytest.raises(ValueError, match=r"got 'no_such_module:f': .* expected a module 'no_such_module'"):
        make_task("jsonl", path=path, reward="no_such_module:f")
    with pytest.raises(ValueError, match=r"expected a name 'load_' in .*; did you mean load"):
        make_task("jsonl", path=path, reward="json:load_")
    with pytest.raises(TypeError, match="expected a function or 'module:function', got int"):
        make_task("jsonl", path=path, reward=3)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make_task("jsonl", path=path.with_name("nowhere"))


def test_prompts_begin_and_demonstrations_end_with_their_token(write: Write) -> None:
    task = small(write([{"prompt": "say 7", "answer": "7", "demonstration": "7"}] * 2))
    prompts = task.prompts(2, Generator().manual_seed(0))
    encode, (bos, eos) = task.vocab.encode, (task.vocab.bos, task.vocab.eos)
    assert prompts.tokens.tolist() == [[bos, *encode("say 7")]] * 2
    assert prompts.demonstration.tolist() == [[*encode("7"), eos]] * 2


def test_answers_that_differ_in_white_space_alone_are_equal(write: Write) -> None:
    task = small(write([{"prompt": "1+1 =", "answer": "2"}]))
    prompts = task.prompts(1, Generator().manual_seed(0))
    rows = [[*task.vocab.encode(text), task.vocab.eos] for text in ("2", " 2 ", "1", "  ")]
    length = torch.tensor([len(row) for row in rows])
    question = torch.zeros(4, dtype=torch.int64)
    answer = task.score(prompts, question, pad_right(rows, task.vocab.pad).t(), length).answer.tolist()
    assert answer[0] == answer[1] != answer[2]
    assert answer[3] == -1


def test_splits(write: Write) -> None:
    path = write(RECORDS)
    own = make_task("jsonl", path=path, test_path=write([{"prompt": "say 99", "answer": "99"}], "test.jsonl"))
    assert set(own.prompts(400, Generator().manual_seed(0)).index.tolist()) == set(range(40))
    assert set(own.prompts(5, Generator().manual_seed(0), "test").index.tolist()) == {40}
    hashed = make_task("jsonl", path=path)
    train, test = (set(hashed.prompts(400, Generator().manual_seed(0), s).index.tolist()) for s in ("train", "test"))
    assert train | test == set(range(40))
    assert not train & test
    with pytest.raises(ValueError, match=r"prompts\.jsonl: expected a test question, got 1 lines, .*give a test_path"):
        make_task("jsonl", path=write([{"prompt": "say 7", "answer": "7"}]))
    with pytest.raises(ValueError, match="expected the split 'train' or 'test', got 'dev'"):
        hashed.prompts(1, None, "dev")  # type: ignore[arg-type]


def test_no_question_comes_twice_before_all_came(write: Write) -> None:
    task = make_task("jsonl", path=write(RECORDS), test_path=write([RECORDS[0]] * 60, "test.jsonl"))
    assert sorted(task.prompts(60, Generator().manual_seed(0), "test").index.tolist()) == list(range(40, 100))
    twice = task.prompts(80, Generator().manual_seed(1), "train").index.tolist()
    assert sorted(twice[:40]) == sorted(twice[40:]) == list(range(40))
    assert twice[:40] != twice[40:]


def test_training_goes_through_the_file_in_epochs(write: Write) -> None:
    """Also where a rollout takes no whole part of the file, and over a checkpoint."""
    task = make_task("jsonl", path=write(RECORDS), test_path=write([RECORDS[0]], "test.jsonl"))
    collector, asked = TokenCollector(task, seed=3), list[int]()
    for _ in range(3):
        asked += collector.draw(12).index.tolist()
    again = TokenCollector(task, seed=8)
    again.load_state_dict(collector.state_dict())
    asked += again.draw(12).index.tolist()
    assert sorted(asked[:40]) == list(range(40))
    assert collector.draw(12).index.tolist() == asked[36:]
    assert len(set(asked[40:])) == 8  # of the second epoch


def test_a_record_without_a_demonstration_is_not_imitated_where_padding_is_the_end(write: Write) -> None:
    """Words() pads with its end token: what is a demonstration is for the mask to say."""
    records = [{"prompt": "say 1", "answer": "1", "demonstration": "1"}, {"prompt": "say 2", "answer": "2"}]
    task = small(write(records), vocab=HFVocabulary(Words()))
    assert task.vocab.pad == task.vocab.eos
    prompts = task.prompts(2, Generator().manual_seed(0))
    shown = TokenCollector(task, seed=0).demonstrate(prompts, torch.arange(2))
    has = ["demonstration" in record for _, record in prompts.truth]
    assert shown.valid.sum(0).tolist() == [2.0 * one for one in has]
    assert shown.length.tolist() == [2 * one for one in has]
    # what is asked alone has none, and the task has some: an iteration in which nothing is imitated
    alone = task.ask(torch.tensor([1]), "train")  # type: ignore[attr-defined]
    assert alone.demonstration_valid is not None
    assert not alone.demonstration_valid.any()


def test_files_that_are_no_text(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(json.dumps(RECORDS[0]).encode() + b'\n{"prompt": "caf\xe9", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl:2: expected text in UTF-8, got the byte 0xe9 in column 16"):
        make_task("jsonl", path=path)
    path.write_bytes(b"\xef\xbb\xbf" + write(RECORDS).read_bytes())  # as some editors save UTF-8
    assert len(make_task("jsonl", path=path).records) == 40
    with pytest.raises(ValueError, match=r":1: expected text as 'prompt', got half a surrogate pair"):
        make_task("jsonl", path=write(['{"prompt": "\\ud800", "answer": "1"}']))
    with pytest.raises(ValueError, match=r":1: expected a JSON object"):
        make_task("jsonl", path=write(["[" * 100_000]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"path": None}, TypeError, "path: expected the path of a JSONL file, got None"),
        ({"path": "nowhere"}, FileNotFoundError, "path: expected the path of a JSONL file, got 'nowhere', which is no"),
        ({"test_path": "."}, FileNotFoundError, "test_path: expected the path of a JSONL file, .* which is a folder"),
        ({"test_path": 3}, TypeError, "test_path: expected the path of a JSONL file, got 3"),
        ({"components": ("a", "a")}, ValueError, "none of them twice"),
        ({"components": (1,)}, ValueError, "expected a list of at least one name"),
        ({"components": 3}, ValueError, "expected a list of at least one name"),
        ({"max_new_tokens": 2**63}, ValueError, "max_new_tokens: expected a whole number <= 1048576"),
    ],
)
def test_bad_options(write: Write, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_task("jsonl", **{"path": write(RECORDS)} | options)


def test_vocabularies(write: Write) -> None:
    path = write(RECORDS)
    with pytest.raises(TypeError, match=r"got object without size, pad, .*wrap a Hugging Face tokenizer"):
        make_task("jsonl", path=path, vocab=object())
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1: expected text of the characters '01', got 'say 0!' with"):
        make_task("jsonl", path=path, vocab=CharVocabulary("01"))
    with pytest.raises(ValueError, match="expected different single characters"):
        CharVocabulary("aba")


class Words:
    """A tokenizer as Hugging Face has them, of words."""

    eos_token_id, pad_token_id, bos_token_id = 1, None, None
    words = ("<unk>", "<end>", "say")

    def __len__(self) -> int:
        return 50

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [2 if word == "say" else 3 + int(word.strip("!")) for word in text.split()]

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join("say" if t == 2 else str(t - 3) for t in tokens if t > 1)


def test_a_tokenizer(write: Write) -> None:
    vocab = HFVocabulary(Words())
    assert (vocab.size, vocab.pad, vocab.bos, vocab.eos) == (50, 1, -1, 1)
    task = make_task("jsonl", path=write(RECORDS), vocab=vocab)
    prompts = task.prompts(4, Generator().manual_seed(0))
    assert prompts.tokens.tolist() == [[2, 3 + int(record["answer"])] for _, record in prompts.truth]
    assert rewards(task, prompts.truth[0][1]["answer"])[0] == [1.0]
    endless = Words()
    endless.eos_token_id = None
    with pytest.raises(ValueError, match="with an end token, got Words with eos_token_id=None"):
        HFVocabulary(endless)
    with pytest.raises(ValueError, match=r":1: expected a prompt of at least one token, got ' '"):
        make_task("jsonl", path=write([{"prompt": " ", "answer": "1"}]), vocab=vocab)


CHAT = [{"role": "system", "content": "add"}, {"role": "user", "content": "1+1"}]


def test_chat_messages(write: Write) -> None:
    """OpenAI's form; without a tokenizer messages stand below each other."""
    shown = {"messages": [*CHAT, {"role": "assistant", "content": "2"}], "answer": "2"}
    task = small(write([shown, {"prompt": CHAT[1:], "answer": "2"}, {"prompt": "1+1", "answer": "2"}]), system="add")
    prompts = task.ask(torch.arange(3), "train")  # type: ignore[attr-defined]
    assert [task.vocab.decode(row) for row in prompts.tokens.tolist()] == ["add\n1+1\n", "add\n1+1\n", "1+1"]
    assert prompts.demonstration_valid.sum(1).tolist() == [2.0, 0.0, 0.0]
    assert task.vocab.decode(prompts.demonstration[0].tolist()) == "2"
    for bad in ([], "no", [{"role": "user"}], [{"role": "assistant", "content": "2"}]):
        with pytest.raises(ValueError, match=r":1: expected a (list of messages|message to answer)"):
            small(write([{"messages": bad, "answer": "2"}]))
    with pytest.raises(ValueError, match="system: expected prompts of chat messages"):
        small(write(RECORDS), system="add")


def test_a_chat_template(write: Write) -> None:
    """Once around texts (``chat``) and messages; a tokenizer without one refuses messages and names the line."""

    class Template:
        eos_token_id, pad_token_id, bos_token_id, chat_template = 0, 0, None, "any"

        def __len__(self) -> int:
            return 128

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [*text.encode()]

        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            return bytes(tokens).decode()

        def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool) -> str:
            assert add_generation_prompt
            assert not tokenize
            return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

    path = write([{"prompt": CHAT, "answer": "2"}, {"prompt": "1+2", "answer": "3"}])
    task = small(path, chat=True).reencoded(HFVocabulary(Template()))  # type: ignore[attr-defined]
    prompts = task.ask(torch.arange(2), "train")
    texts = [
        task.vocab.decode(row[int(v.numel() - v.sum()) :]) for row, v in zip(prompts.tokens.tolist(), prompts.valid)
    ]
    assert texts == ["<system>add<user>1+1<assistant>", "<user>1+2<assistant>"]
    Template.chat_template = ""
    with pytest.raises(ValueError, match=r"prompts\.jsonl:1: expected a tokenizer with a chat template"):
        small(path).reencoded(HFVocabulary(Template()))  # type: ignore[attr-defined]


def test_rewards_as_trl_calls_them(write: Write) -> None:
    """All at once, with the columns of the file by name; of chat messages both sides are lists of messages."""
    seen: list[Any] = []

    def level(completions: Any, prompts: Any, level: Any, **rest: Any) -> list[float | None]:
        seen.append((prompts, completions, level, sorted(rest)))
        return [0.5, None, 2]

    path = write([{"prompt": "1+1", "answer": "2", "level": 3}, {"prompt": CHAT, "answer": "2"}, {"prompt": "2"}])
    task = small(path, reward=level)
    prompts = task.ask(torch.arange(3), "train")  # type: ignore[attr-defined]
    tokens = pad_right([[*task.vocab.encode("2"), task.vocab.eos]] * 3, task.vocab.pad).t()
    score = task.score(prompts, torch.arange(3), tokens, torch.full((3,), 2))
    assert score.components.tolist() == [[0.5], [0.0], [2.0]]
    (found,) = seen
    assert found[0] == ["1+1", CHAT, "2"]
    assert found[1] == ["2", [{"role": "assistant", "content": "2"}], "2"]
    assert found[2:] == ([3, None, None], ["answer", "completion_ids"])

    def one(completions: Any) -> list[float]:
        return [1.0]

    with pytest.raises(ValueError, match="one: expected a list of 3 rewards, one per completion, got 1"):
        rewards(small(path, reward=one), "2")

    def silent(completions: Any) -> list[None]:
        return [None] * len(completions)

    with pytest.raises(ValueError, match="got None for all of them from every function; does one lack its return"):
        rewards(small(path, reward=silent), "2")


def test_several_rewards_are_components(write: Write) -> None:
    def short(completions: list[str]) -> list[bool]:
        return [len(text) < 2 for text in completions]

    task = small(write([{"prompt": "a7", "bonus": 0.5}] * 3), reward=[short, length_of])
    assert task.components == ("short", "length_of")
    assert rewards(task, "7a7") == [[0.0, 3.5]] * 3
    with pytest.raises(ValueError, match=r"components: expected one name per reward function, got \('a',\) for 2"):
        small(write([{"prompt": "a7"}]), reward=[short, length_of], components=("a",))


def test_a_reward_model_judges_in_batches(tmp_path: Path) -> None:
    """A folder in the place of a function: every text gets the number that it gets alone."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    known = {token: i for i, token in enumerate([*"0123456789+=", "<pad>", "<unk>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path / "judge")
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(
        vocab_size=len(known), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_labels=1, pad_token_id=known["<pad>"],
    ))  # fmt: skip
    model.save_pretrained(tmp_path / "judge")
    lines = [{"prompt": "1+2="}, {"prompt": [{"role": "user", "content": "3457="}]}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = str(tmp_path / "data.jsonl")
    task = make_task("jsonl", path=path, reward=[str(tmp_path / "judge"), lambda prompt, completion, record: 1.0],
                     components=("judge", "one"), test_path=path, judge_batch=2)  # fmt: skip
    prompts = task.ask(torch.tensor([0, 1]), "train")
    written = ["3", "7", "1122", "12345"]
    tokens = pad_right([[*task.vocab.encode(t), task.vocab.eos] for t in written], 0).t()
    said = task.score(prompts, torch.tensor([0, 1, 0, 0]), tokens, torch.tensor([2, 2, 5, 6])).components
    # without a chat template messages are read one below the other
    texts = ["1+2=3", "3457=\n7", "1+2=1122", "1+2=12345"]
    alone = [model(**tokenizer(t, return_tensors="pt")).logits.item() for t in texts]
    assert said[:, 0].tolist() == pytest.approx(alone, abs=1e-6)
    assert said[:, 1].tolist() == [1.0] * 4
    with pytest.raises(ValueError, match="'module:function' or the folder of a reward model"):
        make_task("jsonl", path=path, reward=str(tmp_path / "nowhere"), test_path=path)
