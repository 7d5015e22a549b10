"""reproduce.py: what agrees, the page, and what it refuses; the experiments themselves are in tests/agents."""

from __future__ import annotations

import math
import types
from pathlib import Path

import pytest

from scripts import reproduce
from scripts.reproductions import PAPERS, Measurement
from scripts.reproductions.tables import History


def test_a_measurement_by_hand() -> None:
    row = Measurement("q", "2 (paper)", (1.5, 3.0), (1.0, 2.0, 6.0))
    assert row.mean == 3.0
    assert row.error == pytest.approx(math.sqrt(7 / 3))  # deviations -2, -1, 3: variance 14 / 2, over three seeds
    assert row.agrees, "the bounds belong to the range"
    assert math.isnan(Measurement("q", "", (0.0, 1.0), (2.0,)).error)
    for value, agrees in ((0.0, True), (1.0, True), (1.01, False), (-0.01, False), (math.nan, False)):
        assert Measurement("q", "", (0.0, 1.0), (value,)).agrees is agrees


def test_final_and_area_of_a_history() -> None:
    history = History(None, reward=[float(i) for i in range(30)])  # type: ignore[arg-type]
    assert history.final() == 19.5
    assert history.final(last=2) == 28.5
    assert history.area == 14.5


def test_the_page_says_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def run(seeds: list[int]) -> list[Measurement]:
        asked.append(seeds)
        return [Measurement("exact", "1 (paper)", (1.0, 1.0), (1.0,)), Measurement("mean", "0", (-1, 1), (3.0, 1.0))]

    monkeypatch.setattr(reproduce.importlib, "import_module", lambda name: types.SimpleNamespace(run=run))
    target = tmp_path / "page.md"
    found = reproduce.main(reproduce.Options(papers=("bnpo", "mhpo"), seeds=2, page=target))
    assert asked == [[0, 1], [0, 1]]
    assert list(found) == ["bnpo", "mhpo"]
    text = target.read_text()
    assert "(2 seeds, one CPU thread): 2 of 4 numbers agree" in text
    assert f"## bnpo: {PAPERS['bnpo']}" in text
    assert "| exact | 1 (paper) | 1 | yes |" in text
    assert "| mean | 0 | 2 +- 1 | **no** |" in text


def test_every_paper_has_its_module() -> None:
    folder = Path(reproduce.__file__).parent / "reproductions"
    assert all((folder / f"{slug}.py").is_file() for slug in PAPERS)


@pytest.mark.parametrize("options", [{"papers": ("nobody",)}, {"seeds": 0}])
def test_bad_input(options: dict, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"expected papers among .* and seeds >= 1"):
        reproduce.main(reproduce.Options(**options, page=tmp_path / "page.md"))
