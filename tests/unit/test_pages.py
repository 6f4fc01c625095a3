"""The pages of figures are what the committed results say."""

import functools
import json
import shutil
from pathlib import Path

import pytest

from benchmarks import pages
from benchmarks.figures import FIGURES
from benchmarks.pages import PROFILE_TEMPLATE, RESULTS, ROOT, SPEC_ROWS, TEMPLATE, draw_pages
from benchmarks.plans import CLUSTERS
from dlrm.config.recipes import RECIPES
from dlrm.errors import DatasetError

BYTES_PER_WEIGHT = 4
A_SPEED = min(path.name for path in (ROOT / RESULTS / "train").glob("*.json"))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A repository of nothing but results."""
    shutil.copytree(ROOT / RESULTS, tmp_path / RESULTS)
    for template in (TEMPLATE, PROFILE_TEMPLATE):
        shutil.copy(ROOT / template, tmp_path / template)
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


def test_a_row_names_its_machine_and_arithmetic(copy: Path) -> None:
    path = copy / RESULTS / "products.json"
    result = json.loads(path.read_text())
    result["precision"], result["machine"]["cpu"] = "int4", "Abacus"
    path.write_text(json.dumps(result))
    page = draw_pages(copy)["docs/results.md"].decode()
    (row,) = (line for line in page.splitlines() if line.startswith("| the MLPs' products through int4, "))
    assert " | Abacus | `dlrm bench products " in row


def test_growth_is_held_to_its_threshold(copy: Path) -> None:
    path = copy / RESULTS / "soak.json"
    result = json.loads(path.read_text())
    for trend in result["trends"]:
        trend["warm"], trend["has_grown"] = 600.0, False
    path.write_text(json.dumps(result))
    page = draw_pages(copy)["docs/results.md"].decode()
    assert " MiB (up to 14 MiB, 1% + 8 MiB, counts as noise), handles +0, threads +0: no growth |" in page


def test_the_guide_to_criteo_1tb_has_the_pages_commands() -> None:
    page = (ROOT / TEMPLATE).read_text()
    section = page[page.index("### AUROC on Criteo 1TB") : page.index("## What was run here")]
    commands = section.split("```")[1].strip().splitlines()
    assert [command.split()[0] for command in commands] == ["pip", "hf", "dlrm", "torchrun", "torchrun"]
    guide = (ROOT / "docs/guides/criteo_1tb.md").read_text().splitlines()
    assert [command for command in commands if command not in guide] == []


@pytest.mark.parametrize(("seconds", "text"), [(763, "12m43s"), (9123, "2h32m03s"), (59.6, "1m00s")])
def test_times_are_written_as_the_spec_does(seconds: float, text: str) -> None:
    assert pages._clock(seconds) == text


def test_a_result_that_is_missing_is_named(copy: Path) -> None:
    (copy / RESULTS / "soak.json").unlink()
    with pytest.raises(DatasetError, match=r"benchmarks/results/soak\.json: not there"):
        draw_pages(copy)


@pytest.mark.parametrize(
    ("name", "keys", "value", "words"),
    [
        ("kills.json", (), None, "is no JSON"),
        ("kills.json", ("runs",), None, "has no runs"),
        ("kills.json", ("runs",), 3, "can't be drawn"),
        ("kills.json", ("commit",), None, "has no commit"),
        ("soak.json", ("trends",), [], "can't be drawn"),
        ("soak.json", ("trends", 0, "growth"), float("nan"), "is no JSON"),
        ("startup.json", ("ratios_to_import_torch",), {"dlrm --help": 1.0}, "has no dlrm_main.py --help"),
        ("planted_curve.json", ("truth", "val_auroc"), None, "has no val_auroc"),
        ("plans.json", ("plans", 0, "facts", "step"), None, "has no step"),
        ("plans.json", ("plans",), [], "can't be drawn"),
        ("calibration.json", ("errors",), None, "has no errors"),
        ("scaling.json", ("points", 0, "mode"), None, "has no mode"),
        ("scaling.json", ("assumptions",), None, "has no assumptions"),
        (f"train/{A_SPEED}", ("share_of_floor",), None, "has no share_of_floor"),
    ],
)
def test_a_damaged_result_is_named(
    copy: Path, name: str, keys: tuple[str | int, ...], value: object, words: str
) -> None:
    """`value` in place of what stands at `keys`; None: removed."""
    path = copy / RESULTS / name
    result = json.loads(path.read_text())
    if not keys:
        path.write_text(path.read_text()[:-9])
    else:
        *outer, last = keys
        owner = functools.reduce(lambda content, key: content[key], outer, result)
        owner.pop(last) if value is None else owner.__setitem__(last, value)
        path.write_text(json.dumps(result))
    with pytest.raises(DatasetError, match=rf"{RESULTS / name}.*: {words}"):
        draw_pages(copy)


def test_what_is_no_text_and_what_is_no_object(copy: Path) -> None:
    path = copy / RESULTS / "kills.json"
    for content, words in ((b"\xff\xfe", "is no JSON"), (b"[1]", "is no JSON object"), (b"[" * 10**5, "is no JSON")):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=f"{path}: {words}"):
            draw_pages(copy)


def test_check_tells_a_stale_page(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(pages, "ROOT", copy)
    monkeypatch.setattr("sys.argv", ["pages"])
    assert pages.main() == 0
    monkeypatch.setattr("sys.argv", ["pages", "--check"])
    capsys.readouterr()
    assert pages.main() == 0
    assert capsys.readouterr().out == "5 pages and pictures are what the results say.\n"
    (copy / "docs/results.md").write_text("edited by hand")
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
