"""Tokenizers of model folders: which tokens end, how a prompt begins, and tasks that are encoded again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Generator

from ccrl.llm.models import build_policy, fit_task
from ccrl.llm.policy import CHUNK, CHUNK_FROM, CausalLMPolicy, check_positions
from ccrl.llm.sampler import TokenCollector
from ccrl.llm.task import TextTask
from ccrl.llm.vocabulary import HFVocabulary, encode_prompt, end_tokens
from ccrl.packages import require
from ccrl.testing.recipe_contract import RaggedTask
from envs.text import make_task
from envs.text.vocabulary import CharVocabulary

SPECIAL = ["<pad>", "<bos>", "<eos>", "<turn>"]
MakeTokenizer = Callable[..., Any]
MakeFolder = Callable[..., Path]


def config(model: str = "tiny", **changes: Any) -> Any:
    default = {"model_layers": 1, "model_width": 16, "model_heads": 2, "lora_rank": 0, "logits_chunk_size": None}
    return SimpleNamespace(**default | {"model": model, "temperature": 1.0} | changes)


@pytest.fixture
def make_tokenizer(transformers: Any) -> MakeTokenizer:
    """One token per character, in another order than the tasks' own vocabularies."""
    tokenizers = require("tokenizers", "llm")

    def make(characters: str = "=%+9876543210", **names: str) -> Any:
        known = {token: i for i, token in enumerate([*characters, *SPECIAL])}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<pad>"))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
        backend.decoder = tokenizers.decoders.Fuse()
        names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"} | names
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, additional_special_tokens=["<turn>"], **{k: v for k, v in names.items() if v}
        )

    return make


