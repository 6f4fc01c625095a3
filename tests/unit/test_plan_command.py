"""`dlrm plan`: what it says of the example's three runs, of what does not fit, and of mistakes."""

import errno
import json
import re
from pathlib import Path

import pytest
import torch

from dlrm.cli import main
from dlrm.config.config import ModelConfig
from dlrm.cost.work import dense_parameters
from dlrm.loader.dense_statistics import DenseStatistics
from dlrm.model.dlrm import DLRM
from dlrm.plan.cluster_search import fewest
from dlrm.plan.picture import _named_ranks
from dlrm.schema.criteo import NUM_INTEGER_FEATURES

USER_ERROR = 2
PLANS = Path(__file__).parents[2] / "benchmarks" / "results" / "plans.json"
SMALL = ("--num_embeddings", "1000", "--cluster", "h100:1x2")
LARGE = ("--num_embeddings", "1000000", "--table_constraints", "all = fused", "--device_memory_gib", "2")
"""6.20 GiB of tables, which must lie on GPUs of 2 GiB."""


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == USER_ERROR
    *signs_of_life, error = capsys.readouterr().err.splitlines()
    assert all(line.startswith("Placing tables on ") for line in signs_of_life)
    assert error.startswith("dlrm plan: error: ")
    return error


@pytest.mark.parametrize(
    ("recipe", "cluster", "gib", "samples"),
    [
        ("spec_mlperf_a100x8", "a100_40gb:1x8", "97.36", 65_536),
        ("spec_mlperf_x2_a100x16", "a100_40gb:2x8", "174.03", 65_536),
        ("spec_full_size_a100x80", "a100_40gb:10x8", "420.94", 65_520),
    ],
)
def test_the_examples_three_runs(
    capsys: pytest.CaptureFixture[str], recipe: str, cluster: str, gib: str, samples: int
) -> None:
    facts = plan_json(capsys, "--recipe", recipe, "--cluster", cluster)
    assert f"{facts['tables_gib']:.2f}" == gib
    assert facts["fits"]
    assert facts["global_batch_size"] == samples
    assert facts["step"]["samples_per_second"] == pytest.approx(samples / facts["step"]["step_time_ms"] * 1e3)
    ranks = facts["memory_gib_per_rank"]
    assert len(ranks) == facts["cluster"]["world_size"]
    for rank in ranks:
        assert rank["free"] >= 0
    copied = sum(t["gib"] * (len(ranks) - 1) for t in facts["tables"] if t["sharding"] == "data_parallel")
    dense = sum(rank["weights"] for rank in ranks) - copied - facts["tables_gib"]
    assert 0 < dense / len(ranks) < 0.02  # GiB a rank
    planned = json.loads(PLANS.read_text())["plans"]
    committed = next(plan["facts"] for plan in planned if plan["recipe"] == recipe and not plan["flags"])
    assert committed["step"]["step_time_ms"] == pytest.approx(facts["step"]["step_time_ms"], rel=1e-6)


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL]) == 0
    text = capsys.readouterr().out
    assert "h100:1x2, 1 host of 2 devices, 2 ranks; 80.0 GiB each" in text
    assert len(re.findall(r"^t_cat_\d+ .*(_wise|data_parallel) ", text, re.MULTILINE)) == 26
    for line in ("GiB of rank", "dense all-reduce", "lookup ", "communication ", "dense ", "step ", "samples/s"):
        assert re.search(f"^{line}", text, re.MULTILINE), line
    assert "bound by" in text


def test_all_that_travels_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    facts = plan_json(capsys, *SMALL, "--table_constraints", "all = table_wise", "--batch_size", "64")
    sizes = {one["name"]: one["num_bytes"] for one in facts["collectives"]}
    # Each of two ranks sends the other what the other's tables need, or what its own give: 26 x 64 samples in all.
    assert sizes["input ids all-to-all"] == 26 * 64 * (4 + 4)
    assert sizes["pooled all-to-all"] == sizes["gradient all-to-all"] == 26 * 64 * 64 * 4
    assert sizes["dense all-reduce"] == 2 * 4 * dense_parameters(ModelConfig())
    halved = plan_json(
        capsys,
        *SMALL,
        "--table_constraints",
        "all = table_wise",
        "--batch_size",
        "64",
        "--forward_comm_precision",
        "fp16",
    )
    shrunk = {one["name"]: one["num_bytes"] for one in halved["collectives"]}
    assert shrunk["pooled all-to-all"] * 2 == sizes["pooled all-to-all"]
    assert shrunk["gradient all-to-all"] == sizes["gradient all-to-all"]


