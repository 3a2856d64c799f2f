"""A region cut out of an image, as a source of its own."""

from dataclasses import dataclass
from pathlib import Path
from typing import final

from PIL import Image

from union_igrot.errors import ImageError
from union_igrot.images.decode import image_key, open_image

Box = tuple[int | float, int | float, int | float, int | float]
DILATION = 0.7


@final
@dataclass(frozen=True, slots=True)
class Crop:
    """An object cropped from a photo with a margin and padded to a square with black.

    The box grows by `dilation` times its size, to the left and the top as far as the photo reaches, by the rest to
    the right and the bottom (facebookresearch/genecis, `datasets/vaw_dataset.py`).

    Attributes:
        path: The photo's file.
        box: Left, top, width and height in pixels.
        dilation: How much is added, as a fraction of the box's size.
    """

    path: Path
    box: Box
    dilation: float = DILATION

    @property
    def key(self) -> str:
        """Cache key, made of the file's current key, the box and the dilation.

        Does not raise if the file is missing, since a check for `LazyImage` reads it, too; `open` raises.
        """
        try:
            file = image_key(self.path)
        except ImageError:
            file = f"{self.path.absolute()}|missing"
        return f"crop|{file}|{','.join(map(str, self.box))}|{self.dilation}"

    def open(self) -> Image.Image:
        """Crop the object.

        Raises:
            ImageError: If the photo cannot be decoded or the box lies outside of it.
        """
        photo = open_image(self.path)
        x, y, width, height = self.box
        left, top = max(0, x - self.dilation * width), max(0, y - self.dilation * height)
        right = min(photo.width, left + (1 + self.dilation) * width)
        bottom = min(photo.height, top + (1 + self.dilation) * height)
        corners = tuple(map(round, (left, top, right, bottom)))  # halves to even, as in Pillow's crop
        if corners[0] >= corners[2] or corners[1] >= corners[3]:
            raise ImageError(f"{self.path}: the box {self.box} lies outside of {photo.width} x {photo.height} pixels")
        cut = photo.crop((corners[0], corners[1], corners[2], corners[3]))
        side = max(cut.size)
        square = Image.new("RGB", (side, side))
        square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
        return square
