"""The names of a run's files, and which of them a checkpoint holds a copy of. No torch here."""

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
PLAN = "plan.json"
METRICS = "metrics.jsonl"
FREQUENCIES = "multi_hot_freqs.npz"
SUMMARY = "summary.json"
"""The last file of a run: a run directory with it holds a finished run."""
MLPERF_LOG = "mlperf_log.txt"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"


def trace_of(rank: int) -> str:
    """The file of a rank's trace: --profile."""
    return f"trace_rank{rank}.json.gz"


DOCUMENTS = (CONFIG, ENVIRONMENT, PLAN, METRICS)
"""Each checkpoint holds a copy of these."""
ALL = (*DOCUMENTS, FREQUENCIES, SUMMARY, MLPERF_LOG, TENSORBOARD, trace_of(0))
"""All that a run writes into its directory, apart from checkpoints. A folder with one of these is in use."""
