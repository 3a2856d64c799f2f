"""From an upright image to a backbone's input tensor, as its `Preprocess` says."""

import warnings
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

# Of a longer image only the middle is resized: a strip of 1 x 60,000 pixels would need gigabytes.
_MAX_RATIO = 16
Pixels = TypeVar("Pixels", Image.Image, Tensor)
"""Torchvision's transforms take both."""
_FILTERS = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}


@final
class ImageToPixels:
    """Resize an image to a backbone's input size, equal to torchvision's transforms pixel for pixel.

    `squash` resizes both sides to `size`; `crop` resizes the short side and crops the center; `pad` first pads an
    image longer than `pad_ratio` with black to that ratio (TargetPad: Baldrati et al., CLIP4Cir, CVPR 2022,
    `data_utils.py`, also used by TransAgg), then does as `crop`. Resizing is antialiased. Of an image longer than
    16:1 only the middle 16:1 is resized, which bounds the memory. Can be pickled.

    The result has a quarter of the bytes of `model_input`: images are sent to other processes and devices in it.

    Raises:
        ConfigError: If `size` or `pad_ratio` is below 1, or a `std` is not above 0.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        if preprocess.size < 1 or preprocess.pad_ratio < 1 or min(preprocess.std) <= 0:
            raise ConfigError(f"invalid {preprocess} (expected size >= 1, pad_ratio >= 1, every std > 0)")
        self.preprocess = preprocess

    def __call__(self, image: Image.Image) -> UInt8[Tensor, "3 size size"]:
        """Resize an image of any mode."""
        size = self.preprocess.size
        image = as_rgb(image)
        if image.size != (size, size):
            image = self._fit(image)
        pixels: Tensor = F.pil_to_tensor(image)
        return pixels

    def _fit(self, image: Pixels) -> Pixels:
        size, resample = self.preprocess.size, _FILTERS[self.preprocess.interpolation]
        if self.preprocess.fit == "squash":
            squashed: Pixels = F.resize(image, [size, size], resample, antialias=True)
            return squashed
        if self.preprocess.fit == "pad":
            image = _pad(image, self.preprocess.pad_ratio)
        width, height = F.get_image_size(image)
        limit = _MAX_RATIO * min(width, height)
        if max(width, height) > limit:
            image = F.center_crop(image, [min(height, limit), min(width, limit)])
        image = F.resize(image, size, resample, antialias=True)
        cut: Pixels = F.center_crop(image, [size, size])
        return cut


def model_input(
    pixels: UInt8[Tensor, "*batch 3 height width"], preprocess: Preprocess
) -> Float[Tensor, "*batch 3 height width"]:
    """Scale pixels to 0..1, subtract `mean` and divide by `std`, on their device.

    On a CPU bitwise equal to torchvision's `ToTensor` and `Normalize`.
    """
    scaled = pixels.to(torch.float32).div_(255)
    mean, std = (
        torch.tensor(values, device=pixels.device)[:, None, None] for values in (preprocess.mean, preprocess.std)
    )
    return scaled.sub_(mean).div_(std)


@final
class ImageToTensor:
    """Convert an image to a backbone's input: `ImageToPixels`, then `model_input`. Can be pickled."""

    def __init__(self, preprocess: Preprocess) -> None:
        self._to_pixels, self.preprocess = ImageToPixels(preprocess), preprocess

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 size size"]:
        """Convert an image of any mode."""
        return model_input(self._to_pixels(image), self.preprocess)


def open_pixels(image: object, preprocess: Preprocess) -> UInt8[Tensor, "3 size size"]:
    """Open an image of any type that `as_image` takes, and bring it to the size of a backbone."""
    return ImageToPixels(preprocess)(as_image(image, at_least=preprocess.size))


def image_batch(images: Iterable[object], preprocess: Preprocess) -> Float[Tensor, "batch 3 size size"]:
    """Convert images, at least one, to one batch for a model.

    Args:
        images: Paths, PIL images, bytes, arrays, ... as for `as_image`.
        preprocess: The model's preprocessing.

    Raises:
        ImageError: If an image cannot be decoded.
    """
    return model_input(torch.stack([open_pixels(image, preprocess) for image in images]), preprocess)


def picture_batch(images: Iterable[object], preprocess: Preprocess) -> Float[Tensor, "batch 3 size size"]:
    """Deprecated alias of `image_batch`."""
    warnings.warn("picture_batch is deprecated; use image_batch", DeprecationWarning, stacklevel=2)
    return image_batch(images, preprocess)


def _pad(image: Pixels, ratio: float) -> Pixels:
    width, height = F.get_image_size(image)
    if max(width, height) / min(width, height) < ratio:
        return image
    short = max(width, height) / ratio
    beside, above = max(int((short - width) / 2), 0), max(int((short - height) / 2), 0)
    padded: Pixels = F.pad(image, [beside, above, beside, above], 0, "constant")
    return padded
