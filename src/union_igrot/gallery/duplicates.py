"""Near duplicates in a gallery: equal files, one image saved in several ways, and similar images.

A group is an image and its duplicates: of the images without a group, the one of most pixels, then of most bytes,
takes all others that duplicate it. Each member is therefore near the first image itself; nothing is chained, unlike in
connected components. Copies are grouped before similar images, of which only the best copies are compared. Pairs are
compared in blocks of rows; they are never held all at once.
"""

import io
import math
from collections.abc import Callable, Mapping
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8, UInt64
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from union_igrot.errors import ConfigError
from union_igrot.gallery.engines.base import ColumnValue, VectorIndex
from union_igrot.gallery.metadata import extra_width
from union_igrot.gallery.results import DUPLICATE, THUMBNAIL, Hit, SearchResult

THRESHOLD: Final = 0.95
"""Cosine similarity from which images are similar; see docs/searching.md for what it finds."""
BITS: Final = 8  # of 64 bits of the perceptual hash that one image saved in two ways may differ in
DIFFERENCE: Final = 10.0  # mean difference of the small gray images of one image, in levels of 255
BLOCK_BYTES: Final = 2**26  # memory for the comparisons of a block of rows
_READ: Final = 2048  # rows read at once
_PAIRS: Final = 2**14  # pairs of small images compared at once
_SIDE: Final = 32
_COLUMNS: Final = ("width", "height", "size")

_OnProgress = Callable[[int, int], None]
_Reason = Literal["same file", "same image", "similar"]
_REASONS: Final[tuple[_Reason | None, ...]] = (None, "similar", "same image", "same file")


class _Contents(NamedTuple):
    """What is compared, one row per image, the best copy first."""

    ids: list[str]
    digests: Int64[np.ndarray, " images"]  # equal for equal files
    hashes: UInt64[np.ndarray, " images"]
    small: UInt8[np.ndarray, "images pixels"]  # gray, _SIDE wide and high; all black without a thumbnail
    vectors: Float32[Tensor, "images dim"]  # of unit length
    sizes: list[tuple[int, ...]]  # width, height and bytes


class _Member(NamedTuple):
    """An image of a group."""

    position: int
    level: int  # of its relation to the first, see _REASONS
    cosine: float


def find_duplicates(
    index: VectorIndex,
    threshold: float | int | None = THRESHOLD,
    where: str | None = None,
    *,
    thumbnails: int = 200,
    on_progress: _OnProgress = lambda done, total: None,  # noqa: ARG005
) -> list[SearchResult]:
    """Find groups of near duplicates; nothing is removed.

    Args:
        index: The index, which holds what is compared: hashes, thumbnails and embeddings. For a folder, index it first,
            such as in `memory:`.
        threshold: Lowest cosine similarity of similar images, above 0 and at most 1; None for none of them.
        where: A filter on columns for the images that are compared.
        thumbnails: How many groups, from the first on, have thumbnails.
        on_progress: Called with the number of images done, and of all, for each of up to three passes.

    Returns:
        Groups of at least two images: first those of copies, then those of similar images, which hold only the first
        image of a group of copies; of each kind those with most images first. The column `duplicate` of each hit after
        the first says how it duplicates the first: `same file`, equal bytes; `same image`, saved again, in another
        format or size; or `similar`. Its score is the cosine similarity to the first.

    Raises:
        ConfigError: If the threshold or the filter is invalid.
    """
    if threshold is not None and not 0 < threshold <= 1:
        raise ConfigError(f"invalid value for threshold: {threshold} (expected a number above 0 and at most 1)")
    contents = _read_contents(index, where, on_progress)
    groups = _find_groups(contents, threshold, on_progress)
    shown = [contents.ids[one.position] for group in groups[:thumbnails] for one in group]
    jpegs: dict[str, ColumnValue] = {}
    for at in range(0, len(shown), _READ):
        rows = index.fetch(shown[at : at + _READ])
        jpegs |= zip(rows.ids, rows.columns.get(THUMBNAIL, ()), strict=False)
    return [SearchResult([_as_hit(contents, one, jpegs) for one in group]) for group in groups]


def perceptual_hashes(small: UInt8[np.ndarray, "images 32 32"]) -> UInt64[np.ndarray, " images"]:
    """Return 64-bit perceptual hashes of small gray images: the signs of low frequencies relative to their median.

    Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions (2010), section 3.2.1.
    """
    steps = np.arange(_SIDE)
    basis = np.cos(math.pi / _SIDE * np.outer(np.arange(8), steps + 0.5))  # of the discrete cosine transform
    low = (basis @ small.astype(np.float64) @ basis.T).reshape(-1, 64)
    bits = low > np.median(low, axis=1, keepdims=True)
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0]


