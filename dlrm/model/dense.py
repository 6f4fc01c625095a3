"""MLPs, and how the integers enter: standardized, flagged where missing, and as embeddings of buckets.

Shapes: B samples, I integer features, D embedding dimension, K buckets with the one for missing.
"""

import math

import torch
from torch import nn
from torchrec.modules.mlp import MLP

from dlrm.kernels.mlp import IntegerFormat, mlp
from dlrm.loader.dense_statistics import DenseStatistics
from dlrm.schema.criteo import MISSING_DENSE


class ReluMLP(MLP):
    """TorchRec's MLP, with its parameters and their names, computed layer by layer in few passes over memory.

    Attributes:
        through: integers that matrix products of wide layers go through; see dlrm.kernels.mlp.
    """

    through: IntegerFormat | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - MLP's name
        """Returns [B, size of the last layer]."""
        layers = [perceptron._linear for perceptron in self._mlp]  # type: ignore[union-attr]
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        return mlp(input, weights, biases, through=self.through)


class StandardizedDense(nn.Module):
    """Each integer less its mean over its deviation, 0 where it is missing, then a 1 for each that is missing."""

    mean_I: torch.Tensor
    deviation_I: torch.Tensor

    def __init__(self, statistics: DenseStatistics) -> None:
        super().__init__()
        self.register_buffer("mean_I", torch.from_numpy(statistics.mean_I))
        self.register_buffer("deviation_I", torch.from_numpy(statistics.deviation_I))
        self.out_features = 2 * len(statistics.mean_I)

    def forward(self, dense_BI: torch.Tensor) -> torch.Tensor:
        """Returns [B, 2 * I]."""
        missing_BI = dense_BI == MISSING_DENSE
        standardized_BI = ((dense_BI - self.mean_I) / self.deviation_I).masked_fill(missing_BI, 0.0)
        return torch.cat((standardized_BI, missing_BI.to(dense_BI.dtype)), dim=1)


class BucketEmbeddings(nn.Module):
    """An embedding for the bucket of each integer."""

    edges_IE: torch.Tensor
    first_bucket_I1: torch.Tensor

    def __init__(self, statistics: DenseStatistics, embedding_dim: int) -> None:
        super().__init__()
        num_features, num_edges = statistics.edges_IE.shape
        num_buckets = num_edges + 1
        self.register_buffer("edges_IE", torch.from_numpy(statistics.edges_IE))
        first_bucket_I1 = torch.arange(num_features)[:, None] * num_buckets
        self.register_buffer("first_bucket_I1", first_bucket_I1, persistent=False)
        self.first_columns = list(range(0, num_features * embedding_dim, embedding_dim))
        bound = 1 / math.sqrt(num_buckets)
        self.weight = nn.Parameter(torch.empty(num_features * num_buckets, embedding_dim).uniform_(-bound, bound))

    def forward(self, dense_BI: torch.Tensor) -> torch.Tensor:
        """Returns [B, I * D]."""
        buckets_IB = torch.searchsorted(self.edges_IE, dense_BI.t().contiguous(), right=True) + self.first_bucket_I1
        return nn.functional.embedding(buckets_IB.t(), self.weight).flatten(1)
