"""reproduce.py: what agrees, the page, and what it refuses; the experiments themselves are in tests/agents."""

from __future__ import annotations

import math
import types
from pathlib import Path

import pytest

from ccrl.packages import ROOT
from scripts import reproduce
from scripts.reproductions import PAPERS, Measurement
from scripts.reproductions.noes import NOES, OPENS
from scripts.reproductions.tables import History


def test_a_measurement_by_hand() -> None:
    row = Measurement("q", "2 (paper)", (1.5, 3.0), (1.0, 2.0, 6.0))
    assert row.mean == 3.0
    # deviations -2, -1, 3: standard error sqrt(14 / 2 / 3) = 1.5275; t of two degrees of freedom 4.3027: 6.572
    assert row.interval == pytest.approx((3.0 - 6.5724, 3.0 + 6.5724), abs=1e-3)
    assert (row.kind, row.verdict) == ("estimate", "open"), "three such seeds say nothing"
    for value, verdict in ((0.0, "yes"), (1.0, "yes"), (1.01, "no"), (-0.01, "no"), (math.nan, "no")):
        exact = Measurement("q", "", (0.0, 1.0), (value,))
        assert (exact.kind, exact.verdict) == ("identity", verdict)


def test_a_claim_needs_its_whole_interval() -> None:
    claim = lambda *values: Measurement("q", "> 0", (0.0, math.inf), values)  # noqa: E731
    assert claim(1.0, 1.1, 0.9).kind == "claim"
    assert claim(1.0, 1.1, 0.9).verdict == "yes"  # 1 +- 4.303 * .0577
    assert claim(1.0, 3.0, -0.5).verdict == "open"
    assert claim(-1.0, -1.1, -0.9).verdict == "no"
    assert claim(1.0, math.nan).verdict == "no"


def test_final_and_area_of_a_history() -> None:
    history = History(None, reward=[float(i) for i in range(30)])  # type: ignore[arg-type]
    assert history.final() == 19.5
    assert history.final(last=2) == 28.5
    assert history.area == 14.5


def test_the_page_keeps_the_numbers_of_papers_that_did_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []

    def run(seeds: list[int]) -> list[Measurement]:
        asked.append(seeds)
        return [
            Measurement("exact |A|", "1 (paper)", (1.0, 1.0), (1.0,)),
            Measurement("mean", "0", (-1, 1), (3.0, 3.1)),
            Measurement("gap", "> 0", (0.0, math.inf), (2.0, float(len(asked)))),
        ]

    monkeypatch.setattr(reproduce.importlib, "import_module", lambda name: types.SimpleNamespace(run=run))
    page = tmp_path / "llm_reproductions.md"
    assert list(reproduce.main(reproduce.Options(papers=("bnpo",), seeds=2, results=tmp_path))) == ["bnpo"]
    first = page.read_text()
    reproduce.main(reproduce.Options(papers=("mhpo",), seeds=2, results=tmp_path))
    assert asked == [[0, 1], [0, 1]]
    text = page.read_text()
    assert f"## bnpo: {PAPERS['bnpo']}" in first
    assert f"## bnpo: {PAPERS['bnpo']}" in text
    assert f"## mhpo: {PAPERS['mhpo']}" in text
    assert "| exact \\|A\\| | 1 (paper) | 1 to 1 | 1 | identity | yes |" in text
    assert "| mean | 0 | -1 to 1 | 3.05 [2.415, 3.685] | estimate | **no** |" in text  # 12.706 * .05
    assert "| identity | 2 | 0 | 0 | 2 |" in text
    assert "| estimate | 0 | 0 | 2 | 2 |" in text
    assert "| claim | 1 | 1 | 0 | 2 |" in text  # (2, 1) is open with two seeds, (2, 2) is not
    assert "No numbers are kept yet of:" in text
    page.unlink()
    assert reproduce.main(reproduce.Options(page_only=True, results=tmp_path)) == {}
    assert page.read_text() == text


def test_the_usual_folder_by_a_relative_path(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []
    monkeypatch.setattr(reproduce, "write_atomic", lambda path, write: written.append(path))
    monkeypatch.chdir(ROOT)
    reproduce.main(reproduce.Options(page_only=True, results=Path("docs/figures/reproductions")))
    assert written == [ROOT / "docs" / "llm_reproductions.md"], "and the methods' pages are as they are"


def test_every_no_of_the_kept_numbers_has_a_reason() -> None:
    folder = reproduce.Options().results
    noes = {(slug, row.quantity) for slug in PAPERS if (folder / f"{slug}.csv").exists()
            for row in reproduce.load(folder / f"{slug}.csv")[0] if row.verdict == "no"}  # fmt: skip
    assert noes == set(NOES), "a number that does not hold needs a reason, and a reason such a number"


def test_open_numbers_have_a_reason() -> None:
    folder = reproduce.Options().results
    papers = {slug for slug in PAPERS if (folder / f"{slug}.csv").exists()
              for row in reproduce.load(folder / f"{slug}.csv")[0] if row.verdict == "open"}  # fmt: skip
    assert papers == set(OPENS), "a paper with open numbers needs a reason, and a reason such a paper"


def test_a_methods_page_has_todays_numbers() -> None:
    found = reproduce.Kept([Measurement("gap", "> 0", (0.0, math.inf), (1.0, 1.1, 0.9))], 7, "abcdef0")
    page = "# M\n\n<!-- reproduction: m -->\nstale\n<!-- end of reproduction -->\n\nafter\n"
    text = reproduce.embed(page, "m", found)
    assert "stale" not in text
    assert "commit abcdef0" in text
    assert "| gap | > 0 | 0 to inf | 1 [0.7516, 1.248] | claim | yes |" in text  # 4.303 * .1 / sqrt(3)
    assert text.startswith("# M\n\n<!-- reproduction: m -->\n\nMeans over 3 seeds")
    assert "`python scripts/reproduce.py --papers m --seeds 3`" in text, "the command makes what is shown"
    assert text.endswith("\n\n<!-- end of reproduction -->\n\nafter\n")
    assert reproduce.embed(text, "m", found) == text
    assert reproduce.embed(page, "other", found) == page


def test_pages_are_those_of_the_kept_numbers(tmp_path: Path) -> None:
    options = reproduce.Options()
    kept = (ROOT / "docs" / "llm_reproductions.md").read_text(encoding="utf-8")
    assert reproduce.page(options.results) == kept, "reproduce.py --page-only"
    for path in sorted((ROOT / "docs" / "llm").glob("*.md")):
        copy = tmp_path / path.name
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        reproduce.embed_page(copy, options.results)
        assert copy.read_text(encoding="utf-8") == path.read_text(encoding="utf-8"), f"reproduce.py --page-only: {path}"


def test_numbers_read_back(tmp_path: Path) -> None:
    rows = [
        Measurement("a, b", "> 0 (paper)", (0.0, math.inf), (0.25, -1e-9)),
        Measurement("c", "1", (1.0, 1.0), (1.0,)),
    ]
    reproduce.save(tmp_path / "x.csv", rows, 12.4, "abcdef0+")
    assert reproduce.load(tmp_path / "x.csv") == (rows, 12, "abcdef0+")


def test_every_paper_has_its_module() -> None:
    folder = Path(reproduce.__file__).parent / "reproductions"
    assert all((folder / f"{slug}.py").is_file() for slug in PAPERS)


@pytest.mark.parametrize("options", [{"papers": ("nobody",)}, {"seeds": 1}])
def test_bad_input(options: dict, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"expected papers among .* and seeds >= 2"):
        reproduce.main(reproduce.Options(**options, results=tmp_path))
