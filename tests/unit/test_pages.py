"""The pages of figures are what the committed results say."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import pages
from benchmarks.figures import FIGURES
from benchmarks.pages import RESULTS, ROOT, SPEC_ROWS, TEMPLATE, draw_pages
from benchmarks.plans import CLUSTERS
from dlrm.errors import DatasetError
from dlrm.recipes import RECIPES

BYTES_PER_WEIGHT = 4


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository of nothing but results."""
    shutil.copytree(ROOT / RESULTS, tmp_path / RESULTS)
    shutil.copy(ROOT / TEMPLATE, tmp_path / TEMPLATE)
    return tmp_path


def test_committed_pages_are_what_the_results_say_to_the_byte() -> None:
    for name, page in draw_pages(ROOT).items():
        assert (ROOT / name).read_bytes() == page, f"{name}: run `python -m benchmarks.pages`"


def test_another_figure_makes_another_page(copy: Path) -> None:
    path = copy / RESULTS / "quality_kaggle_sample.json"
    result = json.loads(path.read_text())
    before = draw_pages(copy)["docs/results.md"].decode()
    for run in result["runs"]:
        run["val"] = 0.8125
    path.write_text(json.dumps(result))
    after = draw_pages(copy)["docs/results.md"].decode()
    assert "val 0.8125 (0.0000), test" in after
    assert "val 0.8125" not in before


def test_a_result_that_is_missing_is_named(copy: Path) -> None:
    (copy / RESULTS / "soak.json").unlink()
    with pytest.raises(DatasetError, match=r"benchmarks/results/soak\.json: not there"):
        draw_pages(copy)


def test_check_tells_a_stale_page(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(pages, "ROOT", copy)
    monkeypatch.setattr("sys.argv", ["pages"])
    assert pages.main() == 0
    monkeypatch.setattr("sys.argv", ["pages", "--check"])
    assert pages.main() == 0
    (copy / "docs/results.md").write_text("edited by hand")
    capsys.readouterr()
    assert pages.main() == 1
    assert capsys.readouterr().out == "docs/results.md: not what the results say. Run `python -m benchmarks.pages`.\n"


def test_every_result_is_on_the_page() -> None:
    drawn = {figure.file for figure in FIGURES} | pages.DRAWN_OTHERWISE
    assert drawn == {path.name for path in (ROOT / RESULTS).glob("*.json")}


@pytest.mark.parametrize("row", SPEC_ROWS, ids=lambda row: row.name)
def test_sizes_of_the_spec_follow_from_the_recipes(row: pages.SpecRow) -> None:
    model = RECIPES[row.recipe]().model
    gib = sum(model.table_rows) * model.embedding_dim * BYTES_PER_WEIGHT / 2**30
    assert f"{gib:.2f}" == f"{row.gib:.2f}"
    plans = json.loads((ROOT / RESULTS / "plans.json").read_text())["plans"]
    planned = next(plan for plan in plans if plan["recipe"] == row.recipe and not plan["flags"])
    assert planned["facts"]["tables_gib"] == pytest.approx(gib, rel=1e-12)
    assert planned["facts"]["cluster"]["name"] == CLUSTERS[row.recipe]
