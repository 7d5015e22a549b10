"""POLAR: a reward model against the exact one, policies that it has not seen, reinforcement toward a policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ccrl.data import Data
from ccrl.estimators.terms import Outputs, surrogate
from ccrl.llm.policy import OUTPUTS, token_outputs
from ccrl.llm.reward_head import Scored, pair_terms
from ccrl.llm.task import Prompts, Score, Split
from ccrl.packages import check_siblings
from ccrl.seeding import named_generator, stream_seed
from scripts.reproductions import Measurement, of_samples

check_siblings("agents", "envs")

from agents.llm.agent import LLM
from agents.llm.polar import POLAR, judged_by

__all__ = ["bayes", "pmi", "regularised", "run"]

SYMBOLS, LENGTH = 8, 16
TRIPLES, TOLD = 400_000, 4000
"""New triples of a trained reward: Gaussian ones, and of bigrams."""
PAIRS = {"gaussian": (3000, 512), "bigrams": (2500, 256)}


# -- (i) means and trajectories that are Gaussian ---------------------------------------------------------------------


def pmi(reference: Tensor, candidate: Tensor, variance: float) -> Tensor:
    """``log p(candidate | reference, one policy) - log p(candidate)``: policies are means of that variance, a
    trajectory is its policy's mean and a standard normal."""
    share = variance / (variance + 1.0)

    def log_density(x: Tensor, spread: float) -> Tensor:
        return -0.5 * x.square() / spread - 0.5 * math.log(spread)

    return log_density(candidate - share * reference, 1.0 + share) - log_density(candidate, 1.0 + variance)


def gaussian_triples(n: int, variance: float, generator: Generator) -> Tensor:
    """``[3, n]``: reference, candidate of its policy, candidate of another one."""
    means = math.sqrt(variance) * torch.randn(2, n, generator=generator, dtype=torch.float64)
    noise = torch.randn(3, n, generator=generator, dtype=torch.float64)
    return means[[0, 0, 1]] + noise


def bayes(variance: float, n: int, seed: int) -> tuple[float, float]:
    """Accuracy and Bradley-Terry loss of the exact reward on ``n`` triples."""
    one, same, other = gaussian_triples(n, variance, Generator().manual_seed(seed))
    margin = pmi(one, same, variance) - pmi(one, other, variance)
    return float((margin > 0).double().mean()), float(F.softplus(-margin).mean())


def regularised(start: Tensor, reward: Tensor, beta: float) -> tuple[Tensor, float, float]:
    """``pi*`` of KL-regularised reinforcement, ``E_pi* r``, and ``beta KL(pi* || start) + beta log Z``."""
    weight = start * (reward / beta).exp()
    best, log_z = weight / weight.sum(), float(weight.sum().log())
    kl = float((best * (best / start).log()).sum())
    return best, float(best @ reward), beta * (kl + log_z)


