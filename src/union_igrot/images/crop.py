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
    """An object cut out of a photo, widened, then padded to a square with black.

    The box grows to the left and to the top by `dilation` times its size; where that is cut off by the photo's edge,
    the rest of it goes to the right and to the bottom (facebookresearch/genecis, `datasets/vaw_dataset.py`).

    Attributes:
        path: The photo's file.
        box: Left, top, width and height in pixels.
        dilation: How much is added, as a share of the box's size.
    """

    path: Path
    box: Box
    dilation: float = DILATION

    @property
    def key(self) -> str:
        """Its identity, of the file's own as of now, the box and the dilation.

        Of a missing file it says so instead of raising, since asking whether this is a `LazyImage` reads it, too;
        `open` raises.
        """
        try:
            file = image_key(self.path)
        except ImageError:
            file = f"{self.path.absolute()}|missing"
        return f"crop|{file}|{','.join(map(str, self.box))}|{self.dilation}"

    def open(self) -> Image.Image:
        """Cut the object out.

        Raises:
            ImageError: Where the photo cannot be read, or the box lies outside of it.
        """
        photo = open_image(self.path)
        x, y, width, height = self.box
        left, top = max(0, x - self.dilation * width), max(0, y - self.dilation * height)
        right = min(photo.width, left + (1 + self.dilation) * width)
        bottom = min(photo.height, top + (1 + self.dilation) * height)
        corners = tuple(map(round, (left, top, right, bottom)))  # halves go to the even number, as in Pillow's crop
        if corners[0] >= corners[2] or corners[1] >= corners[3]:
            raise ImageError(f"{self.path}: the box {self.box} lies outside of {photo.width} x {photo.height} pixels")
        cut = photo.crop((corners[0], corners[1], corners[2], corners[3]))
        side = max(cut.size)
        square = Image.new("RGB", (side, side))
        square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
        return square