def test_tables_in_host_memory_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    rules = "t_cat_3 = fused_uvm; t_cat_5 = fused_uvm_caching"
    assert main(["plan", *SMALL]) == 0
    assert "Host memory" not in capsys.readouterr().out
    assert main(["plan", "--num_embeddings", "1000000", "--cluster", "h100:1x2", "--table_constraints", rules]) == 0
    assert (
        "Host memory: 0.48 GiB of weights (t_cat_3, t_cat_5) are read over the bus by UVM kernels, but for rows in a "
        "cache on the GPU." in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("mlperf_v1", "h100:1x8"), "2,048 samples a rank, 16,384 a step"),
        (
            ("mlperf_v1", "h100:2x8"),
            "2,048 samples a rank, 32,768 a step; the recipe's step is 16,384: 8 ranks of 2,048 "
            "(--batch_size 1024 gives that here)",
        ),
        (("mlperf_v1", "h100:2x8", "--batch_size", "1024"), "1,024 samples a rank, 16,384 a step"),
        (
            ("spec_full_size_a100x80", "b200:3x16"),
            "819 samples a rank, 39,312 a step; the recipe's step is 65,520: 80 ranks of 819 "
            "(--batch_size 1365 gives that here)",
        ),
        (
            ("mlperf_v1", "h100:3x1"),
            "2,048 samples a rank, 6,144 a step; the recipe's step is 16,384: 8 ranks of 2,048",
        ),
        (("debug_cpu", "h100:3x1"), "256 samples a rank, 768 a step"),
    ],
)
def test_another_global_batch_than_the_recipes_is_said(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], line: str
) -> None:
    recipe, cluster, *flags = arguments
    assert main(["plan", "--recipe", recipe, "--num_embeddings", "1000", "--cluster", cluster, *flags]) == 0
    assert re.search(rf"^batch +{re.escape(line)}$", capsys.readouterr().out, re.MULTILINE)


def test_one_rank_and_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    facts = plan_json(capsys, "--recipe", "debug_cpu", "--cluster", "cpu:1x1")
    assert facts["collectives"] == []
    assert facts["step"]["exposed_communication_time_ms"] == pytest.approx(0)
    assert facts["optimizer_gib"] == pytest.approx(facts["tables_gib"])  # adagrad
    assert main(["plan", "--recipe", "debug_cpu", "--cluster", "cpu:1x1"]) == 0
    assert "one rank: nothing travels" in capsys.readouterr().out


@pytest.mark.parametrize(("recipe", "cluster"), [("kaggle", "h100:1x8"), ("kaggle_sample", "cpu:1x2")])
def test_recipes_of_real_data_need_none(capsys: pytest.CaptureFixture[str], recipe: str, cluster: str) -> None:
    assert plan_json(capsys, "--recipe", recipe, "--cluster", cluster)["fits"]
    assert "--dataset_name criteo_kaggle needs" in refusal(
        capsys, "--recipe", recipe, "--cluster", cluster, "--dataset_name", "criteo_kaggle"
    )


