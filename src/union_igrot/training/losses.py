"""Contrastive losses: each query finds its target among those of its batch, or among a bank of further images."""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from union_igrot.features.extractor import join_features
from union_igrot.images.decode import image_key
from union_igrot.training.settings import BankSettings, LossSettings
from union_igrot.types import Features, Triplet

UNKNOWN = -1
"""Group of a reference whose content is that of no target."""


class Candidates(NamedTuple):
    """Images that a batch of queries is compared with.

    Attributes:
        images: Their features.
        groups: The group of each image.
        positives: Position of each query's own target.
    """

    images: Features
    groups: Int[Tensor, " candidates"]
    positives: Int[Tensor, " queries"]


def reference_groups(triplets: Sequence[Triplet], groups: Int[Tensor, " triplets"]) -> Int[Tensor, " triplets"]:
    """Return for each reference the group of the targets that show the same, or `UNKNOWN`.

    That is known from `Triplet.image_group`, or else if the reference is itself a target.

    Args:
        triplets: The samples.
        groups: Number of each sample's group.
    """
    numbers = {triplet.group: number for triplet, number in zip(triplets, groups.tolist(), strict=True)}
    by_image = {image_key(triplet.target): number for triplet, number in zip(triplets, groups.tolist(), strict=True)}
    return torch.tensor(
        [
            numbers.get(one.image_group, UNKNOWN) if one.image_group else by_image.get(image_key(one.image), UNKNOWN)
            for one in triplets
        ]
    )


@final
class CachedBank:
    """All targets and references of the composed samples, each image once, read from the feature store.

    Args:
        targets: Key of each sample's target.
        references: Key of each sample's reference.
        groups: Group of each target.
        reference_groups: Group of each reference.
        lookup: Returns the features of some keys.
        size: Number of images per step. If there are more, each step has the batch's own targets and a random sample.

    Attributes:
        targets: Position of each sample's target in the bank.
    """

    def __init__(
        self,
        targets: Sequence[str],
        references: Sequence[str],
        groups: Int[Tensor, " samples"],
        reference_groups: Int[Tensor, " samples"],
        lookup: Callable[[Sequence[str]], Features],
        size: int,
    ) -> None:
        pairs = list(zip([*targets, *references], [*groups.tolist(), *reference_groups.tolist()], strict=True))
        positions = {pair: at for at, pair in enumerate(dict.fromkeys(pairs))}
        self._keys, self._groups = [key for key, _ in positions], torch.tensor([group for _, group in positions])
        self.targets = torch.tensor([positions[pair] for pair in pairs[: len(targets)]])
        self._lookup, self._size = lookup, size
        self._all: Features | None = None

    def select(
        self, own: Int[Tensor, " queries"], joint: Int[Tensor, " joint"], seed: str, device: torch.device
    ) -> Candidates:
        """Return the images for one step.

        Args:
            own: Positions of the targets of this process's queries.
            joint: Positions of the targets of all processes' queries.
            seed: Seed of the sample, the same on every process.
            device: Device of the result.
        """
        if len(self._keys) <= self._size:
            if self._all is None or self._all.pooled.device != device:
                self._all, self._groups = self._lookup(self._keys).to(device), self._groups.to(device)
            return Candidates(self._all, self._groups, own.to(device))
        sample = random.Random(seed).sample(range(len(self._keys)), self._size)
        rows = torch.cat([joint.new_tensor(sample), joint]).unique()
        images = self._lookup([self._keys[row] for row in rows.tolist()]).to(device)
        positives = torch.searchsorted(rows, own)
        return Candidates(images, self._groups[rows.cpu()].to(device), positives.to(device))


