"""How embedded features meet: pairwise dot products, low-rank DCN v2, or projection.

Shapes: B samples, F sparse features (categorical ones, and integers that have buckets), D embedding dimension,
P = (F + 1) * F / 2 pairs, G = (F + 1) * D. Each takes the embedded integers dense_BD, and features_BG: them and the F
embeddings end to end. Each says its `out_features`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.mlp import MLP


class DotInteraction(nn.Module):
    """The dense vector beside the dot product of each pair of feature vectors (arXiv:1906.00091, section 2.1.3).

    Matches torchrec.models.dlrm.InteractionArch.
    """

    def __init__(self, num_sparse_features: int, embedding_dim: int) -> None:
        super().__init__()
        size = num_sparse_features + 1
        rows, columns = torch.triu_indices(size, size, offset=1)
        self.num_pairs = len(rows)
        pair_of_cell = torch.full((size, size), self.num_pairs)
        pair_of_cell[rows, columns] = pair_of_cell[columns, rows] = torch.arange(self.num_pairs)
        self.register_buffer("cell_of_pair", rows * size + columns, persistent=False)
        self.register_buffer("pair_of_cell", pair_of_cell.flatten(), persistent=False)
        self.embedding_dim = embedding_dim
        self.out_features = embedding_dim + self.num_pairs

    def forward(self, dense_BD: torch.Tensor, features_BG: torch.Tensor) -> torch.Tensor:
        """Returns [B, D + P]."""
        device = features_BG.device.type
        if torch.is_autocast_enabled(device):  # which knows nothing of what follows
            features_BG = features_BG.to(torch.get_autocast_dtype(device))
        vectors = features_BG.unflatten(1, (-1, self.embedding_dim))
        products_BP = _PairwiseDots.apply(vectors, self.cell_of_pair, self.pair_of_cell)
        return torch.cat((dense_BD, products_BP), dim=1)


class _PairwiseDots(torch.autograd.Function):
    """The dot product of each pair of a sample's vectors.

    Autograd would differentiate both factors of V V^T; as the gradient G of the products is symmetric, G V is the whole
    of it: one batched product instead of two, and no sum.
    """

    @staticmethod
    def forward(
        ctx: Any, vectors: torch.Tensor, cell_of_pair: torch.Tensor, pair_of_cell: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(vectors, pair_of_cell)
        return torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1).index_select(1, cell_of_pair)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor, None, None]:
        vectors, pair_of_cell = ctx.saved_tensors
        padded = nn.functional.pad(grad_outputs[0], (0, 1))  # the diagonal, which is no pair, reads the zero at the end
        size = vectors.size(1)
        return torch.bmm(padded.index_select(1, pair_of_cell).unflatten(1, (size, size)), vectors), None, None


class DCNInteraction(nn.Module):
    """Cross layers with low-rank weights over all feature vectors laid end to end (arXiv:2008.13535, section 3.2).

    Matches torchrec.models.dlrm.InteractionDCNArch.
    """

    def __init__(self, num_sparse_features: int, embedding_dim: int, num_layers: int, low_rank_dim: int) -> None:
        super().__init__()
        self.out_features = (num_sparse_features + 1) * embedding_dim
        self.crossnet = LowRankCrossNet(self.out_features, num_layers, low_rank_dim)

    def forward(self, dense_BD: torch.Tensor, features_BG: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """Returns [B, G]."""
        return self.crossnet(features_BG)


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
        self.interaction_branch1 = MLP(in_features, list(branch1_sizes))
        self.interaction_branch2 = MLP(in_features, list(branch2_sizes))
        self.out_features = embedding_dim + (branch1_sizes[-1] // embedding_dim) * (branch2_sizes[-1] // embedding_dim)

    def forward(self, dense_BD: torch.Tensor, features_BG: torch.Tensor) -> torch.Tensor:
        """Returns [B, D + F1 * F2], with F1 and F2 the branches' widths over D."""
        left = self.interaction_branch1(features_BG).unflatten(1, (-1, self.embedding_dim))
        right = self.interaction_branch2(features_BG).unflatten(1, (self.embedding_dim, -1))
        return torch.cat((dense_BD, torch.bmm(left, right).flatten(1)), dim=1)