def trained(model: nn.Module, draw: Callable[[], Data], steps: int) -> nn.Module:
    """By the pre-training loss, Adam at 2e-3 with a cosine to 0."""
    scored, terms = Scored(model), pair_terms()
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        batch = draw()
        loss, _ = surrogate(terms, scored(batch, frozenset({"score"})), batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model


def side_by_side(reference: Tensor, same: Tensor, other: Tensor) -> Data:
    """Pairs ``[n, ...]`` as a batch, ``x`` and ``reference`` per column."""
    n = len(reference)
    both = torch.stack([same, other], 1).flatten(0, 1)
    sign = torch.tensor([1.0, -1.0]).repeat(n)
    columns = {
        "valid": torch.ones(1, 2 * n), "x": both, "reference": reference.repeat_interleave(2, 0), "preferred": sign,
        "group": torch.arange(n).repeat_interleave(2), "n_groups": torch.tensor(float(n)),
    }  # fmt: skip
    sequence = frozenset({"x", "reference", "preferred", "group"})
    return Data(columns, sequence=sequence, scalars=frozenset({"n_groups"}))


class Perceptron(nn.Module):
    """A reward of the features of reference and candidate."""

    def __init__(self, features: Callable[[Data], Tensor], inputs: int, width: int = 64) -> None:
        super().__init__()
        self.features = features
        self.net = nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def forward(self, batch: Data) -> Tensor:
        """``[B]``."""
        return self.net(self.features(batch)).squeeze(-1)  # type: ignore[no-any-return]


def _gaussian(seeds: list[int]) -> list[Measurement]:
    steps, size = PAIRS["gaussian"]
    rows = list[tuple[float, float]]()
    for seed in seeds:
        generator = named_generator(seed, "triples")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "networks"))
            model = Perceptron(lambda batch: torch.stack([batch["reference"], batch["x"]], 1), 2)
        trained(model, lambda g=generator: side_by_side(*gaussian_triples(size, 4.0, g).float()), steps)  # type: ignore[misc]
        test = side_by_side(*gaussian_triples(TRIPLES, 4.0, named_generator(seed, "test triples")).float())
        with torch.no_grad():
            margin = model(test).view(-1, 2).diff(dim=1).neg().squeeze(1)
        rows.append((float((margin > 0).double().mean()), float(F.softplus(-margin.double()).mean())))
    found = list[Measurement]()
    for variance, accuracy, loss in ((1.0, 0.6229, 0.6248), (4.0, 0.7403, 0.4696), (16.0, 0.8502, 0.2824)):
        exact = bayes(variance, 2_000_000, 0)
        found += [
            # both sides are means of two million: their difference has the variance of a million's
            Measurement(f"exact reward, policies of variance {variance:g}: accuracy", f"{accuracy} (reference run)",
                        of_samples(accuracy, 1_000_000), (exact[0],)),
            Measurement(f"exact reward, policies of variance {variance:g}: loss", f"{loss} (reference run)",
                        of_samples(loss, 1_000_000), (exact[1],)),
        ]  # fmt: skip
    return [
        *found,
        Measurement("trained reward, variance 4: accuracy", "0.7403 (exact reward)", of_samples(0.7403, TRIPLES),
                    tuple(row[0] for row in rows)),
        Measurement("trained reward, variance 4: loss", "0.4696 (exact reward)", of_samples(0.4696, TRIPLES),
                    tuple(row[1] for row in rows)),
    ]  # fmt: skip


# -- (ii) policies over tokens ----------------------------------------------------------------------------------------


class Bigrams(nn.Module):
    """The next token depends on the last one: logits ``[symbols + 1, symbols]``, the last row begins."""

    unit = "sequence"
    temperature = 1.0

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())

    def outputs(self) -> frozenset[str]:
        return OUTPUTS - {"hidden"}

    def forward(self, batch: Data, want: frozenset[str]) -> Outputs:
        """``want`` ``[T, B]``."""
        tokens = batch["action"]
        before = torch.cat([torch.full_like(tokens[:1], SYMBOLS), tokens[:-1]])
        return token_outputs(self.logits[before], tokens, want, 1.0, 16)

    def start(self, prompts: Prompts, question: Tensor, steps: int) -> tuple[Any, Tensor]:
        return question, self.logits[SYMBOLS].expand(len(question), SYMBOLS)

    def step(self, state: Any, token: Tensor, present: Tensor) -> tuple[Any, Tensor]:
        return state, self.logits[token]

    def keep(self, state: Any, rows: Tensor) -> Any:
        return state[rows]


def draw_logits(n: int, generator: Generator) -> Tensor:
    """``[n, symbols + 1, symbols]`` of random policies."""
    return 1.5 * torch.randn(n, SYMBOLS + 1, SYMBOLS, generator=generator)


def written(logits: Tensor, generator: Generator) -> Tensor:
    """``[n, LENGTH]``: one sequence of each of the policies ``[n, symbols + 1, symbols]``."""
    rows = torch.arange(len(logits))
    before, found = torch.full((len(logits),), SYMBOLS), list[Tensor]()
    for _ in range(LENGTH):
        before = torch.multinomial(logits[rows, before].softmax(1), 1, generator=generator).squeeze(1)
        found.append(before)
    return torch.stack(found, 1)


def counts(tokens: Tensor) -> Tensor:
    """``[n, symbols^2]``: how often each token follows each."""
    pair = tokens[:, :-1] * SYMBOLS + tokens[:, 1:]
    return torch.zeros(len(tokens), SYMBOLS**2).scatter_add(1, pair, torch.ones(pair.shape))


def bigram_features(batch: Data) -> Tensor:
    """Counts of the reference, of the candidate, and their product."""
    one = counts(batch["reference"])
    other = counts(batch["x"] if "x" in batch else batch["action"].t())
    return torch.cat([one, other, one * other], 1)