def test_flags_replace_numbers_of_the_kind(capsys: pytest.CaptureFixture[str]) -> None:
    base = plan_json(capsys, *SMALL)
    slow = plan_json(
        capsys, *SMALL, "--intra_host_bandwidth", "0.5", "--fp32_tflops", "0.1", "--matrix_efficiency", "1"
    )
    assert base["cluster"]["intra_host_bandwidth_gib_per_second"] == pytest.approx(450e9 / 2**30)
    assert slow["cluster"]["intra_host_bandwidth_gib_per_second"] == 0.5
    assert slow["cluster"]["matrix_tflops"]["fp32"] == pytest.approx(0.1)
    assert slow["step"]["step_time_ms"] > base["step"]["step_time_ms"]
    assert slow["cluster"]["matrix_efficiency"] == 1
    tf32 = plan_json(capsys, *SMALL, "--allow_tf32", "--batch_size", "8192")
    fp32 = plan_json(capsys, *SMALL, "--batch_size", "8192")
    assert tf32["precision"] == "tf32"
    assert tf32["step"]["dense_time_ms"] < fp32["step"]["dense_time_ms"]


def test_activations_that_do_not_fit_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    large = (*SMALL, "--batch_size", "1000000", "--device_memory_gib", "40", "--reserved_memory_share", "0.05")
    assert main(["plan", *large, "--json"]) == USER_ERROR
    facts = json.loads(capsys.readouterr().out)
    assert not facts["fits"]
    assert main(["plan", *large]) == USER_ERROR
    shown = capsys.readouterr()
    assert "GiB of rank" in shown.out  # all else is said
    assert f"are expected to need {facts['activations_missing_gib']:.2f} GiB more" in shown.err
    assert "What would help: a smaller --batch_size;" in shown.err
    assert plan_json(capsys, *SMALL)["activations_missing_gib"] == 0


def test_dense_layers_take_no_memory_and_are_refused_where_they_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *SMALL, "--over_arch_layer_sizes", "1000000,1000000,1"]) == USER_ERROR  # 3.6 TiB
    error = capsys.readouterr().err
    assert (
        "the dense layers and replicated tables with their gradients and optimizer state, whatever the batch" in error
    )
    assert "--batch_size" not in error


def test_a_batch_that_does_not_fit_is_not_laid_on_the_tables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlrm.plan.cluster_search.MOST_SEARCHED_RANKS", 4)
    error = refusal(capsys, *SMALL, "--batch_size", "8000000", "--device_memory_gib", "20")
    assert "What would help: a smaller --batch_size or --test_batch_size (the larger is 8,000,000 samples" in error
    assert "--num_embeddings" not in error


def test_host_memory_that_is_short_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--num_embeddings", "1000000", "--device_memory_gib", "2", "--host_memory_gib", "3")
    error = refusal(capsys, *flags, "--cluster", "h100:1x2")
    assert "2 ranks of 1.27 GiB of the host" in error
    assert "What would help: more hosts, or hosts with more memory;" in error
    assert "uvm" not in error


