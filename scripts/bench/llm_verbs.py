"""Where the time of a language-model iteration goes: ``python scripts/bench llm_verbs``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ccrl.packages import check_siblings

check_siblings("agents", "envs")

import agents
from ccrl.data import Batching, Data
from ccrl.llm import padding
from ccrl.llm.task import Prompts
from scripts.bench import llm

__all__ = ["Config", "main"]

What = Literal["verbs", "context", "padding", "overhead"]


@dataclass
class Config(llm.Config):
    """verbs: shares of an iteration of GRPO: draw, plan, generate, score, prepare (advantages), update, statistics (of
    a row of the log), rest. context: tokens per second behind a long prompt, beside the library's ``generate`` with the
    same weights, which TRL calls. padding: tokens evaluated per token of a completion, and the time of an update, with
    completions of unequal lengths, without and with buckets. overhead: seconds of an iteration of every method over
    GRPO's, in alternating rounds; methods that imitate learn from demonstrations of the same length."""

    what: tuple[What, ...] = ("verbs", "context", "padding", "overhead")
    """These are measured."""
    threads: tuple[int, ...] = (1,)
    """torch threads; the first number alone for all but the verbs."""
    context: int = 4096
    """Tokens of a prompt and its completion, in context."""
    rows: int = 8
    """Completions beside each other there, of two prompts."""
    methods: tuple[str, ...] = tuple(sorted(agents.METHODS))
    """Of these the overhead is measured."""


def main(config: Config) -> None:
    torch.manual_seed(0)
    for name in config.what:
        {"verbs": _verbs, "context": _context, "padding": _padding, "overhead": _overhead}[name](config)


def _clock(config: Config) -> Callable[[], float]:
    now = time.perf_counter if config.clock == "wall" else time.process_time
    if config.device == "cpu":
        return now

    def waited() -> float:
        torch.cuda.synchronize()  # what was only launched has taken no time yet
        return now()

    return waited


# -- verbs ------------------------------------------------------------------------------------------------------------

VERBS = ("draw", "plan", "generate", "score", "prepare", "update", "statistics", "rest")


def _verbs(config: Config) -> None:
    ours, clock = llm.Ours(config), _clock(config)
    agent, spent = ours.agent, dict.fromkeys(VERBS, 0.0)

    def timed(owner: Any, method: str, verb: str, inside: str = "") -> None:
        run = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            start, before = clock(), spent[inside] if inside else 0.0
            found = run(*args, **kwargs)
            spent[verb] += clock() - start - (spent[inside] - before if inside else 0.0)
            return found

        setattr(owner, method, call)

    for verb in ("draw", "plan", "generate", "score"):
        timed(agent.collector, verb, verb)
    timed(agent.estimator, "prepare", "prepare")
    timed(agent.updaters["policy"], "measure", "statistics")
    timed(agent.learner, "_update", "update", "statistics")
    size = sum(p.numel() for p in agent.policy.parameters()) / 1e6
    for threads in config.threads:
        torch.set_num_threads(threads)
        ours.logged()
        spent.update(dict.fromkeys(VERBS, 0.0))
        start = clock()
        for _ in range(config.rounds):
            ours.logged()
        total = clock() - start
        spent["rest"] = total - sum(spent.values())
        tokens = config.rounds * config.n_prompts * config.group_size * config.length
        shares = ", ".join(f"{verb} {100 * seconds / total:.1f}" for verb, seconds in spent.items())
        print(f"{size:.2f} M parameters, {threads} threads, {tokens / total:,.0f} tokens/s; per cent: {shares}",
              flush=True)  # fmt: skip


# -- long contexts ----------------------------------------------------------------------------------------------------


def _context(config: Config) -> None:
    torch.set_num_threads(config.threads[0])
    ours = llm.Ours(replace(
        config, n_prompts=2, group_size=config.rows // 2, prompt_length=config.context - config.length
    ))  # fmt: skip
    prompts, question, model = ours.prompts, ours.question, ours.agent.policy.model

    @torch.no_grad()
    def library() -> None:
        ids = prompts.tokens[question]
        found = model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=config.length,
            min_new_tokens=config.length, pad_token_id=0, use_cache=True,
        )  # fmt: skip
        assert found.shape[1] == config.context

    _alternate(f"{config.rows} rows, {config.context} tokens of context", config.rows * config.length,
               ours.generate, library, config, "the library's generate")  # fmt: skip


def _alternate(
    title: str, tokens: int, ours: Callable[[], None], theirs: Callable[[], None], config: Config, whose: str
) -> None:
    clock = _clock(config)

    def seconds(run: Callable[[], None]) -> float:
        start = clock()
        run()
        return clock() - start

    for run in (ours, theirs):
        run()
    rows = [(seconds(ours), seconds(theirs)) for _ in range(config.rounds)]
    one, other = (tokens / statistics.median(column) for column in zip(*rows))
    ratio = statistics.median(b / a for a, b in rows)
    print(f"{title}: ours {one:,.0f} tokens/s, {whose} {other:,.0f}, ratio {ratio:.2f}", flush=True)


# -- padding ----------------------------------------------------------------------------------------------------------


