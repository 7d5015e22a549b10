"""A causal language model as a policy: one forward pass evaluates a whole batch of completions.

The batch is the suite's ``[T, B]``: tokens are the column ``action``, prompts ``[B, P]`` and their mask are sequence
columns, ``present`` says which tokens are in the context and ``valid`` which are trained on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ccrl.data import Data, Unit
from ccrl.estimators.terms import Outputs
from ccrl.llm.memory import checkpoint_layers
from ccrl.llm.padding import buckets
from ccrl.llm.task import Prompts

__all__ = [
    "CHUNK",
    "CHUNK_FROM",
    "OUTPUTS",
    "CausalLMPolicy",
    "TokenPolicy",
    "backbone",
    "check_positions",
    "collision_of",
    "entropy_of",
    "model_positions",
    "positions_of",
    "token_outputs",
]

OUTPUTS = frozenset({"log_prob", "entropy", "topk_index", "topk_log_prob", "sum_pi2", "log_probs", "hidden"})
"""What a token policy can compute: of the chosen token ``log_prob`` ``[T, B]``, of the whole distribution ``entropy``
(nats), ``sum_pi2`` ``[T, B]``, the ``k`` largest ``topk_*`` ``[T, B, k]``, all of it ``log_probs`` ``[T, B, V]`` (small
vocabularies only), and ``hidden`` ``[T, B, D]``."""


SHARE = 128
"""A batch is evaluated in one more pass (prompts apart from completions, short completions apart from long ones) where
that saves so many tokens: a pass has a cost of its own. On a CPU with the tiny model it is that of some 80 tokens."""

CHUNK_FROM = 16_384
"""Tokens of a vocabulary from which logits are made in pieces: they are then most of an update's memory."""
CHUNK = 256
"""Tokens per piece."""

Run = Callable[..., tuple[Tensor, Any]]
"""From the number of last positions to keep and a model's inputs: values ``[B, keep, X]`` there, and the cache."""


class TokenPolicy(Protocol):
    """What the sampler needs of a policy over tokens."""

    def start(self, prompts: Prompts, question: Tensor, steps: int) -> tuple[Any, Tensor]:
        """State and the logits ``[N, V]`` of the first token, for ``N`` completions of ``prompts[question]``."""
        ...

    def step(self, state: Any, token: Tensor, present: Tensor) -> tuple[Any, Tensor]:
        """After ``token`` ``[N]`` int64 (``present`` ``[N]`` float: whether it is in the context) the next logits."""
        ...

    def keep(self, state: Any, rows: Tensor) -> Any:
        """The state of some rows: finished completions are dropped from the computation."""
        ...


def entropy_of(log_probs: Tensor) -> Tensor:
    """Nats ``[...]`` of distributions ``[..., V]``."""
    # a forbidden token has log-probability -inf and probability 0, and 0 * inf is not 0
    return -torch.where(log_probs.isinf(), 0.0, log_probs.exp() * log_probs).sum(-1)


def collision_of(log_probs: Tensor) -> Tensor:
    """Sums of squared probabilities ``[...]`` of distributions ``[..., V]``."""
    return log_probs.exp().square().sum(-1)


def token_outputs(logits: Tensor, token: Tensor, want: frozenset[str], temperature: float, k: int) -> dict[str, Tensor]:
    """``OUTPUTS`` (all but ``hidden``) from ``logits`` ``[..., V]`` and tokens ``[...]``, in float32 at least."""
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    scaled = logits if temperature == 1.0 else logits / temperature
    log_probs = scaled.log_softmax(-1)
    out: dict[str, Tensor] = {}
    chosen = token.unsqueeze(-1)
    if "log_prob" in want:
        out["log_prob"] = log_probs.gather(-1, chosen).squeeze(-1)
    if "entropy" in want:
        out["entropy"] = entropy_of(log_probs)
    if "sum_pi2" in want:
        out["sum_pi2"] = collision_of(log_probs)
    if want & {"topk_index", "topk_log_prob"}:
        top = log_probs.topk(min(k, log_probs.shape[-1]), dim=-1)
        out |= {"topk_index": top.indices, "topk_log_prob": top.values}
    if "log_probs" in want:
        out["log_probs"] = log_probs
    return {name: value for name, value in out.items() if name in want}


def model_positions(model: nn.Module) -> int | None:
    """Positions that a Hugging Face model was made for; None where its settings name no limit."""
    config = _base(model).config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(found := getattr(config, name, None), int):
            return found
    return None


