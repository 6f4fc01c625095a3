"""Deep Learning Recommendation Model (arXiv:1906.00091), and its loss.

Shapes: B samples of this rank, I integer features, D embedding dimension.
"""

from typing import NamedTuple

import torch
import torch.fx
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from dlrm.config.config import ModelConfig
from dlrm.loader.batch import Batch
from dlrm.loader.dense_statistics import DenseStatistics
from dlrm.model.chunked_loss import loss_in_pieces
from dlrm.model.dense import BucketEmbeddings, ReluMLP, StandardizedDense
from dlrm.model.interaction import DCNInteraction, DotInteraction, ProjectionInteraction
from dlrm.schema.criteo import CATEGORICAL_NAMES, NUM_INTEGER_FEATURES, TABLE_NAMES


@torch.fx.wrap
def find_features(pooled: KeyedTensor) -> list[int]:
    """The first column of each categorical feature: a sharded collection has them in the order of the ranks."""
    first_columns = dict(zip(pooled.keys(), pooled.offset_per_key(), strict=False))
    return [first_columns[name] for name in CATEGORICAL_NAMES]


class DLRM(nn.Module):
    """Integers through an MLP, ids through tables, their interaction through an MLP to a logit.

    Given the same weights and batch it computes what torchrec.models.dlrm (DLRM, DLRM_DCN, DLRM_Projection) does.
    """

    def __init__(
        self, config: ModelConfig, tables_device: torch.device, statistics: DenseStatistics | None = None
    ) -> None:
        super().__init__()
        self.embedding_bag_collection = build_tables(config, tables_device)
        if config.needs_dense_statistics and statistics is None:
            raise ValueError("a model of standardized or bucketed integers needs their statistics")
        self.standardize = StandardizedDense(statistics) if config.standardize_dense and statistics else None
        self.buckets = (
            BucketEmbeddings(statistics, config.embedding_dim) if config.dense_buckets and statistics else None
        )
        in_features = self.standardize.out_features if self.standardize else NUM_INTEGER_FEATURES
        self.dense_arch = ReluMLP(in_features, list(config.dense_arch_layer_sizes))
        self.interaction = build_interaction(config)
        *hidden, last = config.over_arch_layer_sizes
        self.over_arch = nn.Sequential(ReluMLP(self.interaction.out_features, hidden), Fp32Linear(hidden[-1], last))

    def forward(self, dense_BI: torch.Tensor, sparse_features: KeyedJaggedTensor) -> torch.Tensor:
        """Returns logits_B."""
        # First the tables: their all-to-all, and backward that of the gradients, runs while the dense arch computes.
        awaited = self.embedding_bag_collection(sparse_features)
        dense_BD = self.embed_dense(dense_BI)
        return self.score(dense_BI, dense_BD, awaited.values(), find_features(awaited))

    def embed_dense(self, dense_BI: torch.Tensor) -> torch.Tensor:
        """Returns [B, D]."""
        return self.dense_arch(dense_BI if self.standardize is None else self.standardize(dense_BI))

    def score(
        self, dense_BI: torch.Tensor, dense_BD: torch.Tensor, pooled_BW: torch.Tensor, first_columns: list[int]
    ) -> torch.Tensor:
        """Logits_B of embedded integers, and of pooled rows as `find_features` finds them."""
        sources, columns = [pooled_BW], [first_columns]
        if self.buckets is not None:
            sources.append(self.buckets(dense_BI))
            columns.append(self.buckets.first_columns)
        return self.over_arch(self.interaction(dense_BD, sources, columns)).squeeze(1)

    def dense_parameters(self) -> list[nn.Parameter]:
        """All that are trained but the tables."""
        parts = (part for name, part in self.named_children() if name != "embedding_bag_collection")
        return [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]


class Fp32Linear(nn.Linear):
    """A linear layer in fp32 also under autocast: scores of bfloat16's 8 bits would tie."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Linear's name
        """See nn.Linear."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