def _padding(config: Config) -> None:
    """Lengths are exponential with a mean of a third of the longest, as those of models that may stop."""
    torch.set_num_threads(config.threads[0])
    longer = replace(config, length=4 * config.length)
    ours = llm.Ours(longer)
    rows = config.n_prompts * config.group_size
    lengths = torch.empty(rows).exponential_(3.0 / longer.length).round().clamp(1, longer.length).to(config.device)
    found = ours.agent.collector.sample(ours.agent.policy, ours.prompts, ours.question)
    present = (torch.arange(longer.length, device=lengths.device)[:, None] < lengths).float()
    columns = dict(found.items()) | {"present": present, "valid": present, "length": lengths.long()}
    data = Data(columns, sequence=found.sequence)
    agent = ours.agent
    batch = agent.estimator.prepare({"on": data}, agent.ctx)["on"].epoch(Batching("sequence", "full"), None)[0]
    terms, updater = agent.estimator.phases()[0].terms, agent.updaters["policy"]
    seen = [0]
    embedding = agent.policy.model.get_input_embeddings()  # type: ignore[operator]
    hook = embedding.register_forward_hook(lambda module, ids, out: seen.append(seen.pop() + ids[0].numel()))
    most, prompts = padding.MOST, config.n_prompts * config.prompt_length

    def step(buckets: int) -> Callable[[], None]:
        def run() -> None:
            padding.MOST = buckets
            updater.step(terms, batch)

        return run

    tokens = int(lengths.sum())
    try:
        for buckets in (1, most):
            seen[0] = 0
            step(buckets)()
            print(f"at most {buckets} buckets: {(seen[0] - prompts) / tokens:.2f} tokens evaluated per token of a "
                  f"completion (and {prompts} of prompts)", flush=True)  # fmt: skip
        hook.remove()
        _alternate(f"update of {rows} completions of {tokens / rows:.0f} tokens, longest {int(lengths.max())}", tokens,
                   step(most), step(1), config, "one bucket")  # fmt: skip
    finally:
        padding.MOST = most


# -- methods ----------------------------------------------------------------------------------------------------------


def _overhead(config: Config) -> None:
    """In turns with GRPO, one epoch of whole batches everywhere. Between two rows of the log: over GRPO, and, of
    methods that evaluate a reference policy, over GRPO with its KL to one; then with the statistics of a row."""
    torch.set_num_threads(config.threads[0])
    clock = _clock(config)
    grpo, with_kl = (llm.Ours(config, _trained("grpo", config, kl_coef=kl)) for kl in (0.0, 0.001))
    size = config.n_prompts * config.group_size * config.length
    for side in (grpo, with_kl):
        side.logged()
    print(f"{'method':>12} {'over GRPO, %':>13} {'with its KL':>12} {'logged':>7} {'its tokens':>11}", flush=True)

    def over(method: llm.Ours, other: llm.Ours, what: str) -> float:
        ratios = []
        for _ in range(config.rounds):
            marks = [clock()]
            for side in (method, other):
                getattr(side, what)()
                marks.append(clock())
            ratios.append((marks[1] - marks[0]) / (marks[2] - marks[1]))
        return 100 * (statistics.median(ratios) - 1)

    for name in config.methods:
        try:
            method = llm.Ours(config, _trained(name, config))
            method.logged()
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            print(f"{name:>12}  not on this task: {str(error)[:90]}", flush=True)
            continue
        before = method.agent.collector.tokens
        plain, logged = over(method, grpo, "iterate"), over(method, grpo, "logged")
        tokens = (method.agent.collector.tokens - before) / (2 * config.rounds * size)
        same = f"{over(method, with_kl, 'iterate'):+.1f}" if method.agent.estimator.wants_reference else ""
        print(f"{name:>12} {plain:>+13.1f} {same:>12} {logged:>+7.1f} {tokens:>11.2f}", flush=True)


def _trained(name: str, config: Config, **more: Any) -> Any:
    """A method's agent on as many completions as GRPO's; a method that imitates gets its demonstrations."""
    own = agents.get_agent(name).method.Config()
    settings = {"n_prompts": config.n_prompts, "group_size": config.group_size, "model_layers": config.layers,
                "model_width": config.width} | more  # fmt: skip
    settings |= {key: value for key, value in {"n_epochs": 1, "batch_size": 0}.items() if key not in own.unread}
    if own.imitates and own.group_size == 1:  # one demonstration per prompt
        settings |= {"n_prompts": config.n_prompts * config.group_size, "group_size": 1}
    task = _Shown(config) if own.imitates else llm.FixedLength(config)
    return agents.get_agent(name)(task, seed=0, **settings)


class _Shown(llm.FixedLength):
    """With a demonstration of every prompt: even tokens."""

    def prompts(self, n: int, generator: torch.Generator | None, split: str = "train") -> Prompts:
        found = super().prompts(n, generator, split)
        shown = 2 * torch.randint(self.vocab.size // 2, (n, self.max_new_tokens), generator=generator)
        return replace(found, demonstration=shown, demonstration_valid=torch.ones(shown.shape))
