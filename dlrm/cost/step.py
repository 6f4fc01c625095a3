"""The timeline of a training step: what computes, what is sent, what waits. Arithmetic only, no torch.

docs/design/plan.md draws it and says what is assumed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from dlrm.config.config import ModelConfig, OptimizerName
from dlrm.cost import work as cost
from dlrm.cost.network import (
    Collective,
    Network,
    dense_reduction,
    gradient_exchange,
    input_exchange,
    pooled_exchange,
    replicated_reduction,
)
from dlrm.cost.work import Rates, TableWorkload, Work

Part = Literal["lookup", "dense", "communication"]


@dataclass(frozen=True)
class TimelineSpan:
    """One bar of the timeline, on the rank that takes the longest for it.

    Attributes:
        part: what its time counts as.
        start: seconds after the step began.
        bound_by: the resource that limits it.
    """

    name: str
    part: Part
    start: float
    seconds: float
    bound_by: str

    @property
    def end(self) -> float:
        """Seconds from the begin of the step until the span is over."""
        return self.start + self.seconds


@dataclass(frozen=True)
class Step:
    """A step's timeline and its totals.

    Attributes:
        seconds: from the begin of a step to the begin of the next.
        samples: samples of all ranks.
    """

    spans: tuple[TimelineSpan, ...]
    collectives: tuple[Collective, ...]
    seconds: float
    samples: int

    def seconds_of(self, part: Part) -> float:
        """Sum of the part's spans, whether they are hidden behind others or not."""
        return sum(span.seconds for span in self.spans if span.part == part)

    @property
    def exposed_communication_seconds(self) -> float:
        """Seconds in which nothing computes: the step less its lookups and dense spans, no two of which overlap."""
        return max(0.0, self.seconds - self.seconds_of("lookup") - self.seconds_of("dense"))

    @property
    def samples_per_second(self) -> float:
        """W * B / seconds."""
        return self.samples / self.seconds

    @property
    def bound_by(self) -> str:
        """The part that takes most of the step, its longest span, and the resource that limits that span."""
        shares = {
            "lookup": self.seconds_of("lookup"),
            "dense": self.seconds_of("dense"),
            "communication": self.exposed_communication_seconds,
        }
        part = max(shares, key=shares.__getitem__)
        longest = max((span for span in self.spans if span.part == part), key=lambda span: span.seconds)
        return f"{part}: {longest.name}, by {longest.bound_by}"


@dataclass(frozen=True)
class StepWorkload:
    """What a step has to do.

    Attributes:
        batch_size: samples of a rank.
        width: bytes of an activation.
        optimizer: optimizer of tables and dense parts.
        hides_input: whether a pipeline exchanges the next batch's ids during this step.
        launches: whether the layers' kernels are launched one by one, not as one CUDA graph.
    """

    model: ModelConfig
    tables: Sequence[TableWorkload]
    batch_size: int
    width: int
    optimizer: OptimizerName
    hides_input: bool
    launches: bool


def build_step(load: StepWorkload, rates: Rates, network: Network) -> Step:
    """Lays the parts of a step on two lanes, one that computes and one that communicates.

    A part starts as soon as its inputs are ready and its lane is free:

        compute       lookup | dense arch  | interaction, over arch, | dense arch  | lookup backward,  | dense
                             |             | and their backward      | backward    | update of tables  | update
        communication        | pooled rows |                         | gradients of pooled rows,       | replicated
                                                                     | dense all-reduce                | tables

    The next batch's ids travel whenever the second lane is free (`hides_input`), or else before the lookup. A step
    takes as long as its last part, and at least as long as everything that is sent. If nothing overlaps
    (`rates.overlaps`), the two lanes are one.
    """
    works = _dense_works(load)
    lay = _Lanes(rates)
    tables, batch = load.tables, load.batch_size
    inputs = input_exchange(network, tables, batch)
    hides_input = load.hides_input and rates.overlaps
    started = 0.0 if hides_input else lay.send(inputs, 0.0)
    looked_up = lay.look_up("lookup", load, network.ranks, cost.lookup_forward, started)
    pooled = lay.send(pooled_exchange(network, tables, batch), looked_up)
    dense = lay.compute("dense arch", works["dense"][0], looked_up)
    met = lay.compute("interaction", works["interaction"][0], max(pooled, dense))
    over = lay.compute("over arch", works["over"][0], met)
    over = lay.compute("over arch backward", works["over"][1], over)
    met = lay.compute("interaction backward", works["interaction"][1], over)
    returned = lay.send(gradient_exchange(network, tables, batch), met)
    dense = lay.compute("dense arch backward", works["dense"][1], met)
    parameters = cost.dense_parameters(load.model)
    reduced = lay.send(dense_reduction(network, parameters), dense)
    updated = lay.look_up("lookup backward and update", load, network.ranks, cost.lookup_backward, max(returned, dense))
    reduced = lay.send(replicated_reduction(network, tables), max(reduced, updated))
    lay.compute("dense update", cost.update_work(parameters, load.optimizer), max(reduced, updated))
    ending = max(span.end for span in lay.spans)
    if hides_input:
        lay.send_anytime(inputs)
    travelling = sum(part.seconds for part in lay.collectives)
    seconds = max(ending, travelling)
    return Step(tuple(lay.spans), tuple(lay.collectives), seconds, batch * network.ranks)


