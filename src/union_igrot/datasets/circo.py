"""CIRCO: COCO photos with a sentence and several answers each, in a gallery of 123,403.

Source: miccunifi/CIRCO. The first target of a query is its single `target_img_id`, which alone the official recall
counts. Does not know how submission files look.
"""

from union_igrot.datasets.annotations import Record, as_path, as_record, once, read_json, read_records
from union_igrot.datasets.files import Files
from union_igrot.datasets.prompts import Template, default_prompt, template
from union_igrot.errors import DataError
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query

SPLITS = ("val", "test")
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


def circo(files: Files, split: str = "val", *, prompt: str | None = None, preset: str = "official") -> Benchmark:
    """Read one split of CIRCO.

    Args:
        files: The dataset's folder, with `annotations/` and `COCO2017_unlabeled/`.
        split: `val`, or `test` (whose targets are not published).
        prompt: See `prompts`. The default uses `shared_concept`, which zero-shot baselines do not see.
        preset: `official` keeps the reference in the ranking; `union_reference` takes it out, as its authors do.

    Returns:
        The benchmark. Query ids are `0`, `1`, ...; tags are the semantic aspects.
    """
    prompt = default_prompt("circo") if prompt is None else prompt
    word = template("circo", prompt)
    records = read_records(files.annotation(f"annotations/{split}.json"))
    paths = _gallery(files)
    gallery = [GalleryItem(name, files.image(where, path)) for name, (where, path) in paths.items()]
    exclude = preset == "union_reference"
    queries = [_query(record, at, split, files, paths, word, exclude) for at, record in enumerate(records)]
    ks = (5, 10, 25, 50)
    tells = len({word({"shared_concept": concept, "relative_caption": ""}) for concept in ("a", "b")}) > 1
    hint = "; the texts use shared_concept, which zero-shot baselines do not see"
    protocol = Protocol(
        name=preset,
        metrics=(*(f"mAP@{k}" for k in ks), *(f"R@{k}" for k in ks)),
        primary="mAP@10",
        exclude_reference=exclude,
        recall_targets="first",
        prompt=prompt,
        note=f"CIRCO {split}; recall counts the single target alone" + (hint if tells else ""),
    )
    return Benchmark("circo", split, "cir", queries, gallery, protocol)


def _gallery(files: Files) -> dict[str, tuple[str, str]]:
    file = files.annotation(f"{_IMAGES}/annotations/image_info_unlabeled2017.json")
    images = as_record(read_json(file), str(file)).records("images")
    paths: dict[str, tuple[str, str]] = {}
    seen: dict[str, str] = {}
    for image in images:
        name = str(image.number("id"))
        once(name, image.where, seen)
        path = as_path(image.get("file_name"), "file_name", image.where)
        paths[name] = (image.where, f"{_IMAGES}/unlabeled2017/{path}")
    return paths


def _query(
    record: Record,
    at: int,
    split: str,
    files: Files,
    paths: dict[str, tuple[str, str]],
    word: Template,
    exclude: bool,
) -> Query:
    if record.number("id") != at:
        raise DataError(
            f"{record.where}: id is {record.number('id')}, but it is row {at}; rows must be whole, in order"
        )
    reference = str(record.number("reference_img_id"))
    targets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    if split == "val":
        single = str(record.number("target_img_id"))
        truths = tuple(str(number) for number in record.numbers("gt_img_ids"))
        if single not in truths or reference in truths:
            raise DataError(f"{record.where}: gt_img_ids lacks target_img_id or holds the reference; fetch it again")
        targets = (single, *(name for name in truths if name != single))
        tags = _aspects(record)
    for name in (reference, *targets):
        if name not in paths:
            raise DataError(f"{record.where}: image {name} is not in image_info_unlabeled2017.json; fetch both again")
    fields = {key: record.text(key) for key in ("shared_concept", "relative_caption")}
    image = files.image(*paths[reference])
    return Query(str(at), image, word(fields), targets, (reference,) if exclude else (), tags=tags)


def _aspects(record: Record) -> tuple[str, ...]:
    given = record.get("semantic_aspects")
    if not isinstance(given, list) or any(aspect not in ASPECTS for aspect in given):
        raise DataError(f"{record.where}: semantic_aspects must be a list of {', '.join(ASPECTS)}")
    return tuple(given)
