"""Which tensors of a checkpoint another model takes, by names and shapes. No torch here.

A table may have more rows than in the checkpoint. A dense layer is taken if both its weight and its bias fit.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from dlrm.checkpoint.manifest import Tensor
from dlrm.config.config import ModelConfig
from dlrm.errors import MisfitError
from dlrm.schema.criteo import TABLE_NAMES
from dlrm.system.console import plural, some

_DENSE = "dense."
_TABLES = "tables."
_WEIGHT = ".weight"

Shape = tuple[int, ...]


def check_tables(saved: Mapping[str, Tensor], model: ModelConfig) -> None:
    """Refuses tables that are missing, have shrunk, or have other columns.

    Raises:
        MisfitError: naming one.
    """
    for table, rows in zip(TABLE_NAMES, model.table_rows, strict=True):
        tensor = saved.get(f"{_TABLES}{table}{_WEIGHT}")
        if tensor is None or len(tensor.shape) != 2 or tensor.dtype != "float32":
            raise MisfitError(f"it holds no {table} in float32. Expected a checkpoint with the same 26 tables")
        saved_rows, dim = tensor.shape
        if dim != model.embedding_dim:
            raise MisfitError(
                f"{table} has rows of {dim} weights there, and --embedding_dim is {model.embedding_dim}. Give "
                f"--embedding_dim {dim}"
            )
        if saved_rows > rows:
            raise MisfitError(
                f"{table} has {saved_rows:,} rows there and {rows:,} here, and a table may grow, but not shrink. Give "
                f"it {saved_rows} or more (--num_embeddings_per_feature, --num_embeddings)"
            )


@dataclass(frozen=True)
class Transfer:
    """The weights that a model takes from a checkpoint.

    Attributes:
        weights: names of the tensors that are taken.
        grown: the number of new rows of each table that has some.
        layers_taken: dense layers that are taken.
        layers_drawn: dense layers that the checkpoint does not have in this shape.
        layers_left: dense layers of the checkpoint that the model does not have in this shape.
    """

    weights: frozenset[str]
    grown: Mapping[str, int]
    layers_taken: tuple[str, ...]
    layers_drawn: tuple[str, ...]
    layers_left: tuple[str, ...]

    @staticmethod
    def of(saved: Mapping[str, Tensor], wanted: Mapping[str, tuple[Shape, str]]) -> "Transfer":
        """Chooses the weights that fit, after `check_tables` has passed.

        Args:
            wanted: shape and dtype of each of the model's weights, by name.
        """
        tables = {table: f"{_TABLES}{table}{_WEIGHT}" for table in TABLE_NAMES}
        new_rows = {table: wanted[name][0][0] - saved[name].shape[0] for table, name in tables.items()}
        grown = {table: rows for table, rows in new_rows.items() if rows}
        layers: dict[str, list[str]] = {}
        for name in wanted:
            if name.startswith(_DENSE):
                layers.setdefault(_layer_of(name), []).append(name)
        taken = [
            layer for layer, names in layers.items() if all(_fits(saved.get(name), *wanted[name]) for name in names)
        ]
        dense = [name for layer in taken for name in layers[layer]]
        there = dict.fromkeys(_layer_of(name) for name in _dense_weights(saved))
        return Transfer(
            frozenset([*tables.values(), *dense]),
            grown,
            tuple(taken),
            tuple(layer for layer in layers if layer not in taken),
            tuple(layer for layer in there if layer not in taken),
        )

    def takes_state(self, name: str, saved: Mapping[str, Tensor], shape: Shape, dtype: str) -> bool:
        """Whether a tensor of the optimizer's state is taken: its weight is, and it fits, new rows of a table aside."""
        tensor, is_table = saved.get(name), name.startswith(_TABLES)
        if tensor is None or _weight_of(name) not in self.weights:
            return False
        return _fits(tensor, (tensor.shape[0], *shape[1:]) if is_table else shape, dtype)

    def describe(self, states: Collection[str] | None, algorithm: str) -> list[str]:
        """Three lines: what is taken, what is drawn at random, what is left in the checkpoint.

        Args:
            states: names of the optimizer's tensors that are taken; None without --init_optimizer.
        """
        tables = [name for name in self.weights if name.startswith(_TABLES)]
        num_layers = len(self.layers_taken) + len(self.layers_drawn)
        taken = [plural(len(tables), "table"), f"{len(self.layers_taken)} of {plural(num_layers, 'dense layer')}"]
        if states is not None:
            of = len({_weight_of(name) for name in states})
            taken.append(f"{algorithm}'s state of {of} of {plural(len(self.weights), 'parameter')}")
        return [
            f"  taken: {', '.join(taken)}",
            f"  drawn: {'; '.join(self._drawn()) or 'nothing'}",
            f"  left: {'; '.join(self._left(states))}",
        ]

    def _drawn(self) -> Iterator[str]:
        if self.grown:
            rows = f"{plural(sum(self.grown.values()), 'new row')} of {plural(len(self.grown), 'table')}"
            yield f"{rows} ({some(list(self.grown))})"
        if self.layers_drawn:
            yield f"{plural(len(self.layers_drawn), 'dense layer')} ({_show(self.layers_drawn)})"

    def _left(self, states: Collection[str] | None) -> Iterator[str]:
        if self.layers_left:
            yield f"{plural(len(self.layers_left), 'dense layer')} of other shapes ({_show(self.layers_left)})"
        if states is None:
            yield "the optimizer's state (--init_optimizer takes it)"
        yield "its steps, validations and data"


def _dense_weights(saved: Mapping[str, Tensor]) -> Iterator[str]:
    """Names of dense weights. The name of an optimizer's state is that of a weight, and one more part."""
    return (name for name in saved if name.startswith(_DENSE) and name.rpartition(".")[0] not in saved)


def _layer_of(name: str) -> str:
    return name.rpartition(".")[0]


def _weight_of(state: str) -> str:
    """The parameter that a state is of: `tables.{table}.{state}` or `dense.{parameter}.{state}`."""
    owner = state.rpartition(".")[0]
    return f"{owner}{_WEIGHT}" if state.startswith(_TABLES) else owner


def _fits(saved: Tensor | None, shape: Shape, dtype: str) -> bool:
    return saved is not None and saved.shape == shape and saved.dtype == dtype


def _show(layers: Collection[str]) -> str:
    """Names of layers, without the modules that TorchRec puts in between."""
    names = [layer.removeprefix(_DENSE).replace("._mlp", "").replace("._linear", "") for layer in layers]
    return some(names)