def _dense_works(load: StepWorkload) -> dict[str, tuple[Work, Work]]:
    works = cost.layer_works(load.model, load.batch_size, load.width)
    if load.launches:
        return works
    return {name: (_in_one_launch(forward), _in_one_launch(backward)) for name, (forward, backward) in works.items()}


def _in_one_launch(work: Work) -> Work:
    return Work(work.flop, work.num_bytes, work.host_bytes, 1)


class _Lanes:
    """The timeline while it is built: the spans so far, and when each lane is free again."""

    def __init__(self, rates: Rates) -> None:
        self.spans: list[TimelineSpan] = []
        self.collectives: list[Collective] = []
        self._rates = rates
        self._computes_until = 0.0
        self._sends_until = 0.0

    def compute(self, name: str, work: Work, ready: float, part: Part = "dense") -> float:
        """Adds work that can start at `ready`; returns when it is over."""
        start = max(ready, self._computes_until)
        span = TimelineSpan(name, part, start, work.seconds(self._rates), work.bound_by(self._rates))
        self.spans.append(span)
        self._computes_until = span.end
        if not self._rates.overlaps:
            self._sends_until = span.end
        return span.end

    def look_up(
        self,
        name: str,
        load: StepWorkload,
        ranks: int,
        work_of: Callable[[TableWorkload, float, float], Work],
        ready: float,
    ) -> float:
        """Adds the lookups of the rank that takes the longest; returns when they are over."""
        works = [Work(kernels=2)] * ranks
        for table in load.tables:
            samples = load.batch_size * (1 if table.is_replicated else ranks)
            of_share = {share: work_of(table, share, samples) for share in set(table.shares)}
            for rank, share in zip(table.ranks, table.shares, strict=True):
                works[rank] += of_share[share]
        slowest = max(works, key=lambda work: work.seconds(self._rates))
        return self.compute(name, slowest, ready, "lookup")

    def send(self, collectives: Sequence[Collective], ready: float) -> float:
        """Adds collectives, one after the other; returns when the last one is over, or `ready` if there is none."""
        for one in collectives:
            start = max(ready, self._sends_until)
            self.spans.append(TimelineSpan(one.name, "communication", start, one.seconds, one.bound_by))
            self.collectives.append(one)
            ready = self._sends_until = start + one.seconds
            if not self._rates.overlaps:
                self._computes_until = ready
        return ready

    def send_anytime(self, collectives: Sequence[Collective]) -> None:
        """Adds collectives that may run at any time of the step, in the longest pause between the others."""
        for one in collectives:
            sends = sorted((s.start, s.end) for s in self.spans if s.part == "communication")
            ending = max(span.end for span in self.spans)
            edges = [(0.0, 0.0), *sends, (ending, ending)]
            pauses = [(after[0] - before[1], before[1]) for before, after in pairwise(edges)]
            _, start = max(pauses)
            self.spans.append(TimelineSpan(one.name, "communication", start, one.seconds, one.bound_by))
            self.collectives.append(one)