class Output(NamedTuple):
    """A batch's loss, scaled as `DLRMTrain` says, and the logits of its real samples, both detached."""

    loss: torch.Tensor
    logits_B: torch.Tensor
    batch: Batch

    @property
    def labels_B(self) -> torch.Tensor:
        """Labels of the real samples, in the order of `logits_B`."""
        return self.batch.labels_B[: self.batch.span.rows]


class DLRMTrain(nn.Module):
    """A DLRM with its loss, as a TorchRec pipeline calls it.

    Attributes:
        autocast: device type whose matrix products are in bfloat16; None for fp32 (or tf32).
        rows_at_once: batches of more samples go through the dense parts in pieces of a quarter of it, forward and
            backward of each in turn, to bound memory. None for all at once, whatever the batch.
    """

    def __init__(
        self, model: DLRM, world_size: int, autocast: str | None = None, rows_at_once: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.world_size = world_size
        self.autocast = autocast
        self.rows_at_once = rows_at_once

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Output]:
        """Returns the loss to differentiate, and what came of the batch.

        TorchRec and DDP average gradients over ranks. So that an uneven last batch counts every sample once, the loss
        is the sum over this rank's samples times world size over the samples of all ranks; its mean over ranks is the
        mean over samples.
        """
        scale = self.world_size / batch.span.global_rows
        with torch.autocast(self.autocast or "cpu", torch.bfloat16, enabled=self.autocast is not None):
            if self.rows_at_once is None:
                logits_B = self.model(batch.dense_BI, batch.sparse_features)[: batch.span.rows]
                loss = _sum_of_losses(logits_B, batch.labels_B[: batch.span.rows]) * scale
            else:
                awaited = self.model.embedding_bag_collection(batch.sparse_features)
                loss, logits_B = _score_in_pieces(self.model, self.rows_at_once, batch, awaited, scale)
        return loss, Output(loss.detach(), logits_B.detach(), batch)


def _sum_of_losses(logits_B: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    return binary_cross_entropy_with_logits(logits_B, labels_B, reduction="sum")


@torch.fx.wrap
def _score_in_pieces(
    model: DLRM, rows_at_once: int, batch: Batch, awaited: KeyedTensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    size = len(batch.dense_BI)
    rows = size if size <= rows_at_once else max(1, rows_at_once // 4)
    first_BD = model.embed_dense(batch.dense_BI[:rows])  # while the all-to-all is on its way
    first_columns = find_features(awaited)

    def loss_of(piece: slice, pooled_BW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dense_BI, labels_B = batch.dense_BI[piece], batch.labels_B[: batch.span.rows][piece]
        dense_BD = first_BD if piece.start == 0 else model.embed_dense(dense_BI)
        logits_B = model.score(dense_BI, dense_BD, pooled_BW, first_columns)[: len(labels_B)]
        return _sum_of_losses(logits_B, labels_B) * scale, logits_B

    return loss_in_pieces(loss_of, rows, awaited.values(), model.dense_parameters())


def build_tables(config: ModelConfig, device: torch.device) -> EmbeddingBagCollection:
    """One sum-pooled embedding table per categorical feature. Weights are set after sharding, not here."""
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=table,
                num_embeddings=rows,
                embedding_dim=config.embedding_dim,
                feature_names=[feature],
                init_fn=_leave,
            )
            for table, feature, rows in zip(TABLE_NAMES, CATEGORICAL_NAMES, config.table_rows, strict=True)
        ],
        device=device,
    )


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def build_interaction(config: ModelConfig) -> DotInteraction | DCNInteraction | ProjectionInteraction:
    """The interaction that `config` names."""
    features, dim = config.num_vectors - 1, config.embedding_dim
    match config.interaction_type:
        case "original":
            return DotInteraction(features, dim)
        case "dcn":
            return DCNInteraction(features, dim, config.dcn_num_layers, config.dcn_low_rank_dim)
        case "projection":
            return ProjectionInteraction(
                features, dim, config.interaction_branch1_layer_sizes, config.interaction_branch2_layer_sizes
            )
