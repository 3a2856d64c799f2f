"""GeneCIS: four tasks of one word each, every query with ten to fifteen candidates of its own.

Source: facebookresearch/genecis. Attribute tasks ask with, and for, an object cut out of a Visual Genome photo;
object tasks use whole COCO photos. Does not know how scores are computed.
"""

from union_igrot.datasets.annotations import Record, choose, read_records
from union_igrot.datasets.files import Files
from union_igrot.datasets.prompts import default_prompt, template
from union_igrot.errors import ConfigError
from union_igrot.images.crop import Crop
from union_igrot.types import Benchmark, GalleryItem, ImageSource, Protocol, Query

TASKS = ("focus_attribute", "change_attribute", "focus_object", "change_object")
SPLITS = ("val",)
_COCO = ("val2017", "coco/val2017", "coco2017/val2017", "images/val2017")
_GENOME = ("VG_100K", "VG_100K_2", "VG_100K_all", "images/VG_100K", "images/VG_100K_2")


def genecis(
    files: Files, split: str = "val", *, task: str | None = None, prompt: str | None = None, preset: str = "official"
) -> Benchmark:
    """Read one task of GeneCIS.

    Args:
        files: The dataset's folder, with `genecis/<task>.json`, and `val2017/` (object tasks) or `VG_100K/`
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


def _item(record: Record, files: Files, task: str) -> tuple[str, ImageSource]:
    if task.endswith("object"):
        number = record.number("val_image_id")
        return str(number), files.image(record.where, *(f"{folder}/{number:012d}.jpg" for folder in _COCO))
    number, box = record.number("image_id"), record.box("instance_bbox")
    path = files.image(record.where, *(f"{folder}/{number}.jpg" for folder in _GENOME))
    return f"{number}:{','.join(map(str, box))}", Crop(path, box)
