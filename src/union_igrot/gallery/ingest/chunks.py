"""What became of some images, as a file of the work folder: safetensors, whole or not at all.

Knows facts, vectors and thumbnails. Does not know an index, nor who embedded them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from union_igrot.storage.atomic import move_aside
from union_igrot.storage.cache import write_cached

SUFFIX: Final = ".safetensors"


@dataclass(frozen=True, slots=True)
class Fact:
    """What became of one image.

    Attributes:
        id: Its entry's.
        size: Bytes, when it was listed.
        mtime: Time of change in ns, when it was listed.
        digest: The first 32 hex digits of its bytes' SHA-256; "" where they could not be read.
        width: In pixels, upright.
        height: In pixels, upright.
        at: Its row among the chunk's vectors; None where it takes the vector of equal bytes, or is broken.
        reason: Why it is broken, or None.
    """

    id: str
    size: int
    mtime: int
    digest: str = ""
    width: int = 0
    height: int = 0
    at: int | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some images, and the vectors of those that were embedded.

    Attributes:
        facts: One an image.
        vectors: Float32, one an embedded image.
        thumbnails: JPEG bytes, one an embedded image.
    """

    facts: Sequence[Fact]
    vectors: Float[Tensor, "rows dim"]
    thumbnails: Sequence[bytes]


def write_chunk(path: Path, chunk: Chunk) -> None:
    """Write a chunk; it gets its name when it is whole and on disk.

    Raises:
        DataError: Where the disk is full or cannot be written.
    """
    # An image's name may have been text that is no Unicode: JSON's escapes bring it there and back.
    facts = json.dumps([[getattr(fact, name) for name in Fact.__slots__] for fact in chunk.facts])
    tensors = {
        "facts": _bytes(facts.encode()),
        "vectors": chunk.vectors.contiguous(),
        "thumbnails": _bytes(b"".join(chunk.thumbnails)),
        "lengths": torch.tensor([len(one) for one in chunk.thumbnails], dtype=torch.int64),
    }
    write_cached(path, [save(tensors)])


def read_chunk(path: Path) -> Chunk | None:
    """Read a chunk; a damaged one is set aside, and its images will be read again.

    Raises:
        DataError: Where the disk cannot be read.
    """
    try:
        tensors = load(path.read_bytes())
        facts = [Fact(*values) for values in json.loads(tensors["facts"].numpy().tobytes())]
        images = tensors["thumbnails"].numpy().tobytes()
        ends = tensors["lengths"].cumsum(0).tolist()
        thumbnails = [images[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        return Chunk(facts, tensors["vectors"], thumbnails)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        move_aside(path, error)
        return None


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
