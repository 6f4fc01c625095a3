"""How much state an optimizer keeps: the one place that knows."""

from dlrm.config.config import Config, OptimizerName


def state_floats(optimizer: OptimizerName, dim: int) -> int:
    """Optimizer state of a table's row of `dim` weights, in floats. A dense weight counts as a row of one."""
    return {"sgd": 0, "adagrad": dim, "rowwise_adagrad": 1, "adam": 2 * dim}[optimizer]


def table_state_floats(config: Config, table: str, dim: int) -> int:
    """`state_floats` of a table by name, with the run's optimizer: 0 if --freeze names the table."""
    return 0 if table in config.frozen_tables else state_floats(config.optimizer.algorithm, dim)