def bigram_triples(pool: Tensor, n: int, generator: Generator) -> Data:
    one = torch.randint(len(pool), (n,), generator=generator)
    other = (one + torch.randint(1, len(pool), (n,), generator=generator)) % len(pool)
    which = torch.cat([one, one, other])
    return side_by_side(*written(pool[which], generator).view(3, n, LENGTH))


def sequence_kl(one: Tensor, other: Tensor) -> float:
    """KL of whole sequences of two policies ``[symbols + 1, symbols]``, nats."""
    p, step = one.double().log_softmax(1), other.double().log_softmax(1)
    cost = (p.exp() * (p - step)).sum(1)
    total, state = cost[SYMBOLS], p[SYMBOLS].exp()
    for _ in range(LENGTH - 1):
        total, state = total + state @ cost[:SYMBOLS], state @ p[:SYMBOLS].exp()
    return float(total)


def discriminator(seed: int) -> tuple[Perceptron, Tensor, Tensor]:
    """Trained on 200 policies; those, and 50 others."""
    generator = named_generator(seed, "policies and triples")
    seen, unseen = draw_logits(200, generator), draw_logits(50, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "networks"))
        model = Perceptron(bigram_features, 3 * SYMBOLS**2)
    steps, size = PAIRS["bigrams"]
    trained(model, lambda: bigram_triples(seen, size, generator), steps)
    return model, seen, unseen


@torch.no_grad()
def accuracy(model: nn.Module, pool: Tensor, seed: int) -> float:
    """Share of ``TOLD`` pairs in which the candidate of the reference's policy has the larger reward."""
    said = model(bigram_triples(pool, TOLD, named_generator(seed, "test triples"))).view(-1, 2)
    return float((said[:, 0] > said[:, 1]).double().mean())


@torch.no_grad()
def rank_correlation(model: nn.Module, unseen: Tensor, seed: int) -> float:
    """Mean over ten pairs of policies of Spearman's correlation of ``E r(y, y*)`` with ``KL(pi, pi*)`` on eleven
    policies between them."""
    generator, found = named_generator(seed, "policies between"), list[float]()
    for a, b in zip(unseen[:10], unseen[10:20]):
        kl, reward = list[float](), list[float]()
        for share in torch.linspace(0, 1, 11):
            between = torch.lerp(b, a, share)
            kl.append(sequence_kl(between, b))
            references, candidates = (written(x.expand(2000, -1, -1), generator) for x in (b, between))
            batch = side_by_side(references, candidates, candidates)
            reward.append(float(model(batch)[0::2].mean()))
        ranks = [torch.tensor(x).argsort().argsort().double() for x in (kl, reward)]
        found.append(float(torch.corrcoef(torch.stack(ranks))[0, 1]))
    return sum(found) / len(found)


# -- (iii) reinforcement toward a policy ------------------------------------------------------------------------------


class _Symbols:
    size, pad, bos, eos = SYMBOLS, -1, -1, -1

    def encode(self, text: str) -> list[int]:
        return [int(c) for c in text]

    def decode(self, tokens: Any) -> str:
        return "".join(str(t) for t in tokens)


class Toward:
    """One prompt; a demonstration is one of some sequences of the target policy."""

    name, components, vocab = "toward", ("nothing",), _Symbols()
    questions, fixed_length, max_new_tokens = 1, LENGTH, LENGTH

    def __init__(self, references: Tensor) -> None:
        self.references = references

    def prompts(self, n: int, generator: Generator | None, split: Split = "train") -> Prompts:
        shown = self.references[torch.randint(len(self.references), (n,), generator=generator)]
        zero = torch.zeros(n, dtype=torch.int64)
        return Prompts(zero[:, None], torch.ones(n, 1), zero, (None,) * n, shown, torch.ones(shown.shape))

    def score(self, prompts: Prompts, question: Tensor, tokens: Tensor, length: Tensor) -> Score:
        return Score(torch.zeros(len(question), 1), torch.zeros(len(question), dtype=torch.int64))


