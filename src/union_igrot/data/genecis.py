"""GeneCIS: four tasks of one word each, every query with ten to fifteen candidates of its own.

Source: facebookresearch/genecis. Attribute tasks ask with, and for, an object cut out of a Visual Genome photo;
object tasks use whole COCO photos. Does not know how scores are computed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import final

from PIL import Image

from union_igrot.data.annotations import Box, Record, choose, read_records
from union_igrot.data.pictures import open_picture, picture_key
from union_igrot.data.places import Files
from union_igrot.data.prompts import default_prompt, template
from union_igrot.errors import ConfigError, PictureError
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query, Source

TASKS = ("focus_attribute", "change_attribute", "focus_object", "change_object")
SPLITS = ("val",)
_COCO = ("val2017", "coco/val2017", "coco2017/val2017", "images/val2017")
_GENOME = ("VG_100K", "VG_100K_2", "VG_100K_all", "images/VG_100K", "images/VG_100K_2")
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

        Of a missing file it says so instead of raising, since asking whether this is a `Picture` reads it, too;
        `open` raises.
        """
        try:
            file = picture_key(self.path)
        except PictureError:
            file = f"{self.path.absolute()}|missing"
        return f"crop|{file}|{','.join(map(str, self.box))}|{self.dilation}"

    def open(self) -> Image.Image:
        """Cut the object out.

        Raises:
            PictureError: Where the photo cannot be read, or the box lies outside of it.
        """
        photo = open_picture(self.path)
        x, y, width, height = self.box
        left, top = max(0, x - self.dilation * width), max(0, y - self.dilation * height)
        right = min(photo.width, left + (1 + self.dilation) * width)
        bottom = min(photo.height, top + (1 + self.dilation) * height)
        corners = tuple(map(round, (left, top, right, bottom)))  # halves go to the even number, as in Pillow's crop
        if corners[0] >= corners[2] or corners[1] >= corners[3]:
            raise PictureError(f"{self.path}: the box {self.box} lies outside of {photo.width} x {photo.height} pixels")
        cut = photo.crop((corners[0], corners[1], corners[2], corners[3]))
        side = max(cut.size)
        square = Image.new("RGB", (side, side))
        square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
        return square


def genecis(
    files: Files, split: str = "val", *, task: str | None = None, prompt: str | None = None, preset: str = "official"
) -> Benchmark:
    """Read one task of GeneCIS.

    Args:
        files: The data set's folder, with `genecis/<task>.json`, and `val2017/` (object tasks) or `VG_100K/`
            (attribute tasks).
        split: `val`, the only one.
        task: `focus_attribute`, `change_attribute`, `focus_object` or `change_object`. The published headline is the
            mean R@1 over the four.
        prompt: See `prompts`.
        preset: `official`, the only one: the UNION authors have no reader of GeneCIS.

    Returns:
        The benchmark. The gallery holds each candidate of any query once; a query's `subset` names its own candidates,
        the target first, in the order of the file. One official row names its target twice; so does its subset.
    """
    if preset != "official":
        raise ConfigError(f"preset is {preset!r}, but the UNION authors have no reader of GeneCIS; take official")
    if task is None:
        raise ConfigError(f"task is not given; choose one of {', '.join(TASKS)}, and average over them")
    choose("task", task, TASKS)
    prompt = default_prompt("genecis") if prompt is None else prompt
    word = template("genecis", prompt)
    gallery: dict[str, GalleryItem] = {}
    queries = []
    for at, record in enumerate(read_records(files.annotation(f"genecis/{task}.json", f"{task}.json"))):
        _, image = _item(record.record("reference"), files, task)
        candidates = [_item(item, files, task) for item in (record.record("target"), *record.records("gallery"))]
        for name, picture in candidates:
            gallery.setdefault(name, GalleryItem(name, picture))
        names = tuple(name for name, _ in candidates)
        text = word({"condition": record.name("condition")})
        queries.append(Query(f"{task}-{at}", image, text, names[:1], subset=names))
    protocol = Protocol(
        name=preset,
        metrics=("R@1", "R@2", "R@3"),
        primary="R@1",
        ties="pessimistic",
        candidates="subset",
        prompt=prompt,
        note=f"GeneCIS {task}; each query ranks its own candidates; the headline is the mean R@1 over the four tasks",
    )
    return Benchmark(f"genecis_{task}", split, "cir", queries, list(gallery.values()), protocol)


def _item(record: Record, files: Files, task: str) -> tuple[str, Source]:
    if task.endswith("object"):
        number = record.number("val_image_id")
        return str(number), files.picture(record.where, *(f"{folder}/{number:012d}.jpg" for folder in _COCO))
    number, box = record.number("image_id"), record.box("instance_bbox")
    path = files.picture(record.where, *(f"{folder}/{number}.jpg" for folder in _GENOME))
    return f"{number}:{','.join(map(str, box))}", Crop(path, box)
