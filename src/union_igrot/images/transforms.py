"""From an upright image to the tensor that a backbone wants: a `Preprocess`, applied.

Does not know which backbone asked, nor where an image comes from.
"""

from collections.abc import Iterable
from typing import TypeVar, final

import torch
import torchvision.transforms.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode

from union_igrot.errors import ConfigError
from union_igrot.images.decode import as_image, as_rgb
from union_igrot.types import Preprocess

# Beyond this side ratio only the middle is resized: a strip of 1 x 60,000 pixels would else need gigabytes.
_STRIP = 16
Pixels = TypeVar("Pixels", Image.Image, Tensor)
"""Torchvision's transforms take an image or its pixels alike."""
_FILTERS = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


@final
class ImageToPixels:
    """Bring an image to a backbone's size, as torchvision's transforms do it, pixel for pixel.

    `squash` resizes both sides to `size`; `crop` resizes the short side and cuts the center; `pad` first adds
    black to an image longer than `pad_ratio` until it has that ratio (TargetPad: Baldrati et al., CLIP4Cir,
    CVPR 2022, `data_utils.py`, taken over by TransAgg), then does as `crop`. Resizing is antialiased. Of a strip
    longer than 16:1 only the middle 16:1 is resized, which bounds the memory. Can be pickled.

    What it gives is a quarter of the size of what `model_input` makes of it: between processes, and on the way to
    a device, images travel so.

    Args:
        preprocess: What the backbone asks for.

    Raises:
        ConfigError: Where `size` is below 1, `pad_ratio` below 1 or a `std` not above 0.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        if preprocess.size < 1 or preprocess.pad_ratio < 1 or min(preprocess.std) <= 0:
            raise ConfigError(f"{preprocess} cannot be applied; size and pad_ratio must be >= 1, every std > 0")
        self.preprocess = preprocess

    def __call__(self, image: Image.Image) -> UInt8[Tensor, "3 size size"]:
        """Apply it to an image of any mode."""
        size = self.preprocess.size
        image = as_rgb(image)
        if image.size != (size, size):
            image = self._fit(image)
        pixels: Tensor = F.pil_to_tensor(image)
        return pixels

    def of_decoded(self, pixels: UInt8[Tensor, "*batch 3 height width"]) -> UInt8[Tensor, "*batch 3 size size"]:
        """Apply it to decoded images of one size, on the device where they lie.

        Values differ from those of the same image by a step or two, as it is resized in another arithmetic.
        """
        size = self.preprocess.size
        return pixels if pixels.shape[-2:] == (size, size) else self._fit(pixels)

    def _fit(self, image: Pixels) -> Pixels:
        size, resample = self.preprocess.size, _FILTERS[self.preprocess.interpolation]
        if self.preprocess.fit == "squash":
            squashed: Pixels = F.resize(image, [size, size], resample, antialias=True)
            return squashed
        if self.preprocess.fit == "pad":
            image = _pad(image, self.preprocess.pad_ratio)
        width, height = F.get_image_size(image)
        limit = _STRIP * min(width, height)
        if max(width, height) > limit:
            image = F.center_crop(image, [min(height, limit), min(width, limit)])
        image = F.resize(image, size, resample, antialias=True)
        cut: Pixels = F.center_crop(image, [size, size])
        return cut


def model_input(
    pixels: UInt8[Tensor, "*batch 3 height width"], preprocess: Preprocess
) -> Float[Tensor, "*batch 3 height width"]:
    """Scale pixels to 0..1, subtract `mean` and divide by `std`, on the device where they lie.

    Equal to torchvision's `ToTensor` and `Normalize` to the last bit on a CPU.

    Args:
        pixels: What `ImageToPixels` gave, one image or a batch.
        preprocess: What the backbone asks for.
    """
    scaled = pixels.to(torch.float32).div_(255)
    mean, std = (
        torch.tensor(values, device=pixels.device)[:, None, None] for values in (preprocess.mean, preprocess.std)
    )
    return scaled.sub_(mean).div_(std)


@final
class ImageToTensor:
    """Turn an image into a backbone's input: `ImageToPixels`, then `model_input`. Can be pickled.

    Args:
        preprocess: What the backbone asks for.

    Raises:
        ConfigError: As `ImageToPixels`.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        self._to_pixels, self.preprocess = ImageToPixels(preprocess), preprocess

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 size size"]:
        """Apply it to an image of any mode."""
        return model_input(self._to_pixels(image), self.preprocess)


def image_batch(images: Iterable[object], preprocess: Preprocess) -> Float[Tensor, "batch 3 size size"]:
    """Turn images into one batch for a model.

    Args:
        images: Paths, PIL images, bytes, arrays, ... as `as_image` takes them; at least one.
        preprocess: The model's.

    Returns:
        The batch, in the order given.

    Raises:
        ImageError: Where an image cannot be read.
    """
    to_pixels = ImageToPixels(preprocess)
    pixels = [to_pixels(as_image(image, at_least=preprocess.size)) for image in images]
    return model_input(torch.stack(pixels), preprocess)


def _pad(image: Pixels, ratio: float) -> Pixels:
    width, height = F.get_image_size(image)
    if max(width, height) / min(width, height) < ratio:
        return image
    short = max(width, height) / ratio
    beside, above = max(int((short - width) / 2), 0), max(int((short - height) / 2), 0)
    padded: Pixels = F.pad(image, [beside, above, beside, above], 0, "constant")
    return padded
