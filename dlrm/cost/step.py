"""The timeline of a training step: what computes, what travels, what waits. Arithmetic only, no torch.

docs/design/plan.md draws it and says what is assumed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from dlrm.config.config import ModelConfig
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
from dlrm.cost.work import Rates, Table, Work

Part = Literal["lookup", "dense", "communication"]


@dataclass(frozen=True)
class Span:
    """Something that takes time in a step, from `start` seconds after its begin, on the rank that is slowest in it.

    Attributes:
        part: what it counts as.
        bound_by: what limits it.
    """

    name: str
    part: Part
    start: float
    seconds: float
    bound_by: str

    @property
    def end(self) -> float:
        """When it is over."""
        return self.start + self.seconds


@dataclass(frozen=True)
class Step:
    """A step's timeline and what it adds up to.

    Attributes:
        samples: of all ranks.
        seconds: from a step's begin to the next one's.
    """

    spans: tuple[Span, ...]
    collectives: tuple[Collective, ...]
    seconds: float
    samples: int

    def seconds_of(self, part: Part) -> float:
        """Of all spans of a part, hidden or not."""
        return sum(span.seconds for span in self.spans if span.part == part)

    @property
    def exposed_communication_seconds(self) -> float:
        """In which nothing computes: the step less its lookups and dense parts, of which no two overlap."""
        return max(0.0, self.seconds - self.seconds_of("lookup") - self.seconds_of("dense"))

    @property
    def samples_per_second(self) -> float:
        """W * B / seconds."""
        return self.samples / self.seconds

    @property
    def bound_by(self) -> str:
        """The part that the step spends most of its time in, its longest span, and what limits that."""
        shares = {
            "lookup": self.seconds_of("lookup"),
            "dense": self.seconds_of("dense"),
            "communication": self.exposed_communication_seconds,
        }
        part = max(shares, key=shares.__getitem__)
        longest = max((span for span in self.spans if span.part == part), key=lambda span: span.seconds)
        return f"{part}: {longest.name}, by {longest.bound_by}"


@dataclass(frozen=True)
class Workload:
    """What a step does.

    Attributes:
        batch_size: samples of a rank.
        width: bytes of an activation.
        optimizer: sgd, adagrad, rowwise_adagrad or adam.
        hides_input: a pipeline exchanges the next batch's ids during this step.
        launches: kernels of the layers are launched one by one, not as a CUDA graph.
    """

    model: ModelConfig
    tables: Sequence[Table]
    batch_size: int
    width: int
    optimizer: str
    hides_input: bool
    launches: bool


def build_step(load: Workload, rates: Rates, network: Network) -> Step:
    """Lays a step's parts on two lanes, one that computes and one that communicates, each part as soon as what it needs
    is there and its lane is free.

    Lookup; pooled rows travel while the dense arch computes; interaction and over arch, forward and backward; gradients
    of pooled rows travel while the dense arch's backward computes; tables are updated; dense gradients are reduced as
    soon as the lane is free; dense parameters are updated. The next batch's ids travel whenever the lane is free
    (hides_input), or before the lookup. A step lasts as long as its last part, and at least as long as all that
    travels. Where nothing overlaps (`rates.overlaps`) the lanes are one.
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


def _dense_works(load: Workload) -> dict[str, tuple[Work, Work]]:
    model, batch, width = load.model, load.batch_size, load.width
    return {
        name: (forward, backward) if load.launches else (_in_one_launch(forward), _in_one_launch(backward))
        for name, (forward, backward) in {
            "dense": cost.mlp_work(cost.dense_layers(model), batch, width, needs_input_gradient=False),
            "interaction": cost.interaction_work(model, batch, width),
            "over": cost.mlp_work(cost.over_layers(model), batch, width),
        }.items()
    }


def _in_one_launch(work: Work) -> Work:
    return Work(work.flop, work.num_bytes, work.host_bytes, 1)


class _Lanes:
    """The timeline as it grows."""

    def __init__(self, rates: Rates) -> None:
        self.spans: list[Span] = []
        self.collectives: list[Collective] = []
        self._rates = rates
        self._computes_until = 0.0
        self._sends_until = 0.0

    def compute(self, name: str, work: Work, ready: float, part: Part = "dense") -> float:
        """Adds some work; returns when it is over."""
        start = max(ready, self._computes_until)
        span = Span(name, part, start, work.seconds(self._rates), work.bound_by(self._rates))
        self.spans.append(span)
        self._computes_until = span.end
        if not self._rates.overlaps:
            self._sends_until = span.end
        return span.end

    def look_up(
        self, name: str, load: Workload, ranks: int, work_of: Callable[[Table, float, float], Work], ready: float
    ) -> float:
        """Adds the lookups of the rank that takes the longest."""
        works = [Work(kernels=2)] * ranks
        for table in load.tables:
            samples = load.batch_size * (1 if table.is_replicated else ranks)
            of_share = {share: work_of(table, share, samples) for share in set(table.shares)}
            for rank, share in zip(table.ranks, table.shares, strict=True):
                works[rank] += of_share[share]
        slowest = max(works, key=lambda work: work.seconds(self._rates))
        return self.compute(name, slowest, ready, "lookup")

    def send(self, collectives: Sequence[Collective], ready: float) -> float:
        """Adds collectives, one after the other; returns when the last one is over, `ready` where there is none."""
        for one in collectives:
            start = max(ready, self._sends_until)
            self.spans.append(Span(one.name, "communication", start, one.seconds, one.bound_by))
            self.collectives.append(one)
            ready = self._sends_until = start + one.seconds
            if not self._rates.overlaps:
                self._computes_until = ready
        return ready

    def send_anytime(self, collectives: Sequence[Collective]) -> None:
        """Adds what may travel at any time of the step, in the longest pause between what else travels."""
        for one in collectives:
            sends = sorted((s.start, s.end) for s in self.spans if s.part == "communication")
            ending = max(span.end for span in self.spans)
            edges = [(0.0, 0.0), *sends, (ending, ending)]
            pauses = [(after[0] - before[1], before[1]) for before, after in pairwise(edges)]
            _, start = max(pauses)
            self.spans.append(Span(one.name, "communication", start, one.seconds, one.bound_by))
            self.collectives.append(one)
