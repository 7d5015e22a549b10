"""How fast language models generate and train, beside TRL: ``python scripts/bench llm``."""

from __future__ import annotations

import statistics
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ccrl.packages import check_siblings, require

check_siblings("agents", "envs")

from agents.llm.baselines import GRPO
from ccrl.data import Batching, Data
from ccrl.llm.models import tiny_model
from ccrl.llm.policy import CausalLMPolicy
from ccrl.llm.task import Prompts, Score

__all__ = ["Config", "FixedLength", "main", "peak"]


@dataclass
class Config:
    """Tokens per second of GRPO beside TRL's GRPOTrainer: the same weights, prompts, batch, number of tokens, one
    optimiser step of AdamW per batch, no KL. All completions have the same length (no end token exists).

    generate: completions alone. train: loss, backward pass, clipping, optimiser step. iterate: both, with rewards and
    advantages, between two rows of the log. logged: with the statistics of a row of the log, for which ours takes a
    forward pass after the update and TRL none; by default both log every so many steps. The two sides alternate; a
    ratio is the median of the rounds' ratios. The first round is not counted.
    """

    layers: int = 4
    """Layers of a Llama from scratch."""
    width: int = 128
    """Its hidden size."""
    vocab: int = 64
    """Tokens."""
    n_prompts: int = 16
    """Prompts per batch."""
    group_size: int = 8
    """Completions per prompt."""
    prompt_length: int = 16
    """Tokens per prompt."""
    length: int = 32
    """Tokens per completion."""
    threads: tuple[int, ...] = (1, 2)
    """torch threads."""
    rounds: int = 7
    """Measurements of each side."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: this process's CPU seconds, for one thread on a machine that others use."""
    device: str = "cpu"
    """cpu or cuda."""
    products: Literal["auto", "torch", "onednn"] = "auto"
    """Whose matrix products our side takes; TRL's are PyTorch's."""
    memory: bool = True
    """Also the memory of both sides, and of a loss in pieces of ``logits_chunk_size`` tokens against the plain one."""
    memory_vocab: int = 50_000
    """Its vocabulary."""
    memory_tokens: int = 512
    """Its tokens."""
    logits_chunk_size: int = 64
    """Tokens per piece."""


def main(config: Config) -> None:
    if config.threads:
        _speed(config)
    if config.memory:
        _memory(config)


# -- speed ------------------------------------------------------------------------------------------------------------


class Letters:
    """Tokens without text: no end token among them."""

    def __init__(self, size: int) -> None:
        self.size, self.pad, self.bos, self.eos = size, 0, -1, -1

    def encode(self, text: str) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, tokens: Any) -> str:
        return " ".join(f"t{token}" for token in tokens)


class FixedLength:
    """Score: the share of even tokens."""

    name = "fixed_length"
    components = ("reward",)

    def __init__(self, config: Config) -> None:
        self.vocab, self.max_new_tokens = Letters(config.vocab), config.length
        self.fixed_length, self.prompt_length = config.length, config.prompt_length

    def prompts(self, n: int, generator: torch.Generator | None, split: str = "train") -> Prompts:
        tokens = torch.randint(self.vocab.size, (n, self.prompt_length), generator=generator)
        return Prompts(tokens, torch.ones(tokens.shape), torch.arange(n), (None,) * n)

    def score(self, prompts: Prompts, question: Tensor, tokens: Tensor, length: Tensor) -> Score:
        even = (tokens % 2 == 0).float().mean(0)
        return Score(even.unsqueeze(1), torch.full_like(length, -1))


class Ours:
    """The suite's agent: GRPO's, or another one."""

    def __init__(self, config: Config, agent: Any = None) -> None:
        task = FixedLength(config)
        settings = GRPO.Settings(
            n_prompts=config.n_prompts, group_size=config.group_size, model_layers=config.layers,
            model_width=config.width, products=config.products,
        )  # fmt: skip
        self.agent = GRPO(task, settings, seed=0, device=config.device) if agent is None else agent
        self.prompts = task.prompts(config.n_prompts, None).to(config.device)
        questions = torch.arange(config.n_prompts, device=config.device)
        self.question = questions.repeat_interleave(config.group_size)
        self._batch: Data | None = None

    def generate(self) -> None:
        self.agent.collector.sample(self.agent.policy, self.prompts, self.question)

    def train(self) -> None:
        if self._batch is None:
            found = self.agent.collector.sample(self.agent.policy, self.prompts, self.question)
            prepared = self.agent.estimator.prepare({"on": found}, self.agent.ctx)["on"]
            self._batch = prepared.epoch(Batching("sequence", "full"), None)[0]
        self.agent.updaters["policy"].step(self.agent.estimator.phases()[0].terms, self._batch)

    def iterate(self) -> None:
        self.agent.learner.watched = False
        self.agent.learner.iterate()

    def logged(self) -> None:
        self.agent.learn(self.agent.samples_per_iteration)


