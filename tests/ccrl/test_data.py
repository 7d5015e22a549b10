"""The overlay and its minibatches, on a rollout whose rows are numbered."""

from __future__ import annotations

import pytest
import torch

from ccrl.columns import columns_read
from ccrl.data import Batching, Data, Unit
from ccrl.successors import Successors

T, N = 5, 3


def rollout(valid: torch.Tensor | None = None, group: list[int] | None = None) -> Data:
    """``id = 10 t + n``; column ``n`` has the per-sequence prompt ``100 + n``."""
    ids = torch.arange(T)[:, None] * 10 + torch.arange(N)[None]
    columns = {
        "id": ids,
        "obs": {"a": ids.float().unsqueeze(-1), "b": ids},
        "valid": torch.ones(T, N) if valid is None else valid,
        "alive": torch.ones(T, N),
        "truncated": torch.zeros(T, N, dtype=torch.bool),
        "group": torch.tensor(group if group is not None else list(range(N))),
        "prompt": 100 + torch.arange(N),
    }
    return Data(columns, sequence=frozenset({"group", "prompt"}))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_transition_batches_visit_every_row_once_and_pad_the_last() -> None:
    valid = torch.ones(T, N)
    valid[1, 2] = 0.0
    batches = list(rollout(valid).minibatches(Batching("transition", 4), generator()))
    assert [b.shape for b in batches] == [(1, 4)] * 4  # 15 rows: three full batches and one padded by one row
    seen = torch.cat([b["id"][b["valid"] > 0] for b in batches])
    expected = [i for i in range(50) if i % 10 < N and i // 10 < T and i != 12]
    assert sorted(seen.tolist()) == expected
    assert batches[-1]["valid"][0, -1] == 0.0
    assert [float(b["n_valid"]) for b in batches] == [float(b["valid"].sum()) for b in batches]
    for b in batches:  # rows stay together, per-sequence columns follow their rows
        torch.testing.assert_close(b["obs"]["a"].squeeze(-1).long(), b["id"])
        torch.testing.assert_close(b["prompt"], 100 + b["id"] % 10)


@pytest.mark.parametrize("unit", ["transition", "sequence", "group"])
def test_batches_are_shuffled_by_the_generator_only(unit: Unit) -> None:
    ids = torch.arange(12)[None]
    columns = {"id": ids, "valid": torch.ones(1, 12), "group": ids[0] // 2}
    data = Data(columns, sequence=frozenset({"group"}))

    def order(seed: int) -> list[int]:
        batches = data.epoch(Batching(unit, 2), torch.Generator().manual_seed(seed))
        return [i for b in batches for i in b["id"].flatten().tolist()]

    first = order(0)
    torch.manual_seed(99)  # the global stream must not matter
    assert order(0) == first
    assert sorted(first) == list(range(12))
    assert first != sorted(first)
    assert order(1) != first


@pytest.mark.parametrize("unit", ["transition", "sequence", "group"])
def test_a_batch_is_not_wider_than_the_data(unit: Unit) -> None:
    (batch,) = rollout().epoch(Batching(unit, 100), generator())
    assert batch.shape == ((1, T * N) if unit == "transition" else (T, N))
    assert batch["valid"].min() == 1.0


def test_full_batch_keeps_the_order() -> None:
    (batch,) = rollout().epoch(Batching("transition", "full"), None)
    assert batch["id"].tolist() == [[10 * t + n for t in range(T) for n in range(N)]]
    assert float(batch["n_valid"]) == T * N
    columns = {"id": torch.arange(12)[None], "valid": torch.ones(1, 12), "group": torch.arange(12) % 6}
    for unit in ("sequence", "group"):
        (batch,) = Data(columns, sequence=frozenset({"group"})).epoch(Batching(unit, "full"), generator())  # type: ignore[arg-type]
        order = [x for g in range(6) for x in (g, g + 6)] if unit == "group" else list(range(12))
        assert batch["id"][0].tolist() == order


def test_batches_do_not_write_into_the_rollout() -> None:
    data = rollout()
    for spec in (Batching("transition", 4), Batching("sequence", 2), Batching("group", 2)):
        data.epoch(spec, generator())
    assert data["valid"].min() == 1.0


def test_sequence_batches_keep_columns_whole() -> None:
    batches = rollout().epoch(Batching("sequence", 2), generator())
    assert [b.shape for b in batches] == [(T, 2), (T, 2)]
    assert [float(b["n_sequences"]) for b in batches] == [2.0, 1.0]
    assert [float(b["n_valid"]) for b in batches] == [10.0, 5.0]
    kept = torch.cat([b["id"][0, b["valid"][0] > 0] for b in batches])
    assert sorted(kept.tolist()) == [0, 1, 2]
    for b in batches:
        torch.testing.assert_close(b["id"], 10 * torch.arange(T)[:, None] + b["id"][:1])
        torch.testing.assert_close(b["prompt"], 100 + b["id"][0])  # still [B]


def test_group_batches_hold_whole_ragged_groups_relabelled() -> None:
    wide = 6
    ids = torch.arange(wide)[None]
    data = Data(
        {"id": ids, "valid": torch.ones(1, wide), "group": torch.tensor([7, 3, 7, 9, 7, 3])},
        sequence=frozenset({"group"}),
    )
    batches = data.epoch(Batching("group", 2), generator())
    assert len({b.shape for b in batches}) == 1, "one static shape"
    assert [float(b["n_groups"]) for b in batches] == [2.0, 1.0]
    members = []
    for b in batches:
        keep = b["valid"][0] > 0
        assert float(b["n_sequences"]) == float(keep.sum())
        label, index = b["group"][keep], b["id"][0, keep]
        assert sorted(set(label.tolist())) == list(range(int(b["n_groups"])))
        members += [sorted(index[label == g].tolist()) for g in label.unique()]
    assert sorted(members) == [[0, 2, 4], [1, 5], [3]]


@pytest.mark.parametrize("seed", range(6))
def test_ragged_groups_fit_whichever_comes_first(seed: int) -> None:
    """The static width is that of the widest batch, not of the first."""
    data = Data(
        {"id": torch.arange(6)[None], "valid": torch.ones(1, 6), "group": torch.tensor([0, 1, 1, 1, 1, 2])},
        sequence=frozenset({"group"}),
    )
    batches = data.epoch(Batching("group", 1), torch.Generator().manual_seed(seed))
    assert [b.shape for b in batches] == [(1, 4)] * 3
    assert sorted(float(b["n_valid"]) for b in batches) == [1.0, 1.0, 4.0]
    kept = torch.cat([b["id"][b["valid"] > 0] for b in batches])
    assert sorted(kept.tolist()) == list(range(6))


@pytest.mark.parametrize(
    ("size", "widths"), [(None, [7]), (1, [2, 4, 1]), (3, [2, 4, 1]), (5, [2, 5]), (6, [6, 1]), (9, [7])]
)
def test_microbatches_of_a_group_batch_are_cut_between_groups(size: int | None, widths: list[int]) -> None:
    """Groups of 2, 4 and 1 columns: as many whole ones as fit, one where it is wider; counts are the batch's."""
    data = Data(
        {"id": torch.arange(7)[None], "valid": torch.ones(1, 7), "group": torch.tensor([5, 8, 8, 5, 9, 8, 8])},
        sequence=frozenset({"group"}),
    )
    (batch,) = data.epoch(Batching("group", "full", microbatch=size), None)
    pieces = batch.microbatches(batch.microbatch)
    assert [piece.shape[1] for piece in pieces] == widths
    assert [int(i) for piece in pieces for i in piece["id"][0]] == [0, 3, 1, 2, 5, 6, 4]
    assert {(float(p["n_valid"]), float(p["n_sequences"]), float(p["n_groups"])) for p in pieces} == {(7.0, 7.0, 3.0)}
    for label in range(3):
        assert sum(label in p["group"].tolist() for p in pieces) == 1, "no group is in two pieces"


def test_microbatches_of_scattered_groups_are_refused() -> None:
    columns = {"valid": torch.ones(1, 4), "group": torch.tensor([0, 1, 0, 1])}
    (batch,) = Data(columns, sequence=frozenset({"group"})).epoch(Batching("group", "full"), None)
    with pytest.raises(ValueError, match="side by side"):
        batch.take(torch.tensor([0, 2, 1, 3])).microbatches(2)


def test_group_batches_need_the_column() -> None:
    with pytest.raises(ValueError, match="group"):
        Data({"valid": torch.ones(1, 2)}).epoch(Batching("group", 1), None)


def test_microbatches_sum_exactly() -> None:
    # C0 of the interface notes: token losses with ragged columns. Token mean over the whole batch:
    # (.1 + .2 + .3 + .4 + .1) / 5 = .22; the mean of the two micro-batches' means is (.15 + .2667) / 2 = .2083
    x = torch.tensor([[0.1, 0.3], [0.2, 0.4], [9.0, 0.1]])
    valid = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    data = Data({"x": x, "valid": valid})
    (batch,) = data.epoch(Batching("sequence", "full", microbatch=1), None)
    assert batch.microbatch == 1
    pieces = batch.microbatches(batch.microbatch)
    assert [p.shape for p in pieces] == [(3, 1), (3, 1)]
    assert sum(float((p["x"] * p["valid"]).sum() / p["n_valid"]) for p in pieces) == pytest.approx(0.22)
    assert sum(float((p["x"] * p["valid"]).sum() / p["valid"].sum()) / 2 for p in pieces) == pytest.approx(0.2083333)
    assert batch.microbatches(None) == [batch]
    assert batch.derive(y=x).microbatch == 1


def test_microbatches_of_transitions_split_every_column() -> None:
    batch = rollout().epoch(Batching("transition", 6), generator())[0]
    pieces = batch.microbatches(4)
    assert [p.shape for p in pieces] == [(1, 4), (1, 2)]
    for piece in pieces:  # per-sequence columns have become rows like the others
        torch.testing.assert_close(piece["prompt"], 100 + piece["id"] % 10)
        assert float(piece["n_valid"]) == 6.0


def test_facts_stay_facts_in_batches() -> None:
    batch = rollout().derive(advantage=torch.ones(T, N)).epoch(Batching("transition", 4), generator())[0]
    for name in ("id", "n_valid"):
        with pytest.raises(ValueError, match="raw columns"):
            batch.derive(**{name: torch.zeros(1, 4)})
    assert batch.derive(advantage=torch.zeros(1, 4))["advantage"].eq(0).all()


def test_derive_refuses_raw_columns_and_leaves_the_original() -> None:
    data = rollout()
    with pytest.raises(ValueError, match=r"\['id'\] are raw"):
        data.derive(id=torch.zeros(T, N))
    first = data.derive(advantage=torch.ones(T, N))
    second = first.derive(advantage=torch.zeros(T, N))  # derived columns may be rebuilt
    assert "advantage" not in data
    assert float(first["advantage"].sum()) == T * N
    assert float(second["advantage"].sum()) == 0.0
    assert second["id"] is data["id"]


def test_unknown_column_names_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"no column 'reward'.*alive"):
        rollout()["reward"]


def test_take_repeats_and_drops_columns() -> None:
    data = rollout().derive_sequence(episode_reward=torch.tensor([1.0, 2.0, 3.0])).take(torch.tensor([2, 0, 2]))
    assert data.shape == (T, 3)
    assert data["id"][0].tolist() == [2, 0, 2]
    assert data["prompt"].tolist() == [102, 100, 102]
    assert data["episode_reward"].tolist() == [3.0, 1.0, 3.0]
    assert data["obs"]["b"][1].tolist() == [12, 10, 12]


def test_successors_exist_on_whole_rollouts_only() -> None:
    stream = torch.arange(3.0).view(3, 1, 1).expand(3, 2, 1)
    after = Successors(stream, stream[:0, 0], torch.full((2, 2), -1))
    data = Data({"obs": stream[:-1], "valid": torch.ones(2, 2)}, successors=after)
    assert data.derive(x=torch.ones(2, 2)).next_obs().flatten().tolist() == [1, 1, 2, 2]
    pieces = [data.take(torch.tensor([1])), data.microbatches(1)[0]]
    pieces += [data.epoch(Batching(unit, 1), generator())[0] for unit in ("transition", "sequence")]  # type: ignore[arg-type]
    for piece in pieces:
        with pytest.raises(ValueError, match="whole rollouts"):
            piece.next_obs()


def test_discount_modes() -> None:
    data = Data(
        {
            "valid": torch.ones(3, 1),
            "alive": torch.tensor([[1.0], [0.0], [1.0]]),
            "truncated": torch.tensor([[False], [False], [True]]),
        }
    )
    assert data.discount(0.9).flatten().tolist() == pytest.approx([0.9, 0.0, 0.9])
    assert data.discount(0.9, "terminal").flatten().tolist() == pytest.approx([0.9, 0.0, 0.0])
    with pytest.raises(ValueError, match="time_limit"):
        data.discount(0.9, "never")  # type: ignore[arg-type]


def test_columns_read_names_what_a_function_needs() -> None:
    assert columns_read(lambda b: b["id"] + b["prompt"], rollout()) == ["id", "prompt"]
    # what is read from what is derived is read from the batch; what was derived is not
    derived = columns_read(
        lambda b: b.derive(x=b["id"]).derive(y=b["id"])["valid"] + b.derive(x=b["id"])["x"], rollout()
    )
    assert derived == ["id", "valid"]
    # through every kind of overlay
    assert columns_read(lambda b: b.with_scalars(s=b["id"]).take(torch.tensor([0]))["valid"], rollout()) == [
        "id",
        "valid",
    ]


@pytest.mark.parametrize("bad", [{"unit": "step"}, {"size": 0}, {"size": "all"}, {"epochs": 0}, {"microbatch": 0}])
def test_batching_rejects(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Batching"):
        Batching(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Batching("transition", 2), None),
        (Batching("sequence", "full"), None),
        (Batching("sequence", 3), 3),
        (Batching("sequence", 3, microbatch=2), 2),
        (Batching("group", 1), 3),  # 6 columns in 2 groups: 3 a group
        (Batching("group", 2), 6),
    ],
)
def test_the_whole_as_one_batch_needs_no_more_memory_than_training(spec: Batching, expected: int | None) -> None:
    columns = {"valid": torch.ones(2, 6), "group": torch.tensor([0, 0, 1, 1, 0, 1])}
    batch = Data(columns, sequence=frozenset({"group"})).whole(spec)
    assert float(batch["n_valid"]) == 12.0
    assert batch.microbatch == expected
