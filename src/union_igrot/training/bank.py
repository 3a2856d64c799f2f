"""Banks of negatives: the images that composed queries are compared with beyond their own batch."""

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import torch
from jaxtyping import Int
from torch import Tensor

from union_igrot.features.extractor import join_features
from union_igrot.images.decode import image_key
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