def check_positions(positions: int | None, prompt: int, completion: int, which: str) -> None:
    """Refuse a model with too few positions; the last token of a completion is never read.

    :raises ValueError: a prompt and a completion of so many tokens are more than ``positions``.
    """
    if positions is not None and prompt + completion - 1 > positions:
        raise ValueError(f"model: expected at least {prompt + completion - 1} positions for {which} ({prompt} tokens) "
                         f"and completions of up to {completion} tokens, got a model with {positions}; lower "
                         "max_new_tokens, shorten the prompt or take another model")  # fmt: skip


class CausalLMPolicy(nn.Module):
    """Any Hugging Face ``AutoModelForCausalLM``.

    :param model: the language model; dropout is switched off (a behaviour policy must be what is scored).
    :param temperature: of sampling AND of scoring: ratios compare the distributions that were sampled from.
    :param k: size of ``topk_*``.
    :param logits_chunk_size: tokens per piece of the vocabulary projection; each piece is computed again in the
        backward pass, so memory is ``logits_chunk_size * V`` instead of ``T * B * V``. 0: in one piece. None: ``CHUNK``
        for vocabularies from ``CHUNK_FROM`` tokens up, where the logits are a projection, else in one piece.
    :param vocab_size: tokens that can be chosen, the first ones; None: all that the model has. Models pad their
        vocabularies beyond the tokenizer's: what is padding is neither sampled nor part of any probability.
    :param dtype: matrices are multiplied in float32 or bfloat16; log-probabilities are float32.
    :param gradient_checkpointing: layers are computed again in the backward pass (``ccrl.llm.memory``).
    :raises ValueError: for a temperature that is not positive, a negative chunk, a chunk with a model whose logits are
        more than a projection of its last hidden state, more tokens than the model has, or layers that cannot be
        computed again.
    """

    unit: Unit = "sequence"

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 1.0,
        k: int = 16,
        logits_chunk_size: int | None = None,
        vocab_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature: expected > 0, got {temperature}; greedy decoding is the sampler's "
                             "`deterministic`")  # fmt: skip
        if logits_chunk_size is not None and logits_chunk_size < 0:
            raise ValueError(f"logits_chunk_size: expected None or >= 0, got {logits_chunk_size}")
        self.model = model.eval()
        self.temperature, self.k, self.dtype = temperature, k, dtype
        rows = int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
        if vocab_size is not None and not 1 <= vocab_size <= rows:
            raise ValueError(f"vocab_size: expected 1 to the model's {rows} tokens, got {vocab_size}")
        self.vocab_size = rows if vocab_size is None else vocab_size
        self._padded = self.vocab_size < rows
        self.positions = model_positions(model)
        """Tokens of prompt and completion that the model has positions for; None: no limit."""
        # transformers 5.24 renamed the argument and warns of the old name at every call
        known = inspect.signature(type(_base(model)).forward).parameters
        self._cache = "cache" if "cache" in known else "past_key_values"
        self._shares = _caches().is_shareable(getattr(_try(model, use_cache=True), self._cache, None))
        # the library's flag of models whose masks cover what is reserved and not yet written
        self._blocks = getattr(_base(model), "_can_compile_fullgraph", False)
        if logits_chunk_size and not _is_projection(model):
            raise ValueError(f"logits_chunk_size: the logits of {type(model).__name__} are not its output embedding "
                             "of the last hidden state; use logits_chunk_size=0")  # fmt: skip
        if logits_chunk_size is None:
            logits_chunk_size = CHUNK if rows >= CHUNK_FROM and _is_projection(model) else 0
        self.logits_chunk_size = logits_chunk_size
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            checkpoint_layers(model)

    def train(self, mode: bool = True) -> CausalLMPolicy:
        """Stays in evaluation mode: dropout would make the score disagree with the sample."""
        return super().train(False)

    def outputs(self) -> frozenset[str]:
        return OUTPUTS

    # -- scoring ------------------------------------------------------------------------------------------------------

    def forward(self, batch: Data, want: frozenset[str]) -> Outputs:
        """``want`` of ``OUTPUTS`` ``[T', B, ...]``."""
        return self._evaluate(batch, want, self.temperature)

    def log_prob(self, batch: Data, temperature: float) -> Tensor:
        """``[T', B]``: log-probability of the tokens at another temperature than that of sampling."""
        return self._evaluate(batch, frozenset({"log_prob"}), temperature)["log_prob"]

    def _evaluate(self, batch: Data, want: frozenset[str], temperature: float) -> Outputs:
        tokens = batch["action"].t()
        with self._precision(tokens.device):
            out = self._outputs(batch, tokens, want, temperature)
        return {k: v.transpose(0, 1) for k, v in out.items()}

    def _precision(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _outputs(self, batch: Data, tokens: Tensor, want: frozenset[str], temperature: float) -> dict[str, Tensor]:
        if not self.logits_chunk_size and "hidden" not in want:
            return token_outputs(self._before(batch, self._logits), tokens, want, temperature, self.k)
        hidden = self._before(batch, self._hidden)
        out = self._pieces(hidden, tokens, want - {"hidden"}, temperature)
        return out | {"hidden": hidden} if "hidden" in want else out

    def _before(self, batch: Data, run: Run) -> Tensor:
        """What ``run`` gives ``[B, T, X]`` at the token before each token of a completion; 0 beyond the longest of a
        bucket.

        Rows with the same prompt share its evaluation: one pass over the distinct prompts, one over the completions
        with the prompts' keys and values, through which gradients flow. The numbers are those of one pass over
        everything, which remains where the first saves fewer than ``SHARE`` tokens (prompts mostly distinct, as in
        small shuffled minibatches) and for models whose cache is more than keys and values. Completions of similar
        length are evaluated together (``buckets``), so that less of what is evaluated is padding.
        """
        tokens, prompt, present = batch["action"].t(), batch["prompt"], batch["present"].t().long()
        mask = batch["prompt_valid"].long()
        attention = torch.cat([mask, present], 1)
        position, width = positions_of(attention), prompt.shape[1]
        pieces = buckets(present, SHARE)
        shared = self._shared_prompts(prompt, mask, run) if pieces[-1][1] > 1 else None
        found: list[Tensor] = []
        for rows, longest in pieces:
            here: Tensor | slice = slice(None) if rows is None else rows
            end = width + longest - 1  # the last token of a completion is not read
            if shared is None:
                ids = torch.cat([prompt[here], tokens[here, : longest - 1]], 1)
                out, _ = run(longest, input_ids=ids, attention_mask=attention[here, :end],
                             position_ids=position[here, :end], use_cache=False)  # fmt: skip
            else:
                first, cache, row = shared
                out = first.index_select(0, row[here])
                if longest > 1:
                    rest, _ = run(
                        longest - 1, input_ids=tokens[here, : longest - 1], attention_mask=attention[here, :end],
                        position_ids=position[here, width:end], use_cache=True,
                        **{self._cache: _caches().repeated(cache, row[here])},
                    )  # fmt: skip
                    out = torch.cat([out, rest], 1)
            found.append(F.pad(out, (0, 0, 0, tokens.shape[1] - longest)))
        if len(found) == 1:
            return found[0]
        return torch.cat(found).index_select(0, torch.cat([rows for rows, _ in pieces if rows is not None]).argsort())

    def _shared_prompts(self, prompt: Tensor, mask: Tensor, run: Run) -> tuple[Tensor, Any, Tensor] | None:
        """Values at the last token of the distinct prompts ``[D, 1, X]``, their cache, and ``[B]`` which of them each
        row has; None where sharing does not pay or cannot be."""
        rows, width = prompt.shape
        # a layer that is computed again would write its keys into the cache again
        shares = self._shares and not (self.gradient_checkpointing and torch.is_grad_enabled())
        if not shares or (rows - 1) * width < SHARE:
            return None
        distinct, row = torch.unique(torch.cat([prompt, mask], 1), dim=0, return_inverse=True)
        if (rows - distinct.shape[0]) * width < SHARE:
            return None
        ids, mask = distinct.split(width, 1)
        first, cache = run(1, input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=True)
        return first, cache, row

    def _logits(self, keep: int, **inputs: Any) -> tuple[Tensor, Any]:
        """A ``Run`` of the whole model: logits."""
        out = self.model(**inputs, logits_to_keep=keep)
        return self._real(out.logits), getattr(out, self._cache, None)

    def _hidden(self, keep: int, **inputs: Any) -> tuple[Tensor, Any]:
        """A ``Run`` of the model below its vocabulary projection: last hidden states."""
        out = backbone(self.model)(**inputs)
        return out.last_hidden_state[:, -keep:], getattr(out, self._cache, None)

    def _pieces(self, hidden: Tensor, tokens: Tensor, want: frozenset[str], temperature: float) -> dict[str, Tensor]:
        """``[B, T, ...]`` from ``hidden`` ``[B, T, D]``, ``logits_chunk_size`` tokens at a time."""
        head: Callable[[Tensor], Tensor] = self.model.get_output_embeddings()  # type: ignore[operator]
        names = sorted(want)

        def piece(states: Tensor, token: Tensor) -> tuple[Tensor, ...]:
            found = token_outputs(self._real(head(states)), token, want, temperature, self.k)
            return tuple(found[name] for name in names)

        flat, token = hidden.flatten(0, 1), tokens.flatten()
        size = self.logits_chunk_size or flat.shape[0]
        again = torch.is_grad_enabled() and flat.shape[0] > size  # a single piece is no larger for being kept
        rows = [
            checkpoint(piece, states, chosen, use_reentrant=False) if again else piece(states, chosen)
            for states, chosen in zip(torch.split(flat, size), torch.split(token, size))
        ]
        return {
            name: (whole := torch.cat([row[i] for row in rows])).view(*tokens.shape, *whole.shape[1:])
            for i, name in enumerate(names)
        }

    def _real(self, logits: Tensor) -> Tensor:
        """Without those of padding."""
        return logits[..., : self.vocab_size] if self._padded else logits

    # -- decoding -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def start(self, prompts: Prompts, question: Tensor, steps: int) -> tuple[Any, Tensor]:
        """One prefill per question, shared by its completions.

        :raises ValueError: the model has not so many positions.
        """
        check_positions(self.positions, prompts.tokens.shape[1], steps, "the longest of the prompts")
        mask = prompts.valid.long()
        position = positions_of(mask)
        with self._precision(mask.device):
            out = self.model(
                input_ids=prompts.tokens, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1
            )
        cache = getattr(out, self._cache)
        cache.reorder_cache(question)
        block = _caches().make_blocks(cache) if self._blocks and mask.device.type == "cpu" else 1
        attention = F.pad(mask, (0, steps + block))[question]
        return (cache, attention, position[question, -1], block), self._real(out.logits)[question, -1]

    @torch.inference_mode()
    def step(self, state: Any, token: Tensor, present: Tensor) -> tuple[Any, Tensor]:
        cache, attention, position, block = state
        position = position + present.long()
        seen = cache.get_seq_length()
        attention[:, seen] = present.long()
        length = (seen // block + 1) * block  # of the cache with this token in it
        with self._precision(token.device):
            out = self.model(
                input_ids=token.unsqueeze(1), attention_mask=attention[:, :length],
                position_ids=position.unsqueeze(1), use_cache=True, **{self._cache: cache},
            )  # fmt: skip
        return (cache, attention, position, block), self._real(out.logits[:, -1])

    @torch.inference_mode()
    def keep(self, state: Any, rows: Tensor) -> Any:
        cache, attention, position, block = state
        cache.reorder_cache(rows)
        return cache, attention[rows], position[rows], block


def positions_of(attention: Tensor) -> Tensor:
    """Of tokens ``[B, L]``: how many before them are in the context."""
    return (attention.cumsum(1) - 1).clamp_min(0)


def backbone(model: nn.Module) -> nn.Module:
    """The model below its vocabulary projection, also under a peft wrapper (whose adapters sit inside it)."""
    inner = _base(model)
    found: nn.Module = getattr(inner, inner.base_model_prefix)
    return found


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


@torch.no_grad()
def _try(model: nn.Module, **options: Any) -> Any:
    """Output for four tokens: what a model does is found by trying, as its switches have many names."""
    device = next(model.parameters()).device
    return model(input_ids=torch.arange(4, device=device).unsqueeze(0), **options)


@torch.no_grad()
def _is_projection(model: nn.Module) -> bool:
    """Some models scale or cap their logits."""
    hidden, logits = _try(backbone(model)).last_hidden_state, _try(model).logits
    return torch.allclose(model.get_output_embeddings()(hidden), logits, rtol=1e-3, atol=1e-3)  # type: ignore[operator]


def _caches() -> Any:
    """On demand: it subclasses a class of an optional package."""
    from ccrl.llm import cache

    return cache