class Theirs:
    """TRL's trainer, its loop written out: what ``Trainer`` does around a step (logging, callbacks) is not counted."""

    def __init__(self, config: Config, ours: Ours, folder: str) -> None:
        trl, tokenizers = require("trl", "llm"), require("tokenizers", "llm")
        transformers, datasets = require("transformers", "llm"), require("datasets", "llm")
        vocabulary = ours.agent.task.vocab
        names = {f"t{i}": i for i in range(config.vocab)} | {"<eos>": config.vocab, "<pad>": config.vocab + 1}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="t0"))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=backend, padding_side="left", pad_token="<pad>", eos_token="<eos>"
        )
        model = tiny_model(config.vocab, layers=config.layers, width=config.width, onednn=False)
        model.load_state_dict(ours.agent.policy.model.state_dict())  # type: ignore[union-attr]
        prompts = [vocabulary.decode(row) for row in ours.prompts.tokens.tolist()]
        options = trl.GRPOConfig(
            output_dir=folder, per_device_train_batch_size=config.n_prompts * config.group_size,
            num_generations=config.group_size, max_completion_length=config.length, learning_rate=3e-4,
            lr_scheduler_type="constant", loss_type="grpo", report_to=[], save_strategy="no", bf16=False,
            use_cpu=config.device == "cpu", max_steps=10**6, disable_tqdm=True, shuffle_dataset=False,
            activation_checkpointing=False,
        )  # fmt: skip

        def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
            return [sum(token % 2 == 0 for token in row) / len(row) for row in completion_ids]

        self.trainer = trl.GRPOTrainer(
            model, even, args=options, train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer,
        )  # fmt: skip
        self.trainer.create_optimizer()
        self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = 1
        self.rows = next(iter(self.trainer.get_train_dataloader()))
        self.prompt_ids = [vocabulary.encode(row["prompt"]) for row in self.rows]
        self.group_size = config.group_size
        self._inputs: dict[str, Any] | None = None

    def generate(self) -> None:
        found, _ = self.trainer._generate_single_turn(self.prompt_ids, None, {}, self.group_size)
        assert {len(row) for row in found} == {self.trainer.max_completion_length}, "a completion ended early"

    def train(self) -> None:
        if self._inputs is None:
            self._inputs = self.trainer._generate_and_score_completions(self.rows)
        self._step(self._inputs)

    def iterate(self) -> None:
        self._step(self.trainer._generate_and_score_completions(self.rows))

    logged = iterate

    def _step(self, inputs: dict[str, Any]) -> None:
        trainer = self.trainer
        trainer._compute_loss(trainer.model, inputs).backward()
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()


def _speed(config: Config) -> None:
    torch.manual_seed(0)
    tokens = config.n_prompts * config.group_size * config.length
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(config)
        theirs = Theirs(config, ours, folder)
        size = sum(p.numel() for p in ours.agent.policy.parameters())
        print(f"{size / 1e6:.2f} M parameters, {tokens} tokens per batch, {config.device}, {config.clock} clock")
        print(f"{'threads':>7} {'what':>9} {'ccrl tokens/s':>14} {'TRL tokens/s':>13} {'ratio':>6}  rounds")
        for threads in config.threads:
            torch.set_num_threads(threads)
            for what in ("generate", "train", "logged", "iterate"):
                sides = [getattr(side, what) for side in (ours, theirs)]
                for side in sides:
                    side()
                rows = [[_seconds(side, config) for side in sides] for _ in range(config.rounds)]
                a, b = (statistics.median(column) for column in zip(*rows))
                ratios = sorted(row[1] / row[0] for row in rows)
                print(
                    f"{threads:>7} {what:>9} {tokens / a:>14.0f} {tokens / b:>13.0f} "
                    f"{statistics.median(ratios):>6.2f}  {ratios[0]:.2f} to {ratios[-1]:.2f}",
                    flush=True,
                )
        if config.memory:
            most = {what: [peak(getattr(side, what), config.device) / 2**20 for side in (ours, theirs)]
                    for what in ("generate", "train", "iterate")}  # fmt: skip
            for what, (a, b) in most.items():
                print(f"peak MiB of tensors above weights and moments, {what}: ccrl {a:.0f}, TRL {b:.0f} ({a / b:.2f})",
                      flush=True)  # fmt: skip


def _seconds(side: Callable[[], None], config: Config) -> float:
    clock = time.perf_counter if config.clock == "wall" else time.process_time
    if config.device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    side()
    if config.device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


# -- memory -----------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors alive inside it: exact for what operations return, whatever the allocator keeps."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _memory(config: Config) -> None:
    """Of one forward and backward pass, above the weights; the gradients of the weights are part of it."""
    print(
        f"loss of {config.memory_tokens} tokens over {config.memory_vocab}: peak MiB, and largest gradient difference"
    )
    torch.manual_seed(0)
    model = tiny_model(config.memory_vocab, layers=1, width=64).to(config.device)
    count = max(1, config.memory_tokens // config.length)
    tokens = torch.randint(config.memory_vocab, (config.length, count), device=config.device)
    ones = torch.ones_like(tokens, dtype=torch.float32)
    prompt = tokens[:1].t().contiguous()
    columns = {"action": tokens, "present": ones, "valid": ones, "prompt": prompt, "prompt_valid": ones[:1].t()}
    batch = Data(columns, sequence=frozenset({"prompt", "prompt_valid"}))
    plain: Tensor | None = None
    for name, chunk in (("plain", 0), (f"logits_chunk_size={config.logits_chunk_size}", config.logits_chunk_size)):
        policy = CausalLMPolicy(model, logits_chunk_size=chunk)
        model.zero_grad()
        most = peak(lambda: policy(batch, frozenset({"log_prob"}))["log_prob"].mean().backward(), config.device)  # noqa: B023
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        plain = gradient if plain is None else plain
        print(f"{name:>9} {most / 2**20:>8.0f} {float((gradient - plain).abs().max()):>9.1e}")


def peak(run: Callable[[], None], device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return int(torch.cuda.max_memory_allocated() - before)
    live = LiveBytes()
    with live:
        run()
    return live.peak
