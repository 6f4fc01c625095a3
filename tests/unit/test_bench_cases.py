"""Each case from flags to JSON, tiny, with both sides in this process: what runs in a worker is the same."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from dlrm.bench.cases import checkpoint, products, torchrec_preprocess
from dlrm.bench.cases import preprocess as preprocess_module
from dlrm.bench.harness import ceilings
from dlrm.bench.harness import flags as config
from dlrm.bench.harness import repeat as micro
from dlrm.bench.harness import rounds as rounds_module
from dlrm.bench.harness.workers import Reply, Side
from dlrm.cli import main
from dlrm.kernels import build, native

# 2026-11-23: torchrec 1.8, put together as its documentation does, warns of itself; a worker ignores all warnings.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{start}")
    for start in ("HeuristicalStorageReservation", "`broadcast_buffers` is deprecated", "The given NumPy array is not")
]


class InProcess:
    """Stands for a side's processes."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self._context = side.open(*side.arguments)
        self._turns = self._context.__enter__()

    def open(self) -> None:
        """Is open."""

    def take_turn(self, name: str) -> list[Reply]:
        return [Reply(self._turns[name](), 1.0)]


@contextmanager
def start_in_process(side: Side) -> Iterator[InProcess]:
    yield InProcess(replace(side, ranks=1))


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """`bench(case, *flags)`: runs `dlrm bench` and gives what it wrote."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as a worker's environment has it; threads waiting for each other crawl
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(rounds_module, "start_workers", start_in_process)
    monkeypatch.setattr(ceilings, "_SECONDS", 0.0)
    monkeypatch.setattr(ceilings, "_SIZES", (64,))
    monkeypatch.setattr(ceilings, "_COPIED_BYTES", 1 << 20)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def run(case: str, *flags: str) -> dict:
        path = tmp_path / "results" / f"{case}.json"
        assert main(["bench", case, "--rounds", "2", "--json", str(path), *flags]) == 0
        return json.loads(path.read_text())

    yield run
    dist.destroy_process_group()
    torch.set_num_threads(threads)


TINY = ("--ranks", "1", "--batch_size", "16", "--precision", "fp32")


def check_top_level(result: dict, case: str, rounds: int = 2) -> None:
    assert result["case"] == case
    assert result["ratio"] > 0
    assert len(result["ratios"]) == rounds
    assert result["share_of_floor"] > 0
    assert result["floor"]["bytes_per_second"] > 0
    assert {"command", "commit", "versions", "machine"} <= result.keys()
    for side in ("ours", "reference"):
        content = result["sides"][side]
        assert [len(times) for times in content["step_seconds"]] == [len(content["step_seconds"][0])] * rounds
        assert content["samples_per_second"]["min"] <= content["samples_per_second"]["median"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--num_embeddings", "50", "--optimizer", "sgd"),
        ("--rows", "mlperf", "--tables_gib", "0.001", "--optimizer", "rowwise_adagrad"),
    ],
)
def test_train(bench, flags, capsys):
    result = bench("train", *TINY, "--steps", "3", *flags)
    check_top_level(result, "train")
    for side in result["sides"].values():
        assert len(side["step_seconds"][0]) == 3
        assert side["peak_rss_gib"] == [1.0]
        assert 0 < side["tables_gib"][0] <= 0.001 or flags[0] == "--num_embeddings"
    optimizer = flags[-1]
    assert (result["sides"]["ours"]["state_gib"] == [0.0]) == (optimizer == "sgd")
    assert result["sides"]["ours"]["tables_gib"] == result["sides"]["reference"]["tables_gib"]
    assert result["config"]["optimizer"]["optimizer"] == optimizer
    shown = capsys.readouterr().out
    assert "ratio by round" in shown
    assert f"ours: 1 thread a rank, {result['sides']['ours']['kernels'][0]}; memory by " in shown


def test_sides_that_do_not_fit_at_once(bench, monkeypatch, capsys):
    monkeypatch.setattr(rounds_module, "available_memory_bytes", lambda _: 1 << 30)
    result = bench("train", *TINY, "--steps", "1", "--num_embeddings", "10")
    check_top_level(result, "train")
    assert result["at_once"] is False
    assert "1.0 are free: each turn starts processes anew." in capsys.readouterr().out


def test_evaluate(bench):
    result = bench("evaluate", *TINY, "--steps", "2", "--num_embeddings", "50")
    check_top_level(result, "evaluate")
    assert result["over_training"] > 0
    assert result["sides"]["ours"]["samples_per_step"] == 32
    assert [len(times) for times in result["training"]["step_seconds"]] == [2, 2]


@pytest.mark.parametrize("flags", [(), ("--shuffle_training_set",)])
def test_loader(bench, flags):
    result = bench("loader", *TINY, "--num_embeddings", "50", "--num_rows", "165", *flags)
    check_top_level(result, "loader")
    assert result["over_training"] > 0
    for side in result["sides"].values():
        assert len(side["step_seconds"][0]) == 11
        assert side["samples_per_step"] == 15.0


def test_preprocess(bench, monkeypatch, capsys):
    def run_torchrec(raw: Sequence[Path], folder: Path) -> dict:  # without a process's ten seconds of imports
        stages = torchrec_preprocess.preprocess(raw, folder)
        return {"stages": stages, "through_shuffle": sum(stages.values())}

    monkeypatch.setattr(preprocess_module, "run_torchrec", run_torchrec)
    result = bench("preprocess", "--num_rows", "300", "--rounds", "1")
    check_top_level(result, "preprocess", rounds=1)
    assert result["ratio_of_whole_process"] > 0
    assert result["sides"]["reference"]["stages"][0]["stages"].keys() == {
        *("tsv_to_npys", "sparse_to_contiguous", "shuffle")
    }
    assert "our whole process, verification and start-up included" in capsys.readouterr().out
    assert "parsing" in result["sides"]["ours"]["stages"][0]["stages"]


def test_checkpoint(bench, tmp_path, capsys):
    flags = ("--steps", "2", "--num_embeddings", "50", "--embedding_dim", "8", "--folder", str(tmp_path))
    result = bench("checkpoint", *TINY, *flags)
    assert (result["case"], result["ratio"] > 0, len(result["ratios"])) == ("checkpoint", True, 2)
    assert result["saved_gib"] * 2**30 > 26 * 50 * (8 + 1) * 4  # weights, and row-wise Adagrad's state
    seconds = result["seconds"]
    for name in ("ours: stall", "torch.save", "torch.save, fsync", "ours: check, restore", "torch.load"):
        assert 0 < seconds[name]["min"] <= seconds[name]["median"] <= seconds[name]["max"]
    assert seconds["ours: stall"]["median"] < seconds["ours: saved while training"]["median"]
    for name in ("save_ratio", "load_ratio", "ratio_without_fsync", "rate_while_writing"):
        assert result[name] > 0
    assert [len(turn["quiet_steps"]) for turn in result["steps"]] == [2, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"results"}
    assert "torch.save with fsync stops it" in capsys.readouterr().out


def test_checkpoint_on_a_disk_that_is_too_small(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    assert main(["bench", "checkpoint", "--folder", str(tmp_path)]) == 2
    assert f"{tmp_path}: 1.0 GiB free, expected 3.7 GiB. Give smaller tables" in capsys.readouterr().err


def test_interaction(bench):
    require_kernels()
    result = bench("interaction", "--batch_size", "8", "--steps", "3", "--precision", "bf16")
    check_top_level(result, "interaction")
    assert result["over_twin"] > 0
    assert len(result["sides"]["twin"]["step_seconds"][1]) == 3


@pytest.mark.parametrize(("optimizer", "precision"), [("rowwise_adagrad", "fp32"), ("sgd", "bf16")])
def test_embedding(bench, optimizer, precision):
    require_kernels()
    flags = ("--optimizer", optimizer, "--precision", precision, "--num_embeddings", "20", "--zipf_exponent", "1.2")
    result = bench("embedding", "--batch_size", "8", "--steps", "3", *flags)
    check_top_level(result, "embedding")
    assert result["bench"]["workload"]["optimizer"] == optimizer


@pytest.mark.parametrize("precision", ["int16", "int8"])
def test_products(bench, precision):
    if (why := native.why_no_vnni()) is not None:
        pytest.skip(why)
    result = bench("products", "--batch_size", "8", "--steps", "3", "--precision", precision)
    check_top_level(result, "products")
    assert result["precision"] == precision
    layers = {"512-256", "256-128", "479-1024", "1024-1024", "1024-512"}
    assert {name: len(values) for name, values in result["ratios_by_layer"].items()} == dict.fromkeys(layers, 2)


def test_no_integer_products_to_measure(monkeypatch, capsys):
    monkeypatch.setattr(products, "why_no_vnni", lambda: "this CPU has no AVX-512 VNNI")
    assert main(["bench", "products"]) == 2
    expected = "dlrm bench: error: no integer products to measure: this CPU has no AVX-512 VNNI\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("flags", "best", "storage"),
    [
        ({"avx512_vnni"}, "int16", "fp32"),
        ({"avx512_vnni", "avx512_bf16"}, "int8", "bf16"),
        ({"avx512_vnni", "avx512_bf16", "amx_bf16"}, "bf16", "bf16"),
        ({"avx2"}, "fp32", "fp32"),
    ],
)
def test_precision_by_default_is_the_fastest(monkeypatch, flags, best, storage):
    monkeypatch.setattr(config, "cpu_flags", lambda: frozenset(flags))
    assert config.Shape().arithmetic == best
    assert config.EmbeddingBench().arithmetic == storage


def test_no_kernels_to_measure(bench, monkeypatch, capsys):
    monkeypatch.setattr(micro, "load_native", lambda: "not compiled")
    assert main(["bench", "interaction"]) == 2
    assert capsys.readouterr().err == "dlrm bench: error: no compiled operators to measure: not compiled\n"


def require_kernels() -> None:
    if build.find_compiler() is None:
        pytest.skip("no C++ compiler: there is nothing to measure")
    assert build.main() == 0
    native.load_native.cache_clear()