def test_a_long_search_gives_signs_of_life(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlrm.system.console._SECONDS_TO_FIRST_SIGN", 0.01)
    assert main(["plan", *LARGE, "--cluster", "h100:1x2", "--json"]) == USER_ERROR
    shown = capsys.readouterr()
    assert json.loads(shown.out)["smallest_cluster"]
    assert re.search(r"^Placing tables on 2 ranks: 0:00:\d\d so far$", shown.err, re.MULTILINE)
    assert re.search(r"^Placing tables on larger clusters: 0:00:\d\d so far$", shown.err, re.MULTILINE)


def test_tf32_without_a_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--num_embeddings", "1000", "--cluster", "cpu:1x2", "--allow_tf32"]) == 0
    assert "No GPU in cpu:1x2: tf32 without effect." in capsys.readouterr().out


def test_what_does_not_fit_names_the_fewest_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(capsys, *LARGE, "--cluster", "h100:1x2")
    found = re.search(
        r"each rank needs (\S+) GiB more, .* On all ranks (\S+) GiB are missing; "
        r"--cluster h100:(\d)x2 has the fewest such hosts",
        error,
    )
    assert found is not None
    assert float(found[2]) == pytest.approx(2 * float(found[1]), abs=0.011)
    hosts = int(found[3])
    assert plan_json(capsys, *LARGE, "--cluster", f"h100:{hosts}x2")["fits"]
    assert main(["plan", *LARGE, "--cluster", f"h100:{hosts - 1}x2", "--json"]) == USER_ERROR
    facts = json.loads(capsys.readouterr().out)
    assert (facts["fits"], facts["smallest_cluster"]) == (False, f"h100:{hosts}x2")
    assert facts["missing_gib"] == pytest.approx(facts["missing_gib_per_rank"] * (hosts - 1) * 2)


def test_no_cluster_holds_copies_that_are_too_large(capsys: pytest.CaptureFixture[str]) -> None:
    rules = ("--table_constraints", "all = data_parallel", "--device_memory_gib", "2")
    error = refusal(capsys, "--num_embeddings", "1000000", *rules, "--cluster", "h100:1x16")
    assert "more hosts of this kind would not do" in error


@pytest.mark.parametrize("threshold", [3, 4, 5, 8, 13, 30, 31, 32, 99])
def test_the_search_finds_the_fewest(threshold: int) -> None:
    asked = []

    def fits(hosts: int) -> bool:
        asked.append(hosts)
        return hosts >= threshold

    assert fewest(fits, 3, 31) == (threshold if threshold <= 31 else None)
    assert len(asked) <= 10
    assert max(asked) <= 31


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "missing: --cluster"),
        (("--cluster", "a100:1x8"), "no kind a100, expected one of a100_40gb, a100_80gb, h100, h200, b200, cpu"),
        (("--cluster", "a100_40gb:\uff11x8"), "expected KIND:HOSTSxDEVICES"),
        (("--cluster", "a100_40gb:1x" + "9" * 5000), "expected KIND:HOSTSxDEVICES"),
        (("--cluster", "a100_40gb:99999999999x8"), "799,999,999,992 ranks, expected 4,096 or fewer"),
        (("--cluster", "a100_40gb:8"), "expected KIND:HOSTSxDEVICES, as in a100_40gb:2x8"),
        (("--cluster", "h100:1x8", "--recipe", "nothing"), "--recipe nothing: expected one of"),
        (("--cluster", "h100:1x8", "--batch_size", "0"), "--batch_size 0: expected more than 0"),
        (("--cluster", "h100:1x8", "--fp32_tflops", "0"), "--fp32_tflops 0.0: expected 1e-06 or more"),
        (
            ("--cluster", "h100:1x8", "--memory_bandwidth", "1e-300"),
            "--memory_bandwidth 1e-300: expected 0.001 or more",
        ),
        (("--cluster", "h100:1x8", "--host_memory_gib", "1e-300"), "--host_memory_gib 1e-300: expected 0.001 or more"),
        (("--cluster", "h100:1x8", "--memory_efficiency", "1e-300"), "1e-300: expected 1e-06 or more"),
        (("--cluster", "cpu:1x2", "--device_memory_gib", "1e-9"), "--device_memory_gib 1e-09: expected 0.001 or more"),
        (
            ("--cluster", "cpu:1x2", "--device_memory_gib", "0.001", "--reserved_memory_share", "0.9999999999"),
            "do not fit: 2 ranks of 0.00 GiB",
        ),
        (
            ("--cluster", "h100:1x8", "--interaction_type", "dcn", "--dcn_num_layers", "1000000000"),
            "--dcn_num_layers 1000000000: expected 1000 or less",
        ),
        (
            ("--cluster", "h100:1x8", "--over_arch_layer_sizes", ",".join(["1"] * 1001)),
            "--over_arch_layer_sizes: got 1,001 sizes, expected 1,000 or fewer",
        ),
        (
            ("--cluster", "h100:1x8", "--int16_tflops", "3"),
            "--int16_tflops 3 with --cluster h100:1x8: matrix products are in fp32 there",
        ),
        (
            ("--cluster", "cpu:1x2", "--tf32_tflops", "3", "--allow_tf32"),
            "--tf32_tflops 3 with --cluster cpu:1x2: matrix products are in fp32 there",
        ),
        (
            ("--cluster", "cpu:1x2", "--host_device_bandwidth", "3"),
            "--host_device_bandwidth 3 with --cluster cpu:1x2: tables are in the memory of the CPU itself",
        ),
        (
            ("--cluster", "cpu:1x2", "--host_memory_gib", "3", "--device_memory_gib", "8"),
            "--host_memory_gib 3 with --cluster cpu:1x2: --device_memory_gib says already",
        ),
        (("--cluster", "h100:1x8", "--network_efficiency", "1.5"), "--network_efficiency 1.5: expected 1.0 or less"),
        (("--cluster", "h100:1x8", "--bf16_tflop", "3"), "not a flag; did you mean --bf16_tflops"),
        (
            ("--cluster", "h100:1x8", "--precision", "int16"),
            "--precision int16 with --cluster h100:1x8: expected one of",
        ),
        (
            ("--cluster", "h100:1x8", "--plot", "plan.png"),
            "--plot plan.png: expected a name that ends in .html or .svg",
        ),
        (("--cluster", "cpu:1x2", "--optimizer", "adam"), "no fused Adam on a CPU"),
        (("--cluster", "h100:1x8", "--table_constraints", "t_cat_0 = table_wise ranks=8"), "expected 0 to 7"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    assert message in refusal(capsys, *arguments)


def test_help_explains_the_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    assert "a100_40gb:2x8 is 2 hosts of 8 GPUs" in " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(),
        ModelConfig(standardize_dense=True, dense_buckets=5),
        ModelConfig(interaction_type="dcn", dcn_num_layers=2, dcn_low_rank_dim=16),
        ModelConfig(interaction_type="projection", interaction_branch1_layer_sizes=(8, 128)),
    ],
)
def test_dense_parameters_are_the_models(config: ModelConfig) -> None:
    model = DLRM(config, torch.device("meta"), _statistics(config))
    expected = sum(p.numel() for name, p in model.named_parameters() if ".embedding_bags." not in name)
    assert dense_parameters(config) == expected


