"""How embedded features meet: pairwise dot products, low-rank DCN v2, or projection.

Shapes: B samples, F sparse features (categorical ones, and integers that have buckets), D embedding dimension,
P = (F + 1) * F / 2 pairs, G = (F + 1) * D. Each takes the embedded integers dense_BD, matrices in which the F
embeddings are, and for each matrix the first column of each embedding in it, in order. Each says its `out_features`.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torchrec.modules.crossnet import LowRankCrossNet

from dlrm.kernels.interaction import dot_interaction, take_vectors
from dlrm.model.dense import ReluMLP


class DotInteraction(nn.Module):
    """The dense vector beside the dot product of each pair of feature vectors (arXiv:1906.00091, section 2.1.3).

    Matches torchrec.models.dlrm.InteractionArch.
    """

    def __init__(self, num_sparse_features: int, embedding_dim: int) -> None:
        super().__init__()
        self.out_features = embedding_dim + (num_sparse_features + 1) * num_sparse_features // 2

    def forward(
        self, dense_BD: torch.Tensor, sources: Sequence[torch.Tensor], columns: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Returns [B, D + P]."""
        return dot_interaction(dense_BD, sources, columns, may_overwrite=True)


class DCNInteraction(nn.Module):
    """Cross layers with low-rank weights over all feature vectors laid end to end (arXiv:2008.13535, section 3.2).

    Matches torchrec.models.dlrm.InteractionDCNArch.
    """

    def __init__(self, num_sparse_features: int, embedding_dim: int, num_layers: int, low_rank_dim: int) -> None:
        super().__init__()
        self.out_features = (num_sparse_features + 1) * embedding_dim
        self.crossnet = LowRankCrossNet(self.out_features, num_layers, low_rank_dim)

    def forward(
        self, dense_BD: torch.Tensor, sources: Sequence[torch.Tensor], columns: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Returns [B, G]."""
        return self.crossnet(_end_to_end(dense_BD, sources, columns))


class ProjectionInteraction(nn.Module):
    """The dense vector beside the product of two matrices that two MLPs make of all feature vectors.

    Matches torchrec.models.dlrm.InteractionProjectionArch.
    """

    def __init__(
        self, num_sparse_features: int, embedding_dim: int, branch1_sizes: Sequence[int], branch2_sizes: Sequence[int]
    ) -> None:
        super().__init__()
        in_features = (num_sparse_features + 1) * embedding_dim
        self.embedding_dim = embedding_dim
        self.interaction_branch1 = ReluMLP(in_features, list(branch1_sizes))
        self.interaction_branch2 = ReluMLP(in_features, list(branch2_sizes))
        self.out_features = embedding_dim + (branch1_sizes[-1] // embedding_dim) * (branch2_sizes[-1] // embedding_dim)

    def forward(
        self, dense_BD: torch.Tensor, sources: Sequence[torch.Tensor], columns: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Returns [B, D + F1 * F2], with F1 and F2 the branches' widths over D."""
        features_BG = _end_to_end(dense_BD, sources, columns)
        left = self.interaction_branch1(features_BG).unflatten(1, (-1, self.embedding_dim))
        right = self.interaction_branch2(features_BG).unflatten(1, (self.embedding_dim, -1))
        return torch.cat((dense_BD, torch.bmm(left, right).flatten(1)), dim=1)


def _end_to_end(
    dense_BD: torch.Tensor, sources: Sequence[torch.Tensor], columns: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Each sample's vectors in order, [B, G]."""
    return torch.cat((dense_BD, *take_vectors(dense_BD.size(1), sources, columns)), dim=1)