@final
class FeatureQueue:
    """Features of the targets and references of past batches, for an image encoder that is tuned.

    They are as the encoder computed them then, without gradient.

    Args:
        size: Largest number of images; the oldest batches are removed first.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._batches: list[tuple[Features, Int[Tensor, " images"]]] = []

    def add(self, images: Features, groups: Int[Tensor, " images"]) -> None:
        """Add the images of a batch."""
        self._batches.append((images.map(Tensor.detach), groups))
        while sum(len(groups) for _, groups in self._batches) > self._size:
            del self._batches[0]

    def clear(self) -> None:
        """Remove all."""
        self._batches.clear()

    def read(self) -> tuple[Features, Int[Tensor, " images"]] | None:
        """Return all images and their groups; None if there are none."""
        if not self._batches:
            return None
        return join_features([images for images, _ in self._batches]), torch.cat(
            [groups for _, groups in self._batches]
        )


def info_nce(
    queries: Float[Tensor, "queries dim"],
    targets: Float[Tensor, "targets dim"],
    positives: Int[Tensor, " queries"],
    query_groups: Int[Tensor, " queries"] | None = None,
    target_groups: Int[Tensor, " targets"] | None = None,
    scale: float = 100.0,
) -> Float[Tensor, ""]:
    """Return the cross-entropy of finding each query's target among all targets (InfoNCE).

    Source: van den Oord et al., arXiv 1807.03748, equation 4; the scale of 100 is CLIP's and the reference's.

    Args:
        queries: Query embeddings of unit length.
        targets: Target embeddings; of unit length except for the reference's training sum.
        positives: Position of each query's own target among `targets`.
        query_groups: Group of each query's target; other targets of the same group are left out of the query's
            negatives. None leaves nothing out.
        target_groups: Group of each target; given together with `query_groups` or not at all.
        scale: Factor of the cosine similarities (1 / temperature).

    Returns:
        The mean over queries, in nats, at least 0.

    Raises:
        ValueError: If only one of the groups is given.
    """
    if (query_groups is None) != (target_groups is None):
        raise ValueError("query_groups and target_groups must be given together (got one of them)")
    logits = scale * queries @ targets.T
    if query_groups is not None and target_groups is not None:
        same = query_groups[:, None] == target_groups[None, :]
        same[torch.arange(len(positives), device=positives.device), positives] = False
        logits = logits.masked_fill(same, float("-inf"))
    return F.cross_entropy(logits, positives)


class InfoNCE(nn.Module):
    """InfoNCE over the batch, with the negatives of all ranks if training is distributed.

    Args:
        scale: Factor of the cosine similarities (100 in the reference).
        symmetric: Whether targets also retrieve their queries; the loss is the mean of both.
        skip_duplicates: Whether targets of one group are not negatives of each other. In the reference they are.
    """

    def __init__(
        self,
        scale: float = LossSettings.scale,
        *,
        symmetric: bool = LossSettings.symmetric,
        skip_duplicates: bool = LossSettings.skip_duplicates,
    ) -> None:
        super().__init__()
        self.scale, self.symmetric, self.skip_duplicates = scale, symmetric, skip_duplicates

    def extra_repr(self) -> str:
        """Return the options for `repr`, by which a run folder knows the loss."""
        return f"scale={self.scale}, symmetric={self.symmetric}, skip_duplicates={self.skip_duplicates}"

    def forward(
        self,
        queries: Float[Tensor, "batch dim"],
        targets: Float[Tensor, "batch dim"],
        groups: Int[Tensor, " batch"],
    ) -> Float[Tensor, ""]:
        """Return the loss of this rank's queries; row i of `targets` is the target of query i."""
        all_targets, start = gather(targets)
        all_groups, _ = gather(groups)
        positives = torch.arange(start, start + len(queries), device=queries.device)
        own, every = (groups, all_groups) if self.skip_duplicates else (None, None)
        loss = info_nce(queries, all_targets, positives, own, every, self.scale)
        if self.symmetric:
            all_queries, _ = gather(queries)
            loss = (loss + info_nce(targets, all_queries, positives, own, every, self.scale)) / 2
        return loss


@final
class BankLoss(nn.Module):
    """InfoNCE against a bank of images for composed queries, and with a second target for sketches.

    A composed query is compared with all training targets and training references, passed through the target head
    with gradient; images of its own target's content are left out. A sketch is compared with the targets of its batch,
    and with the same images fused with the null text by the query head, so that the query head sees gallery images
    while the gallery stays plain. `forward` is the loss of sketches; the learner computes that of composed queries.

    Args:
        scale: Factor of the cosine similarities.
        auxiliary: Weight of the second term for sketches.
        bank_size: Most images of the bank per step.
        distillation: Weight of `training.distillation`, after training; 0 for none.
    """

    def __init__(
        self,
        scale: float = BankSettings.scale,
        *,
        auxiliary: float = BankSettings.auxiliary,
        bank_size: int = BankSettings.bank_size,
        distillation: float = BankSettings.distillation,
    ) -> None:
        super().__init__()
        self.scale, self.auxiliary, self.bank_size, self.distillation = scale, auxiliary, bank_size, distillation
        self.in_batch = InfoNCE(scale)

    def extra_repr(self) -> str:
        """Return the options for `repr`, by which a run folder knows the loss."""
        options = f"scale={self.scale}, auxiliary={self.auxiliary}, bank_size={self.bank_size}"
        return f"{options}, distillation={self.distillation}"

    def forward(
        self,
        queries: Float[Tensor, "batch dim"],
        targets: Float[Tensor, "batch dim"],
        groups: Int[Tensor, " batch"],
        fused: Float[Tensor, "batch dim"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss of sketches within their batch; `fused` are the targets fused with the null text."""
        loss: Tensor = self.in_batch(queries, targets, groups)
        if fused is None:
            return loss
        second: Tensor = self.in_batch(queries, fused, groups)
        return loss + self.auxiliary * second


def build_loss(kind: str = "infonce", **options: Any) -> nn.Module:
    """Build a loss from the settings of the group `loss`: `bank`, else InfoNCE."""
    return BankLoss(**options) if kind == "bank" else InfoNCE(**options)


class _AllGather(torch.autograd.Function):
    """The rows of all ranks, concatenated; the gradient of a row is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """Gather; all ranks have the same number of rows."""
        gathered = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(gathered, rows.contiguous())
        ctx.count = len(rows)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Sum over ranks and select this rank's rows."""
        total = gradients[0].contiguous()
        torch.distributed.all_reduce(total)
        begin = torch.distributed.get_rank() * ctx.count
        return total[begin : begin + ctx.count]


def gather(rows: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all ranks, with gradient, and the position of this rank's first."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows, 0
    gathered: Tensor = _AllGather.apply(rows)
    return gathered, torch.distributed.get_rank() * len(rows)