def _statistics(config: ModelConfig) -> DenseStatistics | None:
    if not config.needs_dense_statistics:
        return None
    return DenseStatistics.of(torch.empty(0, NUM_INTEGER_FEATURES).numpy(), config.dense_buckets)


def test_a_picture_is_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    for name in ("plan.svg", "pictures/plan.html"):
        assert main(["plan", "--recipe", "debug_cpu", *SMALL, "--plot", str(tmp_path / name)]) == 0
        drawn = (tmp_path / name).read_text()
        for words in ("Memory of each rank", "Timeline of a step", "weights", "communication"):
            assert words in drawn
        assert "debug_cpu: " in drawn
    assert 'src="http' not in (tmp_path / "pictures/plan.html").read_text()  # it opens where there is no network


def test_a_picture_names_every_span(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")
    path = tmp_path / "plan.svg"
    assert main(["plan", *SMALL, "--json", "--plot", str(path)]) == 0
    spans = json.loads(capsys.readouterr().out)["step"]["timeline"]
    shown = re.findall(r">([^<>]+), [0-9.]+ ms</text>", path.read_text())
    assert shown == [span["name"] for span in spans]
    assert len(shown) > 10


@pytest.mark.parametrize(("num_ranks", "step"), [(1, 1), (8, 1), (32, 1), (33, 2), (80, 5), (4096, 200)])
def test_ranks_that_a_picture_names(num_ranks: int, step: int) -> None:
    assert _named_ranks(num_ranks) == list(range(0, num_ranks, step))


def test_a_picture_that_can_not_be_written_leaves_the_old_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("altair")
    pytest.importorskip("vl_convert")

    def refuse(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    old = tmp_path / "plan.svg"
    old.write_text("old")
    monkeypatch.setattr("os.fsync", refuse)
    assert f"--plot {old}: can't be written (the disk is full)" in refusal(capsys, *SMALL, "--plot", str(old))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_picture_that_can_not_be_written_is_refused_before_the_search(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("dlrm.plan.command.plan", None)  # a search would fail
    assert "--plot" in refusal(capsys, *SMALL, "--plot", str(tmp_path / "file" / "plan.svg"))


def test_a_picture_needs_its_packages(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "--plot: the package altair is not installed" in refusal(capsys, *SMALL, "--plot", "plan.svg")
