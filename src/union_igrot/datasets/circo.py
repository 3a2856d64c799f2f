"""CIRCO: COCO photos with a modification text and several targets each, in a gallery of 123,403.

Source: miccunifi/CIRCO. The first target of a query is its single `target_img_id`, the only one that the official
recall counts.
"""

from union_igrot.datasets.annotations import DatasetFolder, Record, check_path, check_record, read_records
from union_igrot.datasets.builtin import CIRCO
from union_igrot.datasets.registry import Template
from union_igrot.errors import DataError
from union_igrot.storage.text import read_json, refuse_repeated
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query

ASPECTS = (
    "cardinality",
    "addition",
    "negation",
    "direct_addressing",
    "compare_change",
    "comparative_statement",
    "statement_with_conjunction",
    "spatial_relations_background",
    "viewpoint",
)
_IMAGES = "COCO2017_unlabeled"


def read_circo(folder: DatasetFolder, split: str, *, prompt: str | None, preset: str) -> Benchmark:
    """Read one split of CIRCO.

    Args:
        folder: The dataset's folder, with `annotations/` and `COCO2017_unlabeled/`.
        split: `val`, or `test` (whose targets are not published).
        prompt: Name or template. The default uses `shared_concept`, which zero-shot baselines do not see.
        preset: `official` keeps the reference in the ranking; `union_reference` excludes it, as its authors do.

    Returns:
        The benchmark. Query ids are `0`, `1`, ...; tags are the semantic aspects.
    """
    wording = CIRCO.find_prompt(prompt)
    records = read_records(folder.annotation(f"annotations/{split}.json"))
    paths = _image_paths(folder)
    gallery = [GalleryItem(name, folder.image(place, path)) for name, (place, path) in paths.items()]
    exclude = preset == "union_reference"
    queries = []
    for row, record in enumerate(records):
        if record.integer("id") != row:
            raise DataError(f"{record.place}: id is {record.integer('id')} (expected {row}); rows are missing")
        queries.append(_query(record, split, folder, paths, wording.text, exclude))
    ks = (5, 10, 25, 50)
    fields = [{"shared_concept": concept, "relative_caption": ""} for concept in ("a", "b")]
    uses_concept = wording.text(fields[0]) != wording.text(fields[1])
    hint = "; the texts use shared_concept, which zero-shot baselines do not see"
    protocol = Protocol(
        name=preset,
        metrics=(*(f"mAP@{k}" for k in ks), *(f"R@{k}" for k in ks)),
        primary="mAP@10",
        exclude_reference=exclude,
        recall_targets="first",
        prompt=wording.name,
        note=f"CIRCO {split}; recall counts the single target alone" + (hint if uses_concept else ""),
    )
    return Benchmark("circo", split, "cir", queries, gallery, protocol)


def _image_paths(folder: DatasetFolder) -> dict[str, tuple[str, str]]:
    """Return the place and the path of each image by its id."""
    file = folder.annotation(f"{_IMAGES}/annotations/image_info_unlabeled2017.json")
    paths: dict[str, tuple[str, str]] = {}
    seen: dict[str, str] = {}
    for image in check_record(read_json(file), str(file)).records("images"):
        name = str(image.integer("id"))
        refuse_repeated(name, image.place, seen)
        path = check_path(image.get("file_name"), "file_name", image.place)
        paths[name] = (image.place, f"{_IMAGES}/unlabeled2017/{path}")
    return paths


def _query(
    record: Record, split: str, folder: DatasetFolder, paths: dict[str, tuple[str, str]], text: Template, exclude: bool
) -> Query:
    reference = str(record.integer("reference_img_id"))
    targets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    if split == "val":
        single = str(record.integer("target_img_id"))
        targets = tuple(str(number) for number in record.integers("gt_img_ids"))
        if single not in targets or reference in targets:
            raise DataError(f"{record.place}: gt_img_ids lacks target_img_id or has the reference; download it again")
        targets = (single, *(name for name in targets if name != single))
        tags = _aspects(record)
    for name in (reference, *targets):
        if name not in paths:
            raise DataError(f"{record.place}: image {name} is not in image_info_unlabeled2017.json; download both")
    fields = {key: record.text(key) for key in ("shared_concept", "relative_caption")}
    image = folder.image(*paths[reference])
    excluded = (reference,) if exclude else ()
    return Query(str(record.integer("id")), image, text(fields), targets, excluded, tags=tags)


def _aspects(record: Record) -> tuple[str, ...]:
    aspects = record.get("semantic_aspects")
    if not isinstance(aspects, list) or any(aspect not in ASPECTS for aspect in aspects):
        raise DataError(f"{record.place}: semantic_aspects must be a list of {', '.join(ASPECTS)}")
    return tuple(aspects)
