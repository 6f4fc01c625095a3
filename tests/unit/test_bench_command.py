import json
import subprocess
import sys
from pathlib import Path

import pytest

from dlrm.bench.command import CASES
from dlrm.bench.harness.flags import Shape, Workload
from dlrm.bench.harness.shape import make_config, memory_gib, scale_rows, table_rows
from dlrm.cli import main
from dlrm.config.checks import check_config
from dlrm.config.recipes import MLPERF_ROWS

USER_ERROR = 2


def test_usage(capsys):
    assert main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    for name, (_, purpose) in CASES.items():
        assert f"  {name:<12}{purpose}\n" in shown
    assert main(["bench"]) == USER_ERROR


def test_help_teaches_without_torch():
    code = (
        "import sys\nfrom dlrm.cli import main\n"
        f"for case in {list(CASES)}:\n"
        "    main(['bench', case, '--help'])\n"
        "print({'torch', 'torchrec', 'fbgemm_gpu', 'numba'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stderr == "set()\n"
    assert done.stdout.count("usage: dlrm bench ") == len(CASES)
    assert done.stdout.count("│ --rounds INT") == len(CASES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "trian: no such case. Expected one of train, loader"),
        (["train", "--batch_sice", "3"], "--batch_sice 3: not a flag; did you mean --batch_size"),
        (["train", "--optimizer", "adam"], "--optimizer adam: expected one of"),
        (["train", "--batch_size", "4097", "--ranks", "2"], "--batch_size 4097: expected a multiple of --ranks"),
        (["train", "--ranks", "1024", "--batch_size", "1024"], "--ranks 1024: this machine has"),
        (["train", "--rounds", "0"], "--rounds 0: expected more than 0"),
        (["train", "--tables_gib", "3"], "--tables_gib with --rows uniform100k: no effect"),
        (["train", "--rows", "mlperf", "--num_embeddings", "5"], "--num_embeddings with --rows mlperf: no effect"),
        (["train", "--json", "/etc/hostname/result"], "--json /etc/hostname/result: can't be written"),
        (
            ["train", "--json", "/proc/result.json"],
            "--json /proc/result.json: can't be written (No such file or directory)",
        ),
        (["loader", "--num_rows", "10"], "--num_rows 10: expected 24,576 or more, 6 times --batch_size"),
        (["preprocess", "--scratch", "/no/such"], "--scratch /no/such: expected an existing folder"),
    ],
)
def test_mistakes(arguments, words, capsys):
    assert main(["bench", *arguments]) == USER_ERROR
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"dlrm bench: error: {words}")
    assert captured.err.count("\n") == 1


def test_rows_are_scaled_by_one_factor():
    rows = scale_rows(MLPERF_ROWS, 1_000_000)
    assert rows is not None
    assert 999_000 < sum(rows) <= 1_000_000
    assert min(rows) == 1
    large = [(size, scaled) for size, scaled in zip(MLPERF_ROWS, rows, strict=True) if size > 10**6]
    factors = [scaled / size for size, scaled in large]
    assert max(factors) == pytest.approx(min(factors), rel=1e-3)
    assert scale_rows(MLPERF_ROWS, 26) == (1,) * 26
    assert scale_rows(MLPERF_ROWS, 25) is None


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adagrad"])
def test_tables_fill_what_they_are_given(optimizer):
    shape = Shape(rows="mlperf", tables_gib=0.5, optimizer=optimizer)
    config = make_config(shape, 10)
    assert memory_gib(config, optimizer) == pytest.approx(0.5, rel=1e-3)
    assert memory_gib(config, optimizer) <= 0.5


def test_run_of_our_side():
    config = make_config(Shape(batch_size=64, ranks=2, optimizer="rowwise_adagrad", precision="fp32"), 10)
    check_config(config)
    assert config.data.batch_size == 32
    assert config.data.num_generated_batches == 10
    assert config.model.over_arch_layer_sizes == (1024, 1024, 512, 256, 1)
    assert table_rows(Workload()) == (100_000,) * 26
    power_law = make_config(Shape(rows="mlperf", tables_gib=0.1), 10)
    assert (power_law.data.zipf_exponent, power_law.data.num_generated_batches) == (1.1, 10)
    json.dumps(power_law.to_json())
