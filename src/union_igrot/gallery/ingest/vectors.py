"""Embeddings that exist already: read from a file, and compared with the model of the index."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from union_igrot.errors import ConfigError, DataError, ImageError, first_line
from union_igrot.gallery.ingest.entries import ADDED_SOURCE, Listing
from union_igrot.gallery.ingest.sources import is_list
from union_igrot.models.foreign import FOREIGN
from union_igrot.models.model import IGROTModel
from union_igrot.storage.files import expand_user

VECTOR_FORMS: Final = "a .npy file, .safetensors with one matrix, or .parquet with a column vector"
AGREEMENT: Final = 0.98  # lowest cosine of an embedding and the model's own, which may have another precision
_SHORTEST: Final = 1e-12  # length of a row that is not zero; `normalize` would not give a shorter one unit length
_SAMPLE: Final = 8  # images that are embedded for the comparison


def read_vectors(given: object) -> Float[Tensor, "rows dim"]:
    """Return embeddings with unit length, float32.

    Args:
        given: A file, see `VECTOR_FORMS`; an array, a tensor or nested lists. A vector alone is one row.

    Raises:
        DataError: If it cannot be read, or a row is zero or not finite.
    """
    name = str(given) if isinstance(given, str | Path) else "the array of embeddings"
    try:
        found = torch.as_tensor(_read_file(expand_user(given)) if isinstance(given, str | Path) else given)
        if found.is_complex():
            raise TypeError("complex numbers")
        vectors = (found[None] if found.ndim == 1 else found).detach().cpu().float()
        rows, _ = vectors.shape
    except Exception as error:  # of four libraries
        raise DataError(f"cannot read {name} ({first_line(error)}; expected {VECTOR_FORMS})") from None
    lengths = vectors.norm(dim=1)
    wrong = (~(lengths.isfinite() & (lengths >= _SHORTEST))).nonzero().flatten().tolist()
    if wrong or not rows:
        what = f"row {wrong[0]} is zero or not finite" if wrong else "it has no row"
        raise DataError(f"{name}: {what}; embed the images again")
    return normalize(vectors, dim=1)


def _read_file(path: Path) -> Any:
    if path.suffix.lower() == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import load_file  # noqa: PLC0415 - seldom needed

        (matrix,) = load_file(path).values()
        return matrix
    import pyarrow.parquet  # noqa: PLC0415 - an extra

    return np.array(pyarrow.parquet.read_table(path, columns=["vector"])["vector"].to_pylist(), dtype=np.float64)


def vectors_by_id(
    given: object, vectors: Float[Tensor, "rows dim"], listing: Listing, model: IGROTModel
) -> Mapping[str, Float[Tensor, " dim"]]:
    """Return embeddings by the ids of listed images, after checking that they can be those of the model.

    A few images are embedded for that, unless the model is a `ForeignBackbone`.

    Args:
        given: Where the embeddings are from, for messages.
        vectors: Embeddings in the order of the images, of unit length.
        listing: A list, or single images, which have an order.
        model: The model of the index.

    Raises:
        ConfigError: If the images are of a folder or pattern.
        DataError: If number or width differ, or an embedding is not the model's.
    """
    name = f"vectors={given}" if isinstance(given, str | Path) else "vectors="
    if listing.source != ADDED_SOURCE and not is_list(listing.source):
        raise ConfigError(f"{name} needs a list of images in the same order instead of {listing.source}")
    entries, dim = listing.entries, model.backbone.dim
    if vectors.shape != (len(entries), dim):
        raise DataError(
            f"{name}: {vectors.shape[0]:,} rows of width {vectors.shape[1]} for {len(entries):,} images (expected one "
            f"per image, of the model's width {dim})"
        )
    sound = [at for at, entry in enumerate(entries) if entry.fault is None and entry.offset is None]
    foreign = model.backbone.name.startswith(FOREIGN)
    for at in () if foreign else sound[:: max(1, len(sound) // _SAMPLE)][:_SAMPLE]:
        entry = entries[at]
        try:
            own = model.encode_gallery(entry.path if entry.data is None else entry.data)[0]
        except ImageError:  # it is reported with the others
            continue
        if (cosine := float(normalize(own, dim=-1) @ vectors[at])) < AGREEMENT:
            raise DataError(
                f"{name}: the embedding of {entry.id} is not that of the model (cosine {cosine:.3f}); pass its "
                "checkpoint, or vectors_from=NAME if another program made them"
            )
    return {entry.id: vector for entry, vector in zip(entries, vectors, strict=True)}
