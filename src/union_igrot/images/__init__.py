"""Decoding of images, their identity, and conversion to model inputs."""

from typing import TYPE_CHECKING

from union_igrot._lazy import lazy_exports

if TYPE_CHECKING:
    from union_igrot.images.decode import as_image as as_image, open_image as open_image
    from union_igrot.images.identity import Crop as Crop, image_identity as image_identity
    from union_igrot.images.transforms import (
        ImageToPixels as ImageToPixels,
        ImageToTensor as ImageToTensor,
        image_batch as image_batch,
        model_input as model_input,
    )

__getattr__, __dir__ = lazy_exports(__name__, __file__)
