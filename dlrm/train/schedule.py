"""The learning rate as a function of the step: linear warm-up, constant, quadratic decay.

Source: the policy of the public DLRM example and of MLPerf's DLRM (Naumov et al., arXiv:1906.00091, its code).
"""

from torchrec.optim.keyed import CombinedOptimizer

from dlrm.config.config import OptimizerConfig

FLOOR = 1e-7
"""Smallest learning rate of a decay."""


def learning_rate_at(step: int, base: float, config: OptimizerConfig) -> float:
    """The rate of training step `step`, counted from 1, of parameters whose full rate is `base`.

    With W, S, D for lr_warmup_steps, lr_decay_start, lr_decay_steps: base * step / W up to step W; the base rate up to
    step S; base * ((S + D - step) / D)^2 after it, 1e-7 at the least. Without a warm-up it begins at the base rate,
    without a decay it stays there.
    """
    if step <= config.lr_warmup_steps:
        return base * step / config.lr_warmup_steps
    if config.lr_decay_steps and step > config.lr_decay_start:
        left = max(0, config.lr_decay_start + config.lr_decay_steps - step)
        return max(min(FLOOR, base), base * (left / config.lr_decay_steps) ** 2)
    return base


class LearningRateSchedule:
    """Sets the rates of all of a model's optimizers: tables, fused or not, and dense parameters.

    The rates that they are built with are their full ones. `learning_rate` is that of the tables, `dense_learning_rate`
    that of the dense parts.
    """

    def __init__(self, optimizer: CombinedOptimizer, config: OptimizerConfig) -> None:
        self._bases = [(group, group["lr"]) for group in optimizer.param_groups]
        self._config = config
        self._dense_base = config.dense_rate
        self.learning_rate = config.learning_rate
        self.dense_learning_rate = self._dense_base

    def begin_step(self, step: int) -> None:
        """Sets the rates of training step `step`, counted from 1, before it is taken."""
        self.learning_rate = learning_rate_at(step, self._config.learning_rate, self._config)
        self.dense_learning_rate = learning_rate_at(step, self._dense_base, self._config)
        for group, base in self._bases:
            group["lr"] = learning_rate_at(step, base, self._config)  # type: ignore[index] # torchrec says Mapping