@pytest.fixture
def make_folder(transformers: Any, make_tokenizer: MakeTokenizer, tmp_path: Path) -> MakeFolder:
    """A model's folder: ``tokenizer`` None leaves it out, ``padding`` tokens of the model are nobody's."""

    def make(tokenizer: Any = "default", ends: Any = None, padding: int = 0, positions: int = 64) -> Path:
        tokenizer = make_tokenizer() if tokenizer == "default" else tokenizer
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(
                vocab_size=(17 if tokenizer is None else len(tokenizer)) + padding, hidden_size=16,
                intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                max_position_embeddings=positions, bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip
        model.generation_config.eos_token_id = ends
        model.save_pretrained(tmp_path / "model")
        if tokenizer is not None:
            tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return make


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_one_begin_token_whoever_writes_it(make_tokenizer: MakeTokenizer) -> None:
    vocab = HFVocabulary(make_tokenizer())
    bos, one = vocab.bos, vocab.encode("1")[0]
    assert encode_prompt(vocab, "1") == encode_prompt(vocab, "<bos>1") == [bos, one]
    assert encode_prompt(HFVocabulary(make_tokenizer(bos_token="")), "1") == [one]
    assert encode_prompt(CharVocabulary("1"), "1") == [1, 3]


def test_end_tokens(make_tokenizer: MakeTokenizer, make_folder: MakeFolder) -> None:
    vocab = HFVocabulary.from_folder(make_folder(ends=[15, 16, 15]))
    assert [vocab.encode(name) for name in ("<eos>", "<turn>")] == [[15], [16]]
    assert (vocab.eos, end_tokens(vocab)) == (15, (15, 16))
    assert end_tokens(HFVocabulary.from_folder(make_folder(ends=16))) == (15, 16)
    assert end_tokens(HFVocabulary.from_folder(make_folder())) == (15,)
    assert end_tokens(RaggedTask().vocab) == (4,)
    assert end_tokens(make_task("modsum").vocab) == ()
    with pytest.raises(ValueError, match=r"ends: expected tokens from 0 to 16, got \[17\]"):
        HFVocabulary(make_tokenizer(), ends=[17])


# -- tasks of a folder ------------------------------------------------------------------------------------------------


def test_a_task_of_characters_is_encoded_with_the_folders_tokenizer(make_folder: MakeFolder) -> None:
    """Before, a model was asked in tokens that mean something else to it."""
    folder = str(make_folder(ends=[15, 16]))
    task = make_task("arithmetic")
    fitted = fit_task(task, folder)
    own, other = (t.prompts(4, Generator().manual_seed(0)) for t in (task, fitted))
    texts = [task.vocab.decode(row) for row in own.tokens.tolist()]
    assert [fitted.vocab.decode(row) for row in other.tokens.tolist()] == texts
    assert own.truth == other.truth
    assert not torch.equal(own.tokens, other.tokens)
    assert task.vocab.size == 18  # what was handed over is as it was
    assert other.demonstration is not None
    assert other.demonstration_valid is not None
    shown, length = other.demonstration, other.demonstration_valid.sum(1).long()
    assert fitted.score(other, torch.arange(4), shown.t(), length).components.tolist() == [[1.0]] * 4
    # the end of a turn is an end, too
    turned = torch.where(shown == fitted.vocab.eos, 16, shown)
    assert fitted.score(other, torch.arange(4), turned.t(), length).components.tolist() == [[1.0]] * 4


@pytest.mark.parametrize("model", ["tiny", "tabular", "nowhere"])
def test_other_models_take_the_task_as_it_is(model: str) -> None:
    task = make_task("arithmetic")
    assert fit_task(task, model) is task


def test_a_folder_without_a_tokenizer_takes_the_task_as_it_is(make_folder: MakeFolder) -> None:
    folder = make_folder(None, ends=[2, 3])
    assert fit_task(make_task("arithmetic"), str(folder)).vocab.size == 18


def test_a_given_tokenizer_learns_the_models_end_tokens(make_tokenizer: MakeTokenizer, make_folder: MakeFolder) -> None:
    task = make_task("arithmetic").reencoded(HFVocabulary(make_tokenizer()))
    fitted = fit_task(task, str(make_folder(None, ends=[15, 16])))
    assert end_tokens(fitted.vocab) == (15, 16)
    assert end_tokens(task.vocab) == (15,)


def test_a_curriculum_learns_them_at_every_level(make_tokenizer: MakeTokenizer, make_folder: MakeFolder) -> None:
    task = make_task("curriculum", task="arithmetic", levels=[{"digits": 1}, {"digits": 2}])
    task = task.reencoded(HFVocabulary(make_tokenizer()))  # type: ignore[attr-defined]
    fitted = fit_task(task, str(make_folder(None, ends=[15, 16])))
    prompts = fitted.prompts(4, Generator().manual_seed(0), "test")
    assert prompts.demonstration is not None
    assert prompts.demonstration_valid is not None
    turned = torch.where(prompts.demonstration == 15, 16, prompts.demonstration).t()
    length = prompts.demonstration_valid.sum(1).long()
    assert fitted.score(prompts, torch.arange(4), turned, length).components.tolist() == [[1.0]] * 4
    assert end_tokens(task.vocab) == (15,)


def test_what_cannot_be_encoded_again_is_refused(
    make_tokenizer: MakeTokenizer, make_folder: MakeFolder, tmp_path: Path
) -> None:
    folder = str(make_folder())
    with pytest.raises(ValueError, match=r"has a tokenizer, and the task 'modsum' has tokens of its own \(SymbolV"):
        fit_task(make_task("modsum"), folder)
    other = make_task("arithmetic").reencoded(HFVocabulary(make_tokenizer("0123456789+%=")))
    with pytest.raises(ValueError, match=r"expected prompts in the tokens of .*, got those of another tokenizer"):
        fit_task(other, folder)
    with pytest.raises(ValueError, match="guessing needs a vocabulary with a token each for ';', '<' and '>'"):
        fit_task(make_task("guessing"), folder)
    with pytest.raises(ValueError, match="sorting: expected a vocabulary that can write"):
        make_task("sorting").reencoded(HFVocabulary(make_tokenizer("012345678=")))
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "1+", "answer": "1"}\n')
    given = make_task("jsonl", path=path, test_path=path, vocab=CharVocabulary("1+"))
    with pytest.raises(ValueError, match="vocab: expected the tokenizer of the model's folder, got CharVocabulary"):
        fit_task(given, folder)


def test_an_answer_too_long_for_the_vocabulary() -> None:
    class Wide(CharVocabulary):
        """Four tokens per character: the answers of two digits take 2 x 4 and the end."""

        def encode(self, text: str) -> list[int]:
            return [token for token in super().encode(text) for _ in range(4)]

        def decode(self, tokens: Sequence[int]) -> str:
            return super().decode(tokens[::4])

    with pytest.raises(ValueError, match="expected answers of at most max_new_tokens = 6 tokens, got 9 with Wide"):
        make_task("arithmetic").reencoded(Wide("0123456789+%="))


