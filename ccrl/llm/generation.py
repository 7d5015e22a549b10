"""The verb ``generate`` by a server: completions of a training that vLLM (or what speaks its protocol) writes.

The other verbs stay as they are. What differs from the model in the process, and how it is said:

* **Which weights write.** A server has the weights that it was given. ``weights`` names how trained ones reach it; none
  is assumed. ``rollout/server_gap`` is the mean absolute difference, in nats per token, between the server's
  log-probabilities and those of the policy that is about to be updated: the rounding of the server's number format
  where both have the same weights, more where the server's are older.
* **What a ratio compares.** ``log_prob`` is what the server said, so that ratios are those of the policy that wrote.
* **Exactness.** Draws are seeded, one seed per prompt from the stream of completions; whether a server repeats them is
  its own affair, and a resumed run is not bit for bit the run that would have gone on.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ccrl import registry
from ccrl.data import Data
from ccrl.llm.export import export_model
from ccrl.llm.policy import TokenPolicy
from ccrl.llm.sampler import Completions, TokenCollector
from ccrl.llm.served import CompletionsClient, ServerError, Written
from ccrl.llm.task import ConversationTask, Prompts, TextTask
from ccrl.llm.vocabulary import end_tokens
from ccrl.settings import Count, Positive, checked

__all__ = ["ServedCollector"]

CHECKED = 8
"""Completions of a rollout whose log-probabilities are compared: a forward pass of their own."""
AT_ONCE = 32
"""Requests under way at a time, one per prompt; the server batches them."""


class ServedCollector(TokenCollector):
    """A collector whose ``generate`` asks a server. Its policy is set once (``policy``): no other one is served.

    Args:
        client: of the server.
        weights: how trained weights reach the server. ``reload``: the model, adapters merged, is written into
            ``folder``, from which the server was started, and the server is told to read it again and to forget what it
            cached (vLLM's ``/collective_rpc`` and ``/reset_prefix_cache``, which it has with
            ``VLLM_SERVER_DEV_MODE=1``). ``module:function``: the same folder, then ``function(folder, url, model)``.
            ``none``: nothing is sent; samples are those of a policy that stays.
        folder: of ``weights``; written anew at every sending.
        every: weights are sent once the policy has changed so many times since the last sending (and at the start).
        tolerance: right after a sending the gap may be this large, in nats per token.
        **options: see :class:`~ccrl.llm.sampler.TokenCollector`.

    Raises:
        ValueError: a task that replies or has completions of a fixed length, columns that a server does not send, no or
            a superfluous folder.
    """

    resume_note = (
        "completions come from a server: a resumed run sends it the weights again, and is not bit for bit the run that "
        "would have gone on"
    )

    @checked
    def __init__(
        self,
        task: TextTask,
        client: CompletionsClient,
        *,
        weights: str,
        folder: Path | None = None,
        every: Count = 1,
        tolerance: Positive = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(task, **options)
        if isinstance(task, ConversationTask):
            raise ValueError(
                f"generation: expected a task of one turn, got {task.name!r}, whose environment replies inside a "
                "completion; leave generation out"
            )
        if self._fixed:
            raise ValueError(f"generation: expected completions with an end, got {task.name!r}, whose have a fixed "
                             "length; leave generation out")  # fmt: skip
        if self._fields:
            raise ValueError("generation: expected a method that reads log-probabilities of the chosen tokens alone, "
                             "got one that reads entropies, which a server does not send")  # fmt: skip
        if (weights == "none") != (folder is None):
            raise ValueError(f"generation_folder: expected {'none' if weights == 'none' else 'a folder'} with "
                             f"generation_weights {weights!r}, got {folder}")  # fmt: skip
        if folder is not None and folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
            raise ValueError(f"generation_folder: expected a model's folder or an empty one, got {folder}, which has "
                             "other files")  # fmt: skip
        self.client, self.folder, self.every, self.tolerance = client, folder, every, tolerance
        self.sent = 0
        """How many times weights were sent."""
        self.policy: Any = None
        self._deliver = _route(weights)
        self._seen: tuple[float, ...] | None = None
        self._changes = 0

    def generate(
        self, policy: TokenPolicy, prompts: Prompts, question: Tensor, *, tag: str = "on", deterministic: bool = False,
        generator: torch.Generator | None = None,
    ) -> Completions:  # fmt: skip
        """As the base class; the server's completions.

        Raises:
            ValueError: another policy than the one that is trained, or the most probable tokens.
            ServerError: see there; tokens that the vocabulary has not, a completion that ended without an end token, or
                log-probabilities that are not those of the weights that were sent.
        """
        if self.policy is None or policy is not self.policy:
            raise ValueError("generation: expected completions of the policy that is trained, got those of "
                             "another (an earlier one, a reference), which the server has not")  # fmt: skip
        if deterministic:
            raise ValueError("generation: expected sampled completions, got a request for the most probable tokens")
        fresh = self._send()
        prompts, buffer = prompts.to(self.device), self._cleared(tag, question.shape[0])
        columns: dict[int, list[int]] = {}
        for n, q in enumerate(question.tolist()):
            columns.setdefault(q, []).append(n)
        source = self.generator if generator is None else generator
        seeds = torch.randint(2**31 - 1, (len(columns),), generator=source, device=source.device).tolist()
        rows = {q: prompts.tokens[q][prompts.valid[q] > 0].tolist() for q in columns}

        def ask(q: int, seed: int) -> list[Written]:
            return self.client.complete(
                [rows[q]], n=len(columns[q]), max_tokens=self.steps, top_p=self.top_p, top_k=self.top_k, seed=seed,
                stop_tokens=end_tokens(self.task.vocab),
            )[0]  # fmt: skip

        with ThreadPoolExecutor(min(AT_ONCE, len(columns))) as pool:
            found = list(pool.map(ask, columns, seeds))
        present = torch.zeros(self.steps, question.shape[0])
        for places, several in zip(columns.values(), found):
            for n, written in zip(places, several):
                self._write(buffer, present, n, written)
        valid = present.to(self.device)
        completions = Completions(buffer, prompts, question, valid, valid.clone())
        self._compare(completions, fresh)
        return completions

    def _write(self, buffer: Any, present: Tensor, n: int, written: Written) -> None:
        tokens, size, ends = written.tokens, self.task.vocab.size, end_tokens(self.task.vocab)
        if not 0 < len(tokens) <= self.steps or not all(0 <= token < size for token in tokens):
            raise ServerError(
                f"{self.client.url}: expected 1 to {self.steps} tokens below {size}, got {tokens}; is it the same "
                "model and tokenizer?"
            )
        ended = tokens[-1] in ends
        if written.finished and not ended:
            raise ServerError(
                f"{self.client.url}: expected a finished completion to end with one of the end tokens {list(ends)}, "
                f"got {tokens[-1]}; start the server with the end tokens of the model's folder"
            )
        length = len(tokens)
        buffer.action[:length, n] = torch.tensor(tokens, device=self.device)
        buffer.extra["log_prob"][:length, n] = torch.tensor(written.log_probs, device=self.device)
        present[:length, n] = 1.0
        buffer.terminated[length - 1, n] = ended
        buffer.truncated[length - 1, n] = not ended

    def _send(self) -> bool:
        """Give the server the weights where it is due; whether it has the policy's own now, as far as we know."""
        assert self.policy is not None
        # fused optimisers leave no mark on what they write, so the weights themselves say whether they moved
        sums = [p.detach().double().sum() for p in self.policy.parameters() if p.requires_grad]
        version = tuple(torch.stack(sums).tolist())
        self._changes += self._seen is not None and version != self._seen
        self._seen = version
        if self._deliver is None:
            return False
        if not self.sent or self._changes >= self.every:
            assert self.folder is not None
            _written_anew(self.policy, self.task, self.folder, check=not self.sent)
            self._deliver(self.folder, self.client)
            self.sent, self._changes = self.sent + 1, 0
        return self._changes == 0

    @torch.no_grad()
    def _compare(self, written: Completions, fresh: bool) -> None:
        some = torch.arange(min(CHECKED, written.question.shape[0]), device=self.device)
        asked, longest = written.question[some], int(written.length[some].max())
        valid = written.valid[:longest, some]
        columns = {
            "action": written.buffer.action[:longest, some], "valid": valid, "present": valid,
            "prompt": written.prompts.tokens[asked], "prompt_valid": written.prompts.valid[asked],
        }  # fmt: skip
        batch = Data(columns, raw=frozenset(), sequence=frozenset({"prompt", "prompt_valid"}))
        assert self.policy is not None
        ours = self.policy(batch, frozenset({"log_prob"}))["log_prob"]
        theirs = written.buffer.extra["log_prob"][:longest, some]
        gap = float(((ours - theirs).abs() * valid).sum() / valid.sum())
        self.log |= {"rollout/server_gap": gap, "rollout/server_behind": self._changes, "time/server_sent": self.sent}
        if fresh and gap > self.tolerance:
            raise ServerError(
                f"{self.client.url}: expected log-probabilities within {self.tolerance:g} nats a token of the weights "
                f"that were sent, got {gap:.3g}; the server did not take them ({self.folder}), or gives "
                "log-probabilities of something else than the whole distribution at temperature 1"
            )


def _route(weights: str) -> Callable[[Path, CompletionsClient], None] | None:
    if weights == "none":
        return None
    if weights == "reload":
        return _reload
    function = registry.load_function(weights, "generation_weights", "none, reload or module:function")
    return lambda folder, client: function(folder, client.url, client.model)


def _reload(folder: Path, client: CompletionsClient) -> None:
    client.tell("collective_rpc", {"method": "reload_weights"})
    client.tell("reset_prefix_cache", {})  # what was computed with the old weights


def _written_anew(policy: nn.Module, task: TextTask, folder: Path, check: bool) -> None:
    """The policy's files in ``folder``, in the place of an earlier model's; other files stay."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as beside:
        export_model(policy, task.vocab, Path(beside), check=check)
        written = {path.name for path in Path(beside).iterdir()}
        for old in folder.glob("model*.safetensors*"):
            if old.name not in written:  # another number of pieces
                old.unlink()
        for name in sorted(written):
            os.replace(Path(beside) / name, folder / name)