def toward(model: nn.Module, target: Tensor, references: int, tau: float, seed: int) -> dict[str, tuple[float, float]]:
    """``KL(target || pi)`` and ``KL(pi || target)`` after 0, 60 and 300 iterations of 32 groups of 8, Adam at 0.03."""
    generator = named_generator(seed, "start and references")
    task = Toward(written(target.expand(references, -1, -1), generator))
    config = POLAR.Settings(model="tabular", n_prompts=32, group_size=8, learning_rate=0.03, tau=tau)
    cls = LLM.of(judged_by(model))
    start = draw_logits(1, generator)[0]
    agent = type("polar", (cls,), {"make_model": lambda self: Bigrams(start)})(task, config, seed=seed)
    found = dict[str, tuple[float, float]]()

    def look(agent: Any) -> None:
        logits = agent.policy.logits.detach()
        found[str(agent.iteration)] = sequence_kl(target, logits), sequence_kl(logits, target)

    look(agent)
    agent.learn(300 * agent.samples_per_iteration, callback=look)
    return found


def run(seeds: list[int]) -> list[Measurement]:
    """All three."""
    _, value, sum_ = regularised(
        torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([1.0, 0.0, 2.0]).double(), beta=0.5
    )
    exact = "1.7120502523 (formula)"
    found = [
        Measurement("E r under the regularised optimum", exact, (1.71205025, 1.71205026), (value,)),
        Measurement("beta KL + beta log Z there", exact, (1.71205025, 1.71205026), (sum_,)),
        *_gaussian(seeds),
    ]
    rows = {name: list[float]() for name in ("seen", "unseen", "rank")}
    kls: dict[tuple[int, float], list[dict[str, tuple[float, float]]]] = {}
    for seed in seeds:
        model, seen, unseen = discriminator(seed)
        rows["seen"].append(accuracy(model, seen, seed))
        rows["unseen"].append(accuracy(model, unseen, seed))
        rows["rank"].append(rank_correlation(model, unseen, seed))
        for case in ((64, 0.0), (64, 0.5), (8, 0.5), (2, 0.5)):
            kls.setdefault(case, []).append(toward(model, unseen[20], *case, seed))
    for name, value in (("seen", 0.918), ("unseen", 0.909)):
        what = f"bigram policies, {name} ones: pairs told apart"
        found.append(Measurement(what, f"{value} (reference run)", of_samples(value, TOLD), tuple(rows[name])))
    found.append(Measurement("rank correlation of the mean reward with the KL to the reference's policy",
                             "-1.0 (reference run), at most -0.8", (-math.inf, -0.8), tuple(rows["rank"])))  # fmt: skip

    def forward(case: tuple[int, float], when: str, direction: int = 0) -> tuple[float, ...]:
        return tuple(run[when][direction] for run in kls[case])

    def less(one: tuple[float, ...], other: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(a - b for a, b in zip(one, other))

    # how far a drawn start is from a drawn target is no number of the method's
    plain, kl = (64, 0.0), "KL(target || policy), nats"
    down, up = (-math.inf, 0.0), (0.0, math.inf)
    found += [
        Measurement(f"reward alone: {kl}, 60 iterations minus 0", "negative (-10.6, reference run)", down,
                    less(forward(plain, "60"), forward(plain, "0"))),
        Measurement("reward alone: its rise from 60 to 300 iterations", "positive (10.2, reference run)", up,
                    less(forward(plain, "300"), forward(plain, "60"))),
        Measurement(f"reward alone: {kl}, 300 iterations minus 0", "negative (-0.4, reference run)", down,
                    less(forward(plain, "300"), forward(plain, "0"))),
    ]  # fmt: skip
    for references, expected in ((64, "-17.7"), (8, "-17.5"), (2, "-15.6")):
        what = f"tau 0.5, {references} references: {kl}, 300 iterations minus 0"
        case = (references, 0.5)
        found.append(Measurement(what, f"negative ({expected}, reference run)", down,
                                 less(forward(case, "300"), forward(case, "0"))))  # fmt: skip
    return [
        *found,
        Measurement(f"64 references: {kl}, after 300 iterations, tau 0.5 minus the reward alone",
                    "negative (-17.3, reference run)", down, less(forward((64, 0.5), "300"), forward(plain, "300"))),
        Measurement(f"tau 0.5: {kl}, after 300 iterations, 2 references minus 64", "positive (2.1, reference run)", up,
                    less(forward((2, 0.5), "300"), forward((64, 0.5), "300"))),
    ]  # fmt: skip
