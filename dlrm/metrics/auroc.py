"""Area under the ROC curve in one pass and bounded memory.

Shapes: B scores of an update, K entries of the sketch.
"""

import torch
import torch.distributed as dist

CAPACITY = 1 << 18
BUFFER = 1 << 20


class AurocSketch:
    """Scores with the positives and negatives at each, merged into at most `capacity` neighbourhoods of equal mass.

    Equal scores share one entry, so that ties count one half. While there are no more than `capacity` distinct scores
    the result is exact. Beyond, neighbours in score are merged until `capacity` groups of about equal mass are left.
    What is lost is the order inside a group, worth at most half the share of all samples that a group holds: about
    1 / (2 * capacity) = 2e-6 for one merge of scores however distributed, and world size / (8 * capacity) for the merge
    over ranks. Scores that arrive between two merges can fall inside a group of the first, which adds a little.
    State: 20 bytes an entry and 5 a buffered score, 10 MiB; a merge takes some times that for a moment.
    """

    def __init__(self, device: torch.device, capacity: int = CAPACITY, buffer: int = BUFFER) -> None:
        self.capacity = capacity
        self._scores = torch.empty(0, dtype=torch.float32, device=device)
        self._counts = torch.empty(0, 2, dtype=torch.int64, device=device)  # [K, (negatives, positives)]
        self._pending_scores = torch.empty(buffer, dtype=torch.float32, device=device)
        self._pending_labels = torch.empty(buffer, dtype=torch.bool, device=device)
        self._num_pending = 0

    def update(self, scores_B: torch.Tensor, labels_B: torch.Tensor) -> None:
        """Takes in float scores and their 0/1 labels. No synchronization with the host but once per full buffer."""
        room = len(self._pending_scores)
        for scores, labels in zip(scores_B.split(room), labels_B.split(room), strict=True):
            if self._num_pending + len(scores) > room:
                self._compact()
            own = slice(self._num_pending, self._num_pending + len(scores))
            self._pending_scores[own] = scores
            self._pending_labels[own] = labels > 0.5
            self._num_pending += len(scores)

    def compute(self) -> float | None:
        """AUROC over the scores of all ranks; None without a positive or without a negative.

        Collective.
        """
        self._compact()
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._gather()
        negatives, positives = self._counts.double().unbind(1)
        below = negatives.cumsum(0) - negatives
        pairs = negatives.sum() * positives.sum()
        area = (positives * (below + negatives / 2)).sum()
        return (area / pairs).item() if pairs.item() > 0 else None

    def _compact(self) -> None:
        own = slice(self._num_pending)
        labels = self._pending_labels[own].long()
        self._scores = torch.cat((self._scores, self._pending_scores[own]))
        self._counts = torch.cat((self._counts, torch.stack((1 - labels, labels), dim=1)))
        self._num_pending = 0
        self._scores, self._counts = _merge_equal(self._scores, self._counts)
        self._scores, self._counts = _merge_neighbours(self._scores, self._counts, self.capacity)

    def _gather(self) -> None:
        """Every rank's entries on every rank; thinned first, so that this too is bounded whatever the world size."""
        world_size = dist.get_world_size()
        share = max(1, 4 * self.capacity // world_size)
        scores, counts = _merge_neighbours(self._scores, self._counts, share)
        sizes = torch.zeros(world_size, dtype=torch.int64, device=scores.device)
        sizes[dist.get_rank()] = len(scores)
        dist.all_reduce(sizes)
        most = int(sizes.max())
        padded_scores, padded_counts = scores.new_zeros(most), counts.new_zeros(most, 2)
        padded_scores[: len(scores)], padded_counts[: len(scores)] = scores, counts
        all_scores = [torch.empty_like(padded_scores) for _ in range(world_size)]
        all_counts = [torch.empty_like(padded_counts) for _ in range(world_size)]
        dist.all_gather(all_scores, padded_scores)
        dist.all_gather(all_counts, padded_counts)
        # A padding entry counts nothing, wherever its score of 0 sorts.
        self._scores, self._counts = _merge_equal(torch.cat(all_scores), torch.cat(all_counts))


def _merge_equal(scores: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores, order = scores.sort()
    scores, group = scores.unique_consecutive(return_inverse=True)
    return scores, counts.new_zeros(len(scores), 2).index_add_(0, group, counts[order])


def _merge_neighbours(scores: torch.Tensor, counts: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    if len(scores) <= capacity:
        return scores, counts
    mass = counts.sum(1).double()
    middle = mass.cumsum(0) - mass / 2
    group = (middle * (capacity / mass.sum())).long()
    _, group = group.unique_consecutive(return_inverse=True)
    merged = counts.new_zeros(int(group[-1]) + 1, 2).index_add_(0, group, counts)
    weighted = mass.new_zeros(len(merged)).index_add_(0, group, scores.double() * mass)
    return (weighted / merged.sum(1)).float(), merged
