"""Language models by name: a tiny one from scratch, a table, a local directory; adapters through peft."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ccrl.data import Data
from ccrl.estimators.terms import Outputs
from ccrl.llm.policy import CausalLMPolicy, check_positions, model_positions
from ccrl.llm.tabular import TabularTokenPolicy
from ccrl.llm.task import Prompts, TextTask
from ccrl.llm.vocabulary import HFVocabulary, folder_ends, has_tokenizer
from ccrl.packages import require
from ccrl.policies.dense import make_dense

__all__ = ["Snapshot", "add_adapters", "build_policy", "fit_task", "load_model", "longest_prompt", "tiny_model"]


def tiny_model(
    vocab_size: int, *, layers: int = 4, width: int = 128, heads: int = 4, max_length: int = 256,
    pad: int | None = None, onednn: bool = True,
) -> nn.Module:  # fmt: skip
    """A Llama from scratch with weights from torch's global generator (about 0.8 M parameters by default).

    :param onednn: its matrix products are oneDNN's where that is faster (``ccrl.policies.dense``): the library's model,
        parameters and names, other last digits.
    :raises ValueError: if ``heads`` does not divide ``width``.
    """
    if width % heads:
        raise ValueError(f"width: expected a multiple of heads = {heads}, got {width}")
    transformers = require("transformers", "llm")
    config = transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=max_length, pad_token_id=pad,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return make_dense(model) if onednn else model


def load_model(directory: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The causal language model in a local directory; nothing is downloaded and no code of the model's runs.

    :raises FileNotFoundError: if there is no such directory.
    :raises ValueError: if its weights are damaged.
    """
    if not Path(directory).is_dir():
        raise FileNotFoundError(
            f"model: expected tiny, tabular or a local model directory, got {str(directory)!r}; save one there with "
            "save_pretrained"
        )
    transformers = require("transformers", "llm")
    errors = require("safetensors", "llm").SafetensorError
    try:
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=dtype
        )
    except errors as error:
        raise ValueError(f"model: expected whole weights (*.safetensors) in {directory}, got a damaged file ({error}); "
                         "copy the folder again") from error  # fmt: skip
    return model


def add_adapters(model: nn.Module, rank: int) -> nn.Module:
    """Low-rank adapters on all linear layers; everything else is frozen."""
    peft = require("peft", "llm")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # of names between the two libraries, which nobody else can act on
        warnings.simplefilter("ignore", FutureWarning)
        adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def build_policy(config: Any, task: TextTask) -> nn.Module:
    """The policy that ``config.model`` names, for ``task``.

    :raises ValueError: if the model's vocabulary is smaller than the task's, if it has fewer positions than a prompt
        and a completion need, if a table is asked for where prompts are not numbers of questions, or with adapters, or
        if oneDNN is to multiply what it does not.
    """
    options = {"temperature": config.temperature}
    dtype: torch.dtype = getattr(torch, getattr(config, "dtype", "float32"))
    again: bool = getattr(config, "gradient_checkpointing", False)
    products: str = getattr(config, "products", "auto")
    if products == "onednn" and (config.model == "tabular" or dtype != torch.float32):
        raise ValueError(f"products: expected auto with model='tabular' or dtype='bfloat16' (oneDNN's products are "
                         f"of a model's float32 matrices), got {products!r}")  # fmt: skip
    if config.model == "tabular":
        if not hasattr(task, "fixed_length"):
            raise ValueError(
                f"model: tabular needs a bandit task (fixed length, numbered questions), got {task.name!r}"
            )
        if config.lora_rank:
            raise ValueError(f"lora_rank: expected 0 with model='tabular' (a table has no layers), got "
                             f"{config.lora_rank}")  # fmt: skip
        if dtype != torch.float32 or again:
            raise ValueError("dtype, gradient_checkpointing: expected the defaults with model='tabular' (it has no "
                             f"layers), got {dtype} and {again}")  # fmt: skip
        bandit: Any = task
        init = bandit.initial_logits() if hasattr(bandit, "initial_logits") else None
        return TabularTokenPolicy(bandit.questions, bandit.fixed_length, task.vocab.size, init=init, **options)
    cap = min(task.max_new_tokens, getattr(config, "max_new_tokens", 0) or task.max_new_tokens)
    longest, which = longest_prompt(task)
    if config.model == "tiny":
        model = tiny_model(
            task.vocab.size, layers=config.model_layers, width=config.model_width, heads=config.model_heads,
            max_length=max(256, longest + cap), pad=task.vocab.pad if 0 <= task.vocab.pad < task.vocab.size else None,
            onednn=products != "torch",
        )  # fmt: skip
    else:
        model = load_model(config.model, dtype if config.lora_rank else torch.float32)
        if products == "onednn":
            make_dense(model)
    if config.model == "tiny" and config.lora_rank:
        model = model.to(dtype)
    rows = int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
    if rows < task.vocab.size:
        raise ValueError(f"model: expected at least the task's {task.vocab.size} tokens, got {rows}")
    check_positions(model_positions(model), longest, cap, which)
    if config.lora_rank:
        model = add_adapters(model, config.lora_rank)
    return CausalLMPolicy(
        model, logits_chunk_size=config.logits_chunk_size, vocab_size=task.vocab.size,
        dtype=dtype, gradient_checkpointing=again, **options,
    )  # fmt: skip


