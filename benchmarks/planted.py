"""AUROC against samples on planted days, whose best possible AUROC is known.

It is the scale model of the question whether the public example reaches a validation AUROC of 0.8025.

    python -m benchmarks.planted --json benchmarks/results/planted_curve.json
    python -m benchmarks.pages            # draws docs/planted_curve.md

Synthesizes and preprocesses 3 million rows, trains one epoch of 2 million with validations on the way, and then once
more with the target as `--validation_auroc`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import altair
import vl_convert

from benchmarks.flags import Parser, result_file, run_script
from dlrm.bench.harness.provenance import read_summary, write_result

ROOT = Path(__file__).parent.parent
TARGET = 0.8025
PICTURE = "pictures/planted_curve.svg"
ROWS, DAYS = 3_000_000, 3
FLAGS = ("--recipe", "debug_cpu", "--batch_size", "512", "--test_batch_size", "8192", "--learning_rate", "0.02",
         "--validation_freq_within_epoch", "400", "--seed", "0")  # fmt: skip


def call(*command: str) -> None:
    """Runs a step of the way, whose output is shown."""
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)


def dlrm(*arguments: str) -> None:
    """The `dlrm` command."""
    call("-c", "import sys; from dlrm.cli import main; sys.exit(main(sys.argv[1:]))", *arguments)


def measure(scratch: Path) -> dict[str, Any]:
    """Truth, the curve, and the run that stops at the target."""
    raw, days = scratch / "raw", scratch / "days"
    dlrm("synthesize", str(raw), "--rows", str(ROWS), "--days", str(DAYS))
    dlrm("preprocess", *(str(raw / f"day_{day}.tsv") for day in range(DAYS)), "--output", str(days))
    columns = json.loads((days / "manifest.json").read_text())["columns"]
    table_rows = ",".join(str(facts["rows"]) for facts in columns.values())
    path = ("--in_memory_binary_criteo_path", str(days), "--num_embeddings_per_feature", table_rows)
    call("dlrm_main.py", *path, *FLAGS, "--run_dir", str(scratch / "curve"))
    call("dlrm_main.py", *path, *FLAGS, "--validation_auroc", str(TARGET), "--run_dir", str(scratch / "target"))
    lines = [json.loads(line) for line in (scratch / "curve" / "metrics.jsonl").read_text().splitlines()]
    curve = [{"samples": x["num_train_samples"], "auroc": x["auroc"]} for x in lines if x["kind"] == "val"]
    stopped = read_summary(scratch / "target")
    return {
        "flags": list(FLAGS),
        "truth": json.loads((raw / "truth.json").read_text()),
        "curve": curve,
        "test_auroc": read_summary(scratch / "curve")["test_auroc"],
        "target": TARGET,
        "target_reached": stopped["target_reached"],
        "samples_to_target": stopped["num_train_samples"],
    }


def draw_page(result: dict[str, Any]) -> str:
    """The page."""
    truth = result["truth"]
    rows = [f"| {point['samples']:,} | {point['auroc']:.4f} |" for point in result["curve"]]
    return "\n".join(
        [
            "# AUROC against samples, on planted days",
            "",
            "Drawn by `python -m benchmarks.pages` from what "
            "`python -m benchmarks.planted --json benchmarks/results/planted_curve.json` measured.",
            "",
            f"Three planted days of a million rows, {truth['click_rate']:.1%} clicks. No model can do better on the "
            f"held-out day than {truth['val_auroc']:.4f} (validation half) and {truth['test_auroc']:.4f} (test half). "
            f"One epoch of two million samples, `{' '.join(result['flags'])}`, with tables as large as the vocabulary.",
            "",
            f"![validation AUROC by samples]({PICTURE})",
            "",
            "| samples | validation AUROC |",
            "| --- | --- |",
            *rows,
            "",
            f"Test AUROC after the epoch: {result['test_auroc']:.4f}. With `--validation_auroc {result['target']}` the "
            f"run stops after {result['samples_to_target']:,} samples.",
            "",
            "This is the scale model of the public example's open question, whether it reaches a validation AUROC of "
            "0.8025 on Criteo 1TB, which is not at hand here.",
            "",
        ]
    )


def draw_picture(result: dict[str, Any]) -> str:
    """The curve, the target and the best possible, as SVG."""
    points = [{"samples": point["samples"] / 1e6, "auroc": point["auroc"]} for point in result["curve"]]
    best, target = result["truth"]["val_auroc"], result["target"]
    levels = [
        {"auroc": best, "label": f"best possible, {best:.4f}"},
        {"auroc": target, "label": f"target, {target}"},
    ]
    auroc = altair.Y("auroc:Q", title="validation AUROC", scale=altair.Scale(domain=[0.76, 0.86]))
    curve = altair.Chart(altair.Data(values=points)).mark_line(point=True)
    rules = altair.Chart(altair.Data(values=levels))
    x = altair.X("samples:Q", title="millions of samples", scale=altair.Scale(domain=[0, 2]))
    chart = altair.layer(
        curve.encode(x=x, y=auroc),
        rules.mark_rule(strokeDash=[4, 3], color="#888888").encode(y="auroc:Q"),
        rules.mark_text(align="left", dx=4, dy=-6, color="#555555").encode(
            x=altair.value(0), y="auroc:Q", text="label:N"
        ),
    ).properties(width=620, height=300)
    return vl_convert.vegalite_to_svg(chart.to_dict())


def main() -> None:
    """Measures and draws."""
    parser = Parser(description=__doc__)
    parser.add_argument("--json", type=result_file, required=True, help="where the result goes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(Path(scratch))
    write_result(arguments.json, result)


if __name__ == "__main__":
    run_script(main)
