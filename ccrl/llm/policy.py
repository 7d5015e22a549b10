"""A causal language model as a policy: one forward pass evaluates a whole batch of completions.

The batch is the suite's ``[T, B]``: tokens are the column ``action``, prompts ``[B, P]`` and their mask are sequence
columns, ``present`` says which tokens are in the context and ``valid`` which are trained on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ccrl.data import Data, Unit
from ccrl.estimators.terms import Evaluation
from ccrl.llm.task import Prompts

__all__ = ["OUTPUTS", "CausalLMPolicy", "TokenPolicy", "entropy_of", "token_outputs"]

OUTPUTS = frozenset({
    "log_prob", "entropy", "log_prob_second", "topk_index", "topk_log_prob", "sum_pi2", "log_probs", "hidden",
})  # fmt: skip
"""What a token policy can compute: of the chosen token ``[T, B]`` ``log_prob`` and ``log_prob_second`` (at the second
temperature), of the whole distribution ``entropy`` (nats), ``sum_pi2`` ``[T, B]``, the ``k`` largest ``topk_*``
``[T, B, k]``, all of it ``log_probs`` ``[T, B, V]`` (small vocabularies only), and ``hidden`` ``[T, B, D]``."""


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


def token_outputs(
    logits: Tensor, token: Tensor, want: frozenset[str], temperature: float, second: float, k: int
) -> dict[str, Tensor]:
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
        out["sum_pi2"] = log_probs.exp().square().sum(-1)
    if "log_prob_second" in want:
        out["log_prob_second"] = (logits / second).log_softmax(-1).gather(-1, chosen).squeeze(-1)
    if want & {"topk_index", "topk_log_prob"}:
        top = log_probs.topk(min(k, log_probs.shape[-1]), dim=-1)
        out |= {"topk_index": top.indices, "topk_log_prob": top.values}
    if "log_probs" in want:
        out["log_probs"] = log_probs
    return {name: value for name, value in out.items() if name in want}


class CausalLMPolicy(nn.Module):
    """Any Hugging Face ``AutoModelForCausalLM``.

    :param model: the language model; dropout is switched off (a behaviour policy must be what is scored).
    :param temperature: of sampling AND of scoring: ratios compare the distributions that were sampled from.
    :param second_temperature: of ``log_prob_second``.
    :param k: size of ``topk_*``.
    :param chunk: tokens per piece of the vocabulary projection; each piece is computed again in the backward pass, so
        memory is ``chunk * V`` instead of ``T * B * V``. None: in one piece.
    :raises ValueError: for a temperature or chunk that is not positive, or a chunk with a model whose logits are more
        than a projection of its last hidden state.
    """

    unit: Unit = "sequence"

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float = 1.0,
        second_temperature: float = 1.0,
        k: int = 16,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        if temperature <= 0 or second_temperature <= 0:
            raise ValueError(f"temperature: expected > 0, got {temperature}, {second_temperature}; greedy decoding is "
                             "the sampler's `deterministic`")  # fmt: skip
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk: expected None or >= 1, got {chunk}")
        self.model = model.eval()
        self.temperature, self.second_temperature, self.k, self.chunk = temperature, second_temperature, k, chunk
        # transformers 5.24 renamed the argument and warns of the old name at every call
        known = inspect.signature(type(_base(model)).forward).parameters
        self._cache = "cache" if "cache" in known else "past_key_values"
        if chunk is not None and not _is_projection(model):
            raise ValueError(f"chunk: the logits of {type(model).__name__} are not its output embedding of the last "
                             "hidden state; use chunk=None")  # fmt: skip

    def train(self, mode: bool = True) -> CausalLMPolicy:
        """Stays in evaluation mode: dropout would make the score disagree with the sample."""
        return super().train(False)

    def outputs(self) -> frozenset[str]:
        return OUTPUTS

    @property
    def vocab_size(self) -> int:
        return int(self.model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]

    # -- scoring ------------------------------------------------------------------------------------------------------

    def forward(self, batch: Data, want: frozenset[str]) -> Evaluation:
        """``want`` of ``OUTPUTS`` ``[T', B, ...]``."""
        tokens, present = batch["action"], batch["present"]
        prompt, mask = batch["prompt"], batch["prompt_valid"]
        steps, width = tokens.shape[0], prompt.shape[1]
        ids = torch.cat([prompt, tokens.t()], 1)
        attention = torch.cat([mask, present.t().to(mask.dtype)], 1).long()
        position = (attention.cumsum(1) - 1).clamp_min(0)
        inputs = {"input_ids": ids, "attention_mask": attention, "position_ids": position, "use_cache": False}
        if self.chunk is None and "hidden" not in want:
            # logits at position i are of token i + 1
            logits = self.model(**inputs, logits_to_keep=steps + 1).logits[:, :-1]
            return {k: v.transpose(0, 1) for k, v in self._outputs(logits, tokens.t(), want).items()}
        hidden = self._hidden(**inputs)[:, width - 1 : -1]
        out = self._pieces(hidden, tokens.t(), want - {"hidden"})
        if "hidden" in want:
            out["hidden"] = hidden
        return {k: v.transpose(0, 1) for k, v in out.items()}

    def _outputs(self, logits: Tensor, tokens: Tensor, want: frozenset[str]) -> dict[str, Tensor]:
        return token_outputs(logits, tokens, want, self.temperature, self.second_temperature, self.k)

    def _hidden(self, **inputs: Any) -> Tensor:
        hidden: Tensor = _backbone(self.model)(**inputs).last_hidden_state
        return hidden

    def _pieces(self, hidden: Tensor, tokens: Tensor, want: frozenset[str]) -> dict[str, Tensor]:
        """``[B, T, ...]`` from ``hidden`` ``[B, T, D]``, ``chunk`` tokens at a time."""
        head: Callable[[Tensor], Tensor] = self.model.get_output_embeddings()  # type: ignore[operator]
        names = sorted(want)

        def piece(states: Tensor, token: Tensor) -> tuple[Tensor, ...]:
            found = self._outputs(head(states), token, want)
            return tuple(found[name] for name in names)

        flat, token = hidden.flatten(0, 1), tokens.flatten()
        size = flat.shape[0] if self.chunk is None else self.chunk
        rows = [
            checkpoint(piece, states, chosen, use_reentrant=False) if torch.is_grad_enabled() else piece(states, chosen)
            for states, chosen in zip(torch.split(flat, size), torch.split(token, size))
        ]
        return {
            name: (whole := torch.cat([row[i] for row in rows])).view(*tokens.shape, *whole.shape[1:])
            for i, name in enumerate(names)
        }

    # -- decoding -----------------------------------------------------------------------------------------------------

    def start(self, prompts: Prompts, question: Tensor, steps: int) -> tuple[Any, Tensor]:
        """One prefill per question, shared by its completions."""
        mask = prompts.valid.long()
        position = (mask.cumsum(1) - 1).clamp_min(0)
        out = self.model(
            input_ids=prompts.tokens, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1
        )
        cache = getattr(out, self._cache)
        cache.batch_select_indices(question)
        attention = torch.cat([mask, mask.new_ones(mask.shape[0], steps)], 1)[question]
        return (cache, attention, position[question, -1]), out.logits[question, -1]

    def step(self, state: Any, token: Tensor, present: Tensor) -> tuple[Any, Tensor]:
        cache, attention, position = state
        position = position + present.long()
        seen = cache.get_seq_length()
        attention[:, seen] = present.long()
        out = self.model(
            input_ids=token.unsqueeze(1), attention_mask=attention[:, : seen + 1], position_ids=position.unsqueeze(1),
            use_cache=True, **{self._cache: cache},
        )  # fmt: skip
        return (cache, attention, position), out.logits[:, -1]

    def keep(self, state: Any, rows: Tensor) -> Any:
        cache, attention, position = state
        cache.batch_select_indices(rows)
        return cache, attention[rows], position[rows]


def _backbone(model: nn.Module) -> nn.Module:
    """The model below its vocabulary projection, also under a peft wrapper (whose adapters sit inside it)."""
    inner = _base(model)
    found: nn.Module = getattr(inner, inner.base_model_prefix)
    return found


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


@torch.no_grad()
def _is_projection(model: nn.Module) -> bool:
    """Some models scale or cap their logits: found by trying, as their switches have many names."""
    device = next(model.parameters()).device
    ids = torch.arange(4, device=device).unsqueeze(0)
    hidden = _backbone(model)(input_ids=ids).last_hidden_state
    logits: Tensor = model(input_ids=ids).logits
    return torch.allclose(model.get_output_embeddings()(hidden), logits, rtol=1e-3, atol=1e-3)  # type: ignore[operator]
