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
TRACE = "trace_rank0.json.gz"
CHECKPOINTS = "checkpoints"

DOCUMENTS = (CONFIG, ENVIRONMENT, PLAN, METRICS)
"""Each checkpoint holds a copy of these."""
ALL = (*DOCUMENTS, FREQUENCIES, SUMMARY, MLPERF_LOG, TENSORBOARD, TRACE)
"""All that a run writes into its directory, apart from checkpoints. A folder with one of these is in use."""
