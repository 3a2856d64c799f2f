"""From arrays and tensors to images, and a clear word for those that are none.

Knows shapes, types and ranges of numbers. Does not know files.
"""

from typing import Final

import numpy as np
from PIL import Image
from torch import Tensor

from union_igrot.errors import ImageError

_CHANNELS: Final = (1, 3, 4)
_KINDS: Final = "uint8 (0..255), uint16 (0..65535), float (0..1) or bool"
_SHAPES: Final = {"array": "HxW, HxWx1, HxWx3 or HxWx4", "tensor": "HxW, 1xHxW, 3xHxW or 4xHxW"}
_SLACK: Final = 1e-4  # what rounding may add to a float of 0..1; a tenth of a gray level is 4e-4


def image_from_array(array: np.ndarray) -> Image.Image:
    """Make an image of an array of height x width, gray, RGB or RGBA.

    Args:
        array: uint8, uint16, bool, or floats of 0..1, which are rounded to 256 levels.

    Returns:
        An image in mode L, RGB or RGBA.

    Raises:
        ImageError: Where shape, type or range are others; one line that says which and what is allowed.
    """
    _check_shape("array", array.shape, last=True)
    return _picture(array, _named("array", array.shape, str(array.dtype)))


def image_from_tensor(tensor: Tensor) -> Image.Image:
    """Make an image of a tensor of channels x height x width, gray, RGB or RGBA, or of height x width.

    Args:
        tensor: uint8, uint16, bool, or floats of 0..1, on any device.

    Returns:
        An image in mode L, RGB or RGBA.

    Raises:
        ImageError: Where shape, type or range are others; one line that says which and what is allowed.
    """
    shape = tuple(tensor.shape)
    _check_shape("tensor", shape, last=False)
    here = tensor.detach().cpu()
    numbers = (here.float() if here.is_floating_point() else here).numpy()
    dtype = str(tensor.dtype).removeprefix("torch.")
    return _picture(numbers if numbers.ndim == 2 else numbers.transpose(1, 2, 0), _named("tensor", shape, dtype))


def _named(kind: str, shape: tuple[int, ...], dtype: str = "") -> str:
    sizes = "x".join(map(str, shape)) or "no dimension"
    return f"{'an' if kind == 'array' else 'a'} {kind} of {sizes}" + (f", {dtype}," if dtype else "")


def _check_shape(kind: str, shape: tuple[int, ...], *, last: bool) -> None:
    place, other = (-1, 0) if last else (0, -1)
    if (len(shape) == 2 or (len(shape) == 3 and shape[place] in _CHANNELS)) and 0 not in shape:
        return
    advice = f"give {_SHAPES[kind]}"
    if 0 in shape:
        advice = "it holds no pixel"
    elif len(shape) == 4:
        advice = "give one image at a time, or a list of them"
    elif len(shape) == 3 and shape[other] in _CHANNELS:
        turned = "transpose(1, 2, 0)" if last else "permute(2, 0, 1)"
        advice += f"; its channels stand {'first' if last else 'last'}: {turned} turns it"
    raise ImageError(f"{_named(kind, shape)} is no image: {advice}")


def _picture(numbers: np.ndarray, named: str) -> Image.Image:
    kind = numbers.dtype
    if kind == np.bool_:
        levels = numbers.astype(np.uint8) * 255
    elif kind == np.uint16:
        levels = (numbers.astype(np.float32) * (255 / 65535)).round().astype(np.uint8)
    elif kind == np.uint8:
        levels = numbers
    elif np.issubdtype(kind, np.floating):
        low, high = float(numbers.min()), float(numbers.max())
        if not (low >= -_SLACK and high <= 1 + _SLACK):  # nan fails both
            raise ImageError(
                f"{named} holds values from {low:.4g} to {high:.4g}; floats are 0..1: scale them, "
                "and undo a normalization"
            )
        levels = (numbers.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)
    else:
        raise ImageError(f"{named} is no image: give {_KINDS}")
    return Image.fromarray(np.ascontiguousarray(levels[..., 0] if levels.shape[2:] == (1,) else levels))
