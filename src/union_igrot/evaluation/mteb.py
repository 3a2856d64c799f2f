"""A model for MTEB (extra `mteb`): queries through the query head, documents through the target head.

Tasks are `CIRRIT2IRetrieval`, `FashionIQIT2IRetrieval`, `SketchyI2IRetrieval` and others of images and texts. Their
galleries and metrics are MTEB's own: the numbers are not those of the official protocols of these datasets.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from union_igrot.errors import ConfigError, DataError
from union_igrot.models.model import IGROTModel

if TYPE_CHECKING:
    from mteb.models.model_meta import ModelMeta


def mteb_model(model: IGROTModel, name: str = "union-igrot/model") -> Any:
    """Return a model that `mteb.evaluate` takes.

    Args:
        model: Any model.
        name: Name in MTEB's results, `owner/name`.

    Raises:
        ConfigError: If mteb is not installed.
    """
    try:
        from mteb.models.abs_encoder import AbsEncoder  # noqa: PLC0415 - of an extra
    except ImportError:
        raise ConfigError("mteb is not installed; pip install 'union-igrot[mteb]'") from None

    class Encoder(AbsEncoder):  # type: ignore[misc]
        mteb_model_meta = _metadata(model, name)

        def encode(self, inputs: Iterable[Mapping[str, Any]], **options: Any) -> npt.NDArray[np.float32]:
            kind = options.get("prompt_type")
            return encode_batches(model, inputs, documents=getattr(kind, "value", kind) == "document")

    return Encoder()


def encode_batches(
    model: IGROTModel, batches: Iterable[Mapping[str, Any]], *, documents: bool
) -> npt.NDArray[np.float32]:
    """Return unit embeddings of MTEB's batches of `text` and `image`.

    Documents go through the target head. They have images, and a text of theirs is not used: there is no head for it.

    Raises:
        DataError: If a document has no image.
    """
    found = []
    for batch in batches:
        images, texts = batch.get("image"), batch.get("text")
        if documents and images is None:
            raise DataError("a document without an image has no target head; choose a task whose documents are images")
        found.append(model.encode_gallery(images) if documents else model.encode_queries(images, texts))
    return torch.cat(found).numpy()


def _metadata(model: IGROTModel, name: str) -> "ModelMeta":
    from mteb.models.model_meta import ModelMeta  # noqa: PLC0415 - of an extra

    unknown = [*("release_date", "languages", "memory_usage_mb", "max_tokens", "license", "open_weights")]
    unknown += ["public_training_code", "public_training_data", "training_datasets"]
    return ModelMeta(
        loader=None,
        name=name,
        revision=model.fingerprint(),
        n_parameters=sum(weight.numel() for weight in model.parameters()),
        embed_dim=model.backbone.dim,
        framework=["PyTorch"],
        similarity_fn_name="cosine",
        use_instructions=False,
        modalities=["image", "text"],
        **dict.fromkeys(unknown),
    )
