"""dlrm_main.py in each way that it can be started."""

import re
import sys
from pathlib import Path

import pytest

from tests.launching import BIN, MAIN, TINY, launch, read_losses, read_summary, run, run_main, take_port

AUROC = re.compile(r"AUROC over (val|test) set: (\d\.\d+)")


def check(output: str) -> None:
    found = dict(AUROC.findall(output))
    assert set(found) == {"val", "test"}, output
    assert all(0.3 < float(value) < 0.7 for value in found.values())  # random data


def test_python(tmp_path: Path) -> None:
    done = run_main("--run_dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    check(done.stdout)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {".lock", "config.json", "environment.json", "plan.json", "metrics.jsonl", "summary.json"}
    summary = read_summary(tmp_path / "run")
    wanted = "val_auroc test_auroc test_logloss test_ne test_calibration num_train_samples train_seconds"
    wanted += " samples_per_second world_size device precision peak_memory_gib"
    assert set(wanted.split()) <= set(summary)
    assert (summary["num_train_samples"], summary["world_size"], summary["device"]) == (320, 1, "cpu")


def test_torchrun_as_the_spec_writes_it(tmp_path: Path) -> None:
    command = "torchrun --nnodes 1 --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint localhost --rdzv_id 54321"
    command += f" --role trainer dlrm_main.py --run_dir {tmp_path}/run"
    done = run([str(BIN / "torchrun"), *command.split()[1:]])
    assert done.returncode == 0, done.stderr
    check(done.stdout)
    assert read_summary(tmp_path / "run")["world_size"] == 2


def test_torchx(tmp_path: Path) -> None:
    command = "run -s local_cwd dist.ddp -j 1x2 --script dlrm_main.py --"
    done = run([str(BIN / "torchx"), *command.split(), "--run_dir", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    check(done.stdout + done.stderr)
    assert read_summary(tmp_path / "run")["world_size"] == 2


def call_main(run_dir: str) -> None:
    import dlrm_main

    dlrm_main.main([*TINY, "--limit_val_batches", "8", "--limit_test_batches", "6", "--run_dir", run_dir])


def test_main_in_a_worker_of_elastic_launch(tmp_path: Path) -> None:
    launch(call_main, 2, str(tmp_path / "run"), folder=tmp_path)
    assert read_summary(tmp_path / "run")["world_size"] == 2


def test_main_twice_in_one_process(tmp_path: Path) -> None:
    code = f"import dlrm_main\nfor i in range(2): dlrm_main.main({TINY!r} + ['--run_dir', f'{tmp_path}/{{i}}'])"
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "1" / "summary.json").exists()


NOTEBOOK = """
import os, signal, sys, threading
import torch.distributed as dist
import dlrm_main
from dlrm.fault_tolerance.hooks import RunHooks

flags, folder, after_step = sys.argv[2:], sys.argv[1], RunHooks.after_step
before = [signal.getsignal(number) for number in signal.Signals if number not in (signal.SIGKILL, signal.SIGSTOP)]
stdout = sys.stdout

def interrupt(self, position, snapshot, **named):
    if position.step == 3:
        os.kill(os.getpid(), number)
    after_step(self, position, snapshot, **named)

def call(name, *more):
    try:
        dlrm_main.main([*flags, "--run_dir", f"{folder}/{name}", *more])
        print(name, "done")
    except BaseException as error:
        kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else type(error)
        print(name, kind.__name__, error)
    assert before == [signal.getsignal(n) for n in signal.Signals if n not in (signal.SIGKILL, signal.SIGSTOP)]
    assert sys.stdout is stdout and not dist.is_initialized() and threading.active_count() == 1

for number in (signal.SIGINT, signal.SIGHUP):
    RunHooks.after_step = interrupt
    call("saved", "--checkpoint_every", "1000", "--resume", "never")
    call("lost")
    RunHooks.after_step = after_step
    call("lost", "--learning_rat", "1")
    call("lost", "--in_memory_binary_criteo_path", f"{folder}/none")
    call("saved", "--checkpoint_every", "1000")
    folder += "/again"
"""


def test_main_in_a_notebook_raises_and_can_be_called_again(tmp_path: Path) -> None:
    done = run([sys.executable, "-c", NOTEBOOK, str(tmp_path), *TINY])
    assert done.returncode == 0, done.stderr
    kinds = [line for line in done.stdout.splitlines() if line.startswith(("saved ", "lost "))]
    interrupted = ["saved KeyboardInterrupt SIGINT at step 3", "lost KeyboardInterrupt SIGINT"]
    hung_up = ["saved SystemExit 129", "lost SystemExit 129"]
    after = ["lost SystemExit 2", "lost SystemExit 2", "saved done"]
    assert kinds == [*interrupted, *after, *hung_up, *after]
    assert done.stdout.count("Resuming from ") == 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_seed_repeats_a_run_bit_for_bit(tmp_path: Path, ranks: int) -> None:
    for name in ("a", "b", "other"):
        seed = "4" if name == "other" else "3"
        flags = [*TINY, "--adagrad", "--zipf_exponent", "1.1", "--log_every", "1", "--seed", seed]
        done = run_main(*flags, "--run_dir", str(tmp_path / name), ranks=ranks)
        assert done.returncode == 0, done.stderr
    a, b, other = (read_losses(tmp_path / name) for name in ("a", "b", "other"))
    assert a == b
    assert len(a) == 10
    assert a != other
    assert read_summary(tmp_path / "a")["test_auroc"] == read_summary(tmp_path / "b")["test_auroc"]


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with take_port() as listener:
        port = str(listener.getsockname()[1])
        done = run(
            [sys.executable, MAIN, *TINY, "--run_dir", str(tmp_path / "run")],
            RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
    assert done.returncode == 2
    assert f"127.0.0.1:{port} is in use" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
