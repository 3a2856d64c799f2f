"""Galleries of colored squares for the demo's tests: every result can be computed by hand."""

from types import SimpleNamespace
from typing import final

from PIL import Image

from union_igrot.demo.backends import DisplayedImage, GalleryBackend
from union_igrot.demo.session import encode_thumbnail
from union_igrot.errors import DataError


@final
class Squares(GalleryBackend):
    """Returns images in order, rotated by the length of the text; records its requests."""

    def __init__(self, name: str = "forward", count: int = 60, step: int = 1) -> None:
        self.name, self.gallery, self.model, self.hint = name, "squares", "squares model", "Say <anything>."
        self.count, self.step = count, step
        self.searched: list[tuple[tuple[int, int, int] | None, str | None, str | None]] = []
        self.requests: list[SimpleNamespace] = []

    def __len__(self) -> int:
        return self.count

    @property
    def columns(self) -> list[str]:
        return ["class", "taken <by>"]

    def search(self, skip: int, count: int, image=None, text=None, where=None, **query) -> list[DisplayedImage]:
        request = SimpleNamespace(image=image, text=text, where=where, **query)
        self.requests.append(request)
        exclude = request.exclude[0] if request.exclude else None
        middle = None if image is None else image.convert("RGB").getpixel((image.width // 2, image.height // 2))
        self.searched.append((middle, text, exclude))
        if text == "break":
            raise RuntimeError("a defect inside")
        order = [f"s{(len(text or '') + self.step * place) % self.count}" for place in range(self.count)]
        if request.where == "nothing":
            return []
        gone = {*request.exclude, *request.disliked}
        found = [name for name in order if name not in gone][skip : skip + count]
        return [self._square(name, 1 - (skip + place) / 100) for place, name in enumerate(found)]

    def sample(self, count: int, seed: int) -> list[DisplayedImage]:
        return [self._square(f"s{(seed + place) % self.count}") for place in range(min(count, self.count))]

    def item(self, name: str) -> DisplayedImage:
        return self._square(name)

    def image(self, name: str) -> Image.Image:
        return Image.new("RGB", (640, 480), self._color(name))

    def _color(self, name: str) -> tuple[int, int, int]:
        if not name[1:].isdecimal() or (number := int(name[1:])) >= self.count:
            raise DataError("not here")
        return (4 * number, 100, 200)

    def _square(self, name: str, score: float | None = None) -> DisplayedImage:
        small = encode_thumbnail(Image.new("RGB", (40, 30), self._color(name)))
        return DisplayedImage(name, f"square <{name}>", small, score, f"/images/{name}.png", {"class": f"c&{name}"})
