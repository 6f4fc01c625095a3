"""A run as MLPerf training logs it: `:::MLLOG` lines for the benchmark dlrm_dcnv2.

Source: mlcommons/logging, `mllog` for the form of a line and `compliance_checker/training_6.0.0` for the keys, the last
rules that have this benchmark; mlcommons/training, recommendation_v2, for what `epoch_num` counts.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlrm.config.config import Config, OptimizerConfig
from dlrm.metrics.sinks import reported
from dlrm.system.console import print_line

BENCHMARK = "dlrm_dcnv2"
# What only a submitter knows, to be edited in the log.
ORGANIZATION = "EDIT: organization"
DIVISION = "open"
STATUS = "research"
_THIS_FILE = "/".join(Path(__file__).parts[-3:])


def describe_run(config: Config, platform: str, world_size: int, train_rows: int, val_rows: int) -> dict[str, Any]:
    """The keys that MLPerf wants once, before training. `config.training.seed` is set."""
    return {
        "submission_benchmark": BENCHMARK,
        "submission_org": ORGANIZATION,
        "submission_division": DIVISION,
        "submission_status": STATUS,
        "submission_platform": f"{world_size}x {platform}",
        "seed": config.training.seed,
        "global_batch_size": config.data.batch_size * world_size,
        "gradient_accumulation_steps": 1,
        "train_samples": train_rows,
        "eval_samples": val_rows,
        **describe_optimizer(config.optimizer),
        "opt_learning_rate_warmup_steps": config.optimizer.lr_warmup_steps,
        "opt_learning_rate_decay_start_step": config.optimizer.lr_decay_start,
        "opt_learning_rate_decay_steps": config.optimizer.lr_decay_steps,
    }


def describe_optimizer(config: OptimizerConfig) -> dict[str, Any]:
    """The optimizer's part of `describe_run`."""
    common = {
        "opt_name": config.algorithm,
        "opt_base_learning_rate": config.learning_rate,
        "opt_weight_decay": config.weight_decay,
    }
    if config.algorithm == "sgd":
        return common
    if config.algorithm == "adam":
        return {**common, "opt_adam_beta_1": 0.9, "opt_adam_beta_2": 0.999, "opt_adam_epsilon": config.eps}
    return {
        **common,
        "opt_adagrad_epsilon": config.eps,
        "opt_adagrad_initial_accumulator_value": 0.0,
        "opt_adagrad_learning_rate_decay": 0.0,
    }


class MlperfLog:
    """A sink that prints MLPerf's lines and keeps them in a file.

    Times are seconds since the epoch: `process_started` is MLPerf's init_start, `data_opened` its run_start, which
    must come before a sample is touched.

    Raises:
        RunDirectoryError: if the disk is full or the folder is gone.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], process_started: float, data_opened: float) -> None:
        self._path = path
        self._rows_per_epoch = facts["train_samples"]
        self._progress: dict[str, float] = {}
        self._is_running = True
        # The page cache is its owner's to clear, before the process starts.
        self._log("cache_clear", False, at=process_started)
        self._log("init_start", at=process_started)
        for key, value in facts.items():
            self._log(key, value, at=data_opened)
        self._log("init_stop", at=data_opened)
        self._log("run_start", at=data_opened)

    def append_metrics(self, line: Mapping[str, Any]) -> None:
        """One line."""
        num_samples = line["num_train_samples"]
        self._progress = {"epoch_num": num_samples / self._rows_per_epoch, "samples_count": num_samples}
        match line["kind"]:
            case "epoch_start" | "epoch_stop" as key:
                self._log(key, epoch_num=line["epoch"], samples_count=num_samples)
            case "val_start":
                self._log("eval_start", **self._progress)
            case "val":
                if line["auroc"] is not None:
                    self._log("eval_accuracy", line["auroc"], **self._progress)
                self._log("eval_stop", **self._progress)
            case "train_stop":
                self._stop("success" if line["reached_target"] else "aborted")

    def close(self) -> None:
        """Says that the run was aborted, if it did not end."""
        if self._is_running:
            self._stop("aborted")

    def _stop(self, status: str) -> None:
        self._is_running = False
        self._log("run_stop", status=status, **self._progress)

    def _log(self, key: str, value: Any = None, at: float | None = None, **metadata: Any) -> None:
        line = {
            "namespace": "",
            "time_ms": int((time.time() if at is None else at) * 1000),
            "event_type": _event_type(key),
            "key": key,
            "value": value,
            "metadata": {"file": _THIS_FILE, "lineno": sys._getframe(1).f_lineno, **metadata},
        }
        text = f":::MLLOG {json.dumps(line, allow_nan=False)}"

        def write() -> None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

        reported(self._path, write)
        print_line(text)


def _event_type(key: str) -> str:
    if key.endswith("_start"):
        return "INTERVAL_START"
    return "INTERVAL_END" if key.endswith("_stop") else "POINT_IN_TIME"