# -- models -----------------------------------------------------------------------------------------------------------


def test_padding_of_a_models_vocabulary_is_never_chosen(make_folder: MakeFolder) -> None:
    """Half of the model's tokens are nobody's: neither sampled nor part of a probability."""
    folder = str(make_folder(padding=17))
    task: TextTask = fit_task(make_task("arithmetic"), folder)
    policy: Any = build_policy(config(folder), task)
    assert policy.vocab_size == task.vocab.size == 17
    data = TokenCollector(task, seed=0).sample(policy, task.prompts(8, None), torch.arange(8).repeat_interleave(8))
    assert data["action"].max() < 17
    for chunk in (0, 5):
        policy.logits_chunk_size = chunk
        out = policy(data, frozenset({"log_prob", "log_probs"}))
        assert out["log_probs"].shape[-1] == 17
        torch.testing.assert_close(out["log_probs"].exp().sum(-1), torch.ones(data.shape))
        here = data["valid"] > 0
        torch.testing.assert_close(out["log_prob"][here], data["log_prob"][here], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="vocab_size: expected 1 to the model's 34 tokens, got 35"):
        CausalLMPolicy(policy.model, vocab_size=35)


def test_prompts_beyond_the_models_positions(make_folder: MakeFolder, tmp_path: Path) -> None:
    """Prompt and completion of 8 + 5 tokens need 12 positions: the last token is not read."""
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": "1" * n, "answer": "1"}) + "\n" for n in (3, 7, 5)))
    for positions, fits in ((12, True), (11, False)):
        folder = str(make_folder(positions=positions))
        task = fit_task(make_task("jsonl", path=path, test_path=path, max_new_tokens=5), folder)
        if fits:
            policy: Any = build_policy(config(folder), task)
            found = TokenCollector(task).complete(policy, task.prompts(3, None), deterministic=True)
            assert len(found) == 3
            longer = fit_task(make_task("arithmetic", max_new_tokens=6), folder)
            with pytest.raises(ValueError, match=r"expected at least \d+ positions for the longest of the prompts"):
                TokenCollector(longer).complete(policy, longer.prompts(4, Generator().manual_seed(0)))
        else:
            with pytest.raises(ValueError, match=r"expected at least 12 positions for the prompt in .*jsonl:2 \(8 tok"):
                build_policy(config(folder), task)
    # the cap of the settings, where it is lower, decides
    build_policy(config(folder, max_new_tokens=4), task)
    check_positions(None, 10**6, 10**6, "a model without positions")


def test_a_tiny_model_has_room_for_its_task(transformers: Any) -> None:
    task = make_task("arithmetic", max_new_tokens=400)
    policy: Any = build_policy(config(), task)
    assert policy.positions >= 400


def test_large_vocabularies_are_projected_in_pieces(transformers: Any) -> None:
    from ccrl.llm.models import tiny_model

    chunk = {
        size: CausalLMPolicy(tiny_model(size, layers=1, width=4, heads=1)).logits_chunk_size
        for size in (CHUNK_FROM - 1, CHUNK_FROM)
    }
    assert list(chunk.values()) == [0, CHUNK]
    one = CausalLMPolicy(tiny_model(CHUNK_FROM, layers=1, width=4, heads=1), logits_chunk_size=0)
    assert one.logits_chunk_size == 0


def test_the_default_pieces_change_no_result(transformers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients in float64, with a vocabulary that counts as large."""
    monkeypatch.setattr("ccrl.llm.policy.CHUNK_FROM", 18)
    monkeypatch.setattr("ccrl.llm.policy.CHUNK", 7)
    task, found = make_task("arithmetic"), []
    for chunk in (0, None):
        torch.manual_seed(0)
        policy: Any = build_policy(config(logits_chunk_size=chunk), task)
        assert policy.logits_chunk_size == (7 if chunk is None else 0)
        data = TokenCollector(task, seed=0).sample(
            policy, task.prompts(4, Generator().manual_seed(0)), torch.arange(4).repeat_interleave(3)
        )
        policy.double()
        out = policy(data, frozenset({"log_prob", "entropy"}))
        (out["log_prob"] * data["valid"] + out["entropy"].square()).sum().backward()
        found.append([out["log_prob"], out["entropy"], *(p.grad for p in policy.parameters())])
    for whole, pieces in zip(*found, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-12)