def longest_prompt(task: TextTask) -> tuple[int, str]:
    """Tokens of the longest prompt and which one it is: of all where the task can say (``longest_prompt``), else of 64
    training prompts. A longer one that comes later is refused when it comes."""
    if hasattr(task, "longest_prompt"):
        longest, where = task.longest_prompt()
        return longest, f"the prompt in {where}"
    width = task.prompts(64, torch.Generator().manual_seed(0)).tokens.shape[1]
    return width, f"the longest of 64 prompts of {task.name!r}"


def fit_task(task: TextTask, model: str) -> TextTask:
    """``task`` in the tokens of a model (``tiny``, ``tabular`` or a folder): a task that is not written in a tokenizer
    yet (``HFVocabulary``) is encoded again with that of the folder, and every end token of the folder's generation
    settings ends a completion. A folder without a tokenizer takes the task as it is.

    :raises ValueError: the task cannot be encoded again, or is written in a tokenizer with other tokens.
    """
    if not Path(model).is_dir() or model in ("tiny", "tabular"):
        return task
    vocab = task.vocab
    own = HFVocabulary.from_folder(model) if has_tokenizer(model) else None
    if isinstance(vocab, HFVocabulary):
        if own is not None and not _same_tokens(vocab.tokenizer, own.tokenizer):
            raise ValueError(f"model: expected prompts in the tokens of {model!r}, got those of another tokenizer; use "
                             f"HFVocabulary.from_folder({model!r})")  # fmt: skip
        more = [token for token in folder_ends(model) if 0 <= token < vocab.size and token not in vocab.ends]
        if more:
            longer: Any = copy.copy(task)
            longer.vocab = vocab.with_ends(more)
            return cast(TextTask, longer)
        return task
    if own is None:
        print(f"[ccrl] {model} has no tokenizer: the model reads the numbers that {task.name} gives its tokens, right "
              "for a model trained on them; others need their tokenizer in the folder", flush=True)  # fmt: skip
        return task
    if not hasattr(task, "reencoded"):
        raise ValueError(f"model: {model!r} has a tokenizer, and the task {task.name!r} has tokens of its own "
                         f"({type(vocab).__name__}), which mean something else to it; take model='tiny', or a task "
                         "with a method reencoded(vocab)")  # fmt: skip
    fitted: TextTask = task.reencoded(own)
    return fitted


def _same_tokens(given: Any, folder: Any) -> bool:
    """Whether all tokens of the folder's tokenizer have the same numbers in the one that was given; more are fine."""
    if not hasattr(given, "get_vocab"):
        return True
    known: dict[str, int] = given.get_vocab()
    return all(known.get(token) == number for token, number in folder.get_vocab().items())


class Snapshot(nn.Module):
    """A policy with its trained parameters as they were: the reference of a model with adapters, for the memory of the
    adapters. The rest of the policy is shared with it.

    Not the model with its adapters off: after a supervised phase that is the policy before it.
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self._policy = (policy,)  # in a tuple: its parameters are the policy's, not this module's
        trained = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in trained]
        for i, (_, p) in enumerate(trained):  # names with dots cannot be buffers
            self.register_buffer(f"p{i}", p.detach().clone())

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the policy as it is now."""
        live = dict(self._policy[0].named_parameters())
        for name, kept in zip(self._names, self.buffers()):
            kept.copy_(live[name])

    def forward(self, batch: Data, want: frozenset[str]) -> Outputs:
        """As the policy's, at the parameters that were taken."""
        values = dict(zip(self._names, self.buffers()))
        found: dict[str, Tensor] = functional_call(self._policy[0], values, (batch, want))
        return found

    @property
    def temperature(self) -> float:
        """The policy's."""
        return float(self._policy[0].temperature)  # type: ignore[arg-type]

    def start(self, prompts: Prompts, question: Tensor, steps: int) -> tuple[Any, Tensor]:
        """As the policy's, at the parameters that were taken; so ``step``."""
        with self._in_place() as policy:
            found: tuple[Any, Tensor] = policy.start(prompts, question, steps)
        return found

    def step(self, state: Any, token: Tensor, present: Tensor) -> tuple[Any, Tensor]:
        with self._in_place() as policy:
            found: tuple[Any, Tensor] = policy.step(state, token, present)
        return found

    def keep(self, state: Any, rows: Tensor) -> Any:
        return self._policy[0].keep(state, rows)  # type: ignore[operator]

    @contextmanager
    def _in_place(self) -> Iterator[Any]:
        """The policy, with the tensors of its trained parameters exchanged for those that were taken."""
        live = dict(self._policy[0].named_parameters())
        pairs = [(live[name], kept, live[name].data) for name, kept in zip(self._names, self.buffers())]
        for p, kept, _ in pairs:
            p.data = kept
        try:
            yield self._policy[0]
        finally:
            for p, _, own in pairs:
                p.data = own
