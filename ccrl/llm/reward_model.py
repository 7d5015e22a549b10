"""Models that say what a completion is worth, beside the task's verifier.

What they say is a derived column, never ``reward``, ``episode_reward`` or ``reward_components``: those are facts, what
the verifier said. The recipe names the column that its advantage reads:

    def stages(self):
        self.judge = ModelReward(ClassifierReward.from_folder("judge", self.vocab), "shaped_episode_reward")
        return (self.judge, GroupBaseline("shaped_episode_reward", scale="std", single="zero"))

An attribute of the recipe moves to its device and is saved with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ccrl.data import Data, tree_map
from ccrl.llm.policy import model_positions
from ccrl.llm.vocabulary import Vocabulary
from ccrl.packages import require

__all__ = ["ClassifierReward", "ModelReward", "RewardModel", "TextReward"]

FACTS = ("reward", "episode_reward", "reward_components")


class RewardModel(Protocol):
    """A module that judges completions."""

    @property
    def device(self) -> torch.device:
        """Where it wants its micro-batches."""
        ...

    def __call__(self, batch: Data) -> Tensor:
        """Rewards ``[B]`` of whole completions, or ``[T', B]`` of their tokens, of a micro-batch ``[T', B]``."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


class ModelReward(nn.Module):
    """Stage: the derived column ``column`` is ``weight`` times what a reward model says, plus the column ``base``.

    ``[N]`` of a model of completions, ``[T, N]`` of one of tokens, where it is 0 on steps that are not present.

    :param model: see ``RewardModel``; a ``torch.nn.Module``, whose state is saved with the recipe that has the stage.
    :param column: what is derived; the column that the recipe's advantage reads.
    :param base: added to it, such as ``episode_reward``; None: nothing.
    :param microbatch: completions per call of the model; None: all at once.
    :raises ValueError: for the name of a fact, a weight that is not finite or 0, or a microbatch below 1.
    :raises TypeError: for a model that is no module.
    """

    def __init__(
        self, model: RewardModel, column: str = "shaped_episode_reward", *, base: str | None = None,
        weight: float = 1.0, microbatch: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, whose state is saved, got {type(model).__name__}")
        if column in FACTS:
            raise ValueError(f"column: expected a name of its own, got the fact {column!r}; take shaped_episode_reward")
        if not math.isfinite(weight) or weight == 0.0:
            raise ValueError(f"weight: expected a finite number other than 0, got {weight}")
        if microbatch is not None and microbatch < 1:
            raise ValueError(f"microbatch: expected None or >= 1, got {microbatch}")
        self.model: Any = model
        self.column, self.base, self.weight, self.microbatch = column, base, weight, microbatch

    @torch.no_grad()
    def forward(self, data: Data) -> Data:
        """:raises FloatingPointError: if a reward is not finite; ``ValueError`` for one of another shape."""
        home, found = data["valid"].device, list[Tensor]()
        for piece in data.microbatches(self.microbatch):
            said: Tensor = self.model(_on(piece, self.model.device)).to(home)
            if said.shape not in (piece.shape, piece.shape[1:]):
                raise ValueError(f"{type(self.model).__name__}: expected rewards [{piece.shape[1]}] of completions or "
                                 f"{list(piece.shape)} of tokens, got {list(said.shape)}")  # fmt: skip
            found.append(torch.where(piece["present"] > 0, said, 0.0) if said.dim() == 2 else said)
        said = self.weight * torch.cat(found, -1).float()
        if not bool(said.isfinite().all()):
            bad = int((~said.isfinite()).view(-1, said.shape[-1]).any(0).nonzero()[0])
            raise FloatingPointError(f"{type(self.model).__name__}: the reward of completion {bad} is not finite")
        if self.base is not None:
            if data[self.base].shape != said.shape:
                raise ValueError(f"base: expected a column {list(said.shape)}, as the model's rewards are, got "
                                 f"{self.base!r} {list(data[self.base].shape)}")  # fmt: skip
            said = said + data[self.base]
        return data.derive_sequence(**{self.column: said}) if said.dim() == 1 else data.derive(**{self.column: said})


class TextReward(nn.Module):
    """A function of many texts at once as a reward model: ``function(prompts, completions)`` to a number for each.

    :param vocab: of the policy whose tokens are read.
    """

    def __init__(self, function: Callable[[list[str], list[str]], Sequence[float] | Tensor], vocab: Vocabulary) -> None:
        super().__init__()
        self.function, self.vocab = function, vocab

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(self, batch: Data) -> Tensor:
        """``[B]`` float32.

        :raises ValueError: for another number of rewards than of completions.
        """
        prompts, completions = texts(batch, self.vocab)
        found = torch.as_tensor(self.function(prompts, completions), dtype=torch.float32)
        if found.shape != (len(prompts),):
            raise ValueError(f"reward function: expected {len(prompts)} numbers, got {tuple(found.shape)}")
        return found


class ClassifierReward(nn.Module):
    """A Hugging Face sequence classifier with one output, which reads prompt and completion as one text in tokens of
    its own.

    :param model: such a classifier; :param tokenizer: its tokenizer; :param vocab: of the policy that is judged; None
        judges texts alone (``judge``).
    :raises ValueError: for a classifier with several outputs, or a tokenizer without a pad token.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, vocab: Vocabulary | None) -> None:
        super().__init__()
        outputs: Any = model.config
        if outputs.num_labels != 1:
            raise ValueError(f"model: expected a classifier with one output, the reward, got {outputs.num_labels}")
        if tokenizer.pad_token_id is None or outputs.pad_token_id is None:
            raise ValueError("tokenizer: expected one with a pad token, and its number in the model's pad_token_id: "
                             "texts of different lengths are judged together")  # fmt: skip
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.vocab, self.positions = tokenizer, vocab, model_positions(model)

    @classmethod
    def from_folder(cls, directory: str | Path, vocab: Vocabulary | None) -> ClassifierReward:
        """The classifier and its tokenizer in a local folder; nothing is downloaded and no code of the folder runs."""
        transformers = require("transformers", "llm")
        options = {"local_files_only": True, "trust_remote_code": False}
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            str(directory), use_safetensors=True, dtype=torch.float32, **options
        )
        return cls(model, transformers.AutoTokenizer.from_pretrained(str(directory), **options), vocab)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def train(self, mode: bool = True) -> ClassifierReward:
        """Stays in evaluation mode: without dropout."""
        return super().train(False)

    def forward(self, batch: Data) -> Tensor:
        """``[B]`` float32.

        :raises ValueError: a text has more tokens than the model has positions.
        """
        if self.vocab is None:
            raise ValueError("vocab: expected the vocabulary of the policy whose tokens are judged, got none")
        return self.judge([prompt + completion for prompt, completion in zip(*texts(batch, self.vocab))])

    def judge(self, read: list[str]) -> Tensor:
        """Rewards ``[B]`` float32 of whole texts, in one forward pass.

        :raises ValueError: a text has more tokens than the model has positions.
        """
        inputs = self.tokenizer(read, padding=True, return_tensors="pt").to(self.device)
        longest = inputs["input_ids"].shape[1]
        if self.positions is not None and longest > self.positions:
            raise ValueError(f"reward model: expected at least {longest} positions for the longest text, got "
                             f"{self.positions}; shorten prompts or completions")  # fmt: skip
        logits: Tensor = self.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return logits[:, 0].float()


def texts(batch: Data, vocab: Vocabulary) -> tuple[list[str], list[str]]:
    """Prompts and completions of a micro-batch as texts, without special tokens and padding."""
    found: list[list[str]] = []
    for tokens, mask in ((batch["prompt"], batch["prompt_valid"]), (batch["action"].t(), batch["present"].t())):
        rows = zip(tokens.tolist(), (mask > 0).tolist())
        found.append([vocab.decode([token for token, here in zip(*row) if here]) for row in rows])
    return found[0], found[1]


def _on(batch: Data, device: torch.device) -> Data:
    if batch["valid"].device == device:
        return batch
    columns = {name: tree_map(lambda x: x.to(device), batch[name]) for name in batch}
    return Data(columns, raw=batch.raw, sequence=batch.sequence, scalars=batch.scalars)
