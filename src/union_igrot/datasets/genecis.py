"""GeneCIS: four tasks with a condition of a few words, each query with ten to fifteen candidates of its own.

Source: facebookresearch/genecis. The images of attribute tasks are objects cut out of Visual Genome photos; those of
object tasks are whole COCO photos.
"""

from union_igrot.datasets.annotations import DatasetFolder, Record, read_records
from union_igrot.datasets.builtin import GENECIS
from union_igrot.images.crop import Crop
from union_igrot.types import Benchmark, GalleryItem, ImageSource, Protocol, Query

_COCO = ("val2017", "coco/val2017", "coco2017/val2017", "images/val2017")
_GENOME = ("VG_100K", "VG_100K_2", "VG_100K_all", "images/VG_100K", "images/VG_100K_2")


def read_genecis(folder: DatasetFolder, split: str, *, task: str, prompt: str | None, preset: str) -> Benchmark:
    """Read one task of GeneCIS.

    Args:
        folder: The dataset's folder, with `genecis/<task>.json`, and `val2017/` (object tasks) or `VG_100K/`
            (attribute tasks).
        split: `val`, the only one.
        task: `focus_attribute`, `change_attribute`, `focus_object` or `change_object`. The published result is the
            mean R@1 over the four.
        prompt: Name or template.
        preset: `official`, the only one: the UNION authors have no reader of GeneCIS.

    Returns:
        The benchmark. The gallery has each candidate of any query once; a query's `subset` names its own candidates,
        the target first, in the order of the file. One official row names its target twice; so does its subset.
    """
    wording = GENECIS.find_prompt(prompt)
    gallery: dict[str, GalleryItem] = {}
    queries = []
    for row, record in enumerate(read_records(folder.annotation(f"genecis/{task}.json", f"{task}.json"))):
        _, image = _image(record.record("reference"), folder, task)
        candidates = [_image(item, folder, task) for item in (record.record("target"), *record.records("gallery"))]
        for name, candidate in candidates:
            gallery.setdefault(name, GalleryItem(name, candidate))
        names = tuple(name for name, _ in candidates)
        text = wording.text({"condition": record.name("condition")})
        queries.append(Query(f"{task}-{row}", image, text, names[:1], subset=names))
    protocol = Protocol(
        name=preset,
        metrics=("R@1", "R@2", "R@3"),
        primary="R@1",
        ties="pessimistic",
        candidates="subset",
        prompt=wording.name,
        note=f"GeneCIS {task}; each query ranks its own candidates; the headline is the mean R@1 over the four tasks",
    )
    return Benchmark(f"genecis_{task}", split, "cir", queries, list(gallery.values()), protocol)


def _image(record: Record, folder: DatasetFolder, task: str) -> tuple[str, ImageSource]:
    if task.endswith("object"):
        number = record.integer("val_image_id")
        return str(number), folder.image(record.place, *(f"{name}/{number:012d}.jpg" for name in _COCO))
    number, box = record.integer("image_id"), record.box("instance_bbox")
    path = folder.image(record.place, *(f"{name}/{number}.jpg" for name in _GENOME))
    return f"{number}:{','.join(map(str, box))}", Crop(path, box)