def _read_contents(index: VectorIndex, where: str | None, on_progress: _OnProgress) -> _Contents:
    ids = [str(name) for batch in index.scan(["id"], where) for name in batch["id"]]
    dim = index.dim - extra_width(index.metadata)
    vectors, small = torch.empty(len(ids), dim), np.zeros((len(ids), _SIDE, _SIDE), dtype=np.uint8)
    digests: list[str] = []
    sizes: list[tuple[int, ...]] = []
    for at in range(0, len(ids), _READ):
        on_progress(at, len(ids))
        rows = index.fetch(ids[at : at + _READ])
        vectors[at : at + len(rows.ids)] = normalize(rows.vectors[:, :dim], dim=-1)
        none = [None] * len(rows.ids)
        for i, jpeg in enumerate(rows.columns.get(THUMBNAIL, none)):
            if isinstance(jpeg, bytes) and jpeg:
                small[at + i] = _small_gray(jpeg)
        digests += [str(one or f"row {at + i}") for i, one in enumerate(rows.columns.get("hash", none))]
        sizes += zip(*([int(one or 0) for one in rows.columns.get(name, none)] for name in _COLUMNS), strict=True)
    order = sorted(range(len(ids)), key=lambda at: (-sizes[at][0] * sizes[at][1], -sizes[at][2]))
    small = small[order]
    return _Contents(
        [ids[at] for at in order],
        np.unique(np.array(digests, dtype=str)[order], return_inverse=True)[1],
        perceptual_hashes(small),
        small.reshape(len(ids), _SIDE * _SIDE),
        vectors[order],
        [sizes[at] for at in order],
    )


def _small_gray(jpeg: bytes) -> UInt8[np.ndarray, "32 32"]:
    with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as image:
        return np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.BOX))


def _find_groups(contents: _Contents, threshold: float | int | None, on_progress: _OnProgress) -> list[list[_Member]]:
    count = len(contents.ids)
    copies = _stars(contents, np.arange(count), lambda block: _compare_contents(contents, block), on_progress)
    copies.sort(key=len, reverse=True)
    if threshold is None:
        return copies
    left = np.setdiff1d(np.arange(count), [one.position for group in copies for one in group[1:]])
    vectors = contents.vectors[left]

    def compare(block: slice) -> UInt8[np.ndarray, "block rest"]:
        return ((vectors[block] @ vectors[block.start :].T) >= threshold).byte().numpy()

    similar = _stars(contents, left, compare, on_progress)
    return [*copies, *sorted(similar, key=len, reverse=True)]


def _stars(
    contents: _Contents,
    positions: Int64[np.ndarray, " some"],
    compare: Callable[[slice], UInt8[np.ndarray, "block rest"]],
    on_progress: _OnProgress,
) -> list[list[_Member]]:
    """Group some images; `compare` returns the levels of a block of them and of all from its first one on."""
    count, groups = len(positions), []
    free = np.ones(count, dtype=bool)
    size = max(1, BLOCK_BYTES // (16 * max(1, count)))
    for start in range(0, count, size):
        on_progress(start, count)
        levels = compare(slice(start, min(start + size, count)))
        levels[:, :size] = np.triu(levels[:, :size], 1)  # each pair once
        for row in np.flatnonzero(levels.any(axis=1)).tolist():
            found = np.flatnonzero((levels[row] > 0) & free[start:])
            if free[start + row] and len(found):
                free[start + found] = free[start + row] = False
                first, others = int(positions[start + row]), positions[start + found]
                cosines = (contents.vectors[others] @ contents.vectors[first]).tolist()
                members = map(_Member, others.tolist(), levels[row, found].tolist(), cosines)
                groups.append([_Member(first, 0, 1.0), *sorted(members, key=lambda one: (-one.level, -one.cosine))])
    return groups


def _compare_contents(contents: _Contents, block: slice) -> UInt8[np.ndarray, "block rest"]:
    """Return 3 for equal files, 2 for equal images and 0 for others."""
    rest = slice(block.start, None)
    rows, columns = np.nonzero(np.bitwise_count(contents.hashes[block][:, None] ^ contents.hashes[rest]) <= BITS)
    small, others = contents.small[block], contents.small[rest]
    levels = np.zeros((len(small), len(others)), dtype=np.uint8)
    for at in range(0, len(rows), _PAIRS):
        left, right = rows[at : at + _PAIRS], columns[at : at + _PAIRS]
        difference = np.abs(small[left].astype(np.int16) - others[right]).mean(axis=1)
        same = (difference <= DIFFERENCE) & small[left].any(axis=1) & others[right].any(axis=1)
        levels[left[same], right[same]] = 2
    levels[contents.digests[block][:, None] == contents.digests[rest]] = 3
    return levels


def _as_hit(contents: _Contents, member: _Member, jpegs: Mapping[str, ColumnValue]) -> Hit:
    name = contents.ids[member.position]
    columns = dict(zip(_COLUMNS, contents.sizes[member.position], strict=True))
    jpeg = jpegs.get(name)
    return Hit(
        name, member.cosine, {DUPLICATE: _REASONS[member.level], **columns}, jpeg if isinstance(jpeg, bytes) else None
    )
