"""LaSCo and LlavaSCo: large sets of COCO triplets with written or generated modification texts.

Sources: levymsn/LaSCo; LlavaSCo is the UNION authors' (paper arXiv 2511.22253). A validation query never contains a
caption of its target, unless the authors' own protocol is selected by name.
"""

from pathlib import Path

from union_igrot.datasets.annotations import DatasetFolder, Record, check_name, check_path, check_record, read_records
from union_igrot.datasets.builtin import LASCO, LEAKING_PROMPT, LLAVASCO
from union_igrot.errors import ConfigError, DataError
from union_igrot.storage.text import read_json, refuse_repeated
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query

_KS = (1, 5, 10, 50, 100, 500, 1000)


def read_lasco(folder: DatasetFolder, split: str, *, prompt: str | None, preset: str) -> Benchmark:
    """Read one split of LaSCo.

    Args:
        folder: The dataset's folder, with `lasco_<split>.json`, `lasco_val_corpus.json` and the COCO 2014 images.
        split: `val`, whose gallery is the corpus file; or `train`, whose gallery is the images that its rows name.
        prompt: Name or template.
        preset: `official` or `union_reference`; they are the same here.

    Returns:
        The benchmark. Query ids are the qids.
    """
    wording = LASCO.find_prompt(prompt)
    records = read_records(folder.annotation(f"lasco_{split}.json"))
    gallery = _corpus(folder) if split == "val" else {}
    seen: set[str] = set()
    queries = []
    for row, record in enumerate(records):
        qid = record.name("qid")
        name = f"{qid}-{row}" if qid in seen else qid  # not documented to be unique
        seen.add(name)
        reference, target = record.id_and_path("query-image"), record.id_and_path("target-image")
        if split == "train":
            for number, path in (reference, target):
                _add(gallery, number, folder, record.place, path)
        elif str(target[0]) not in gallery:
            raise DataError(f"{record.place}: target {target[0]} is not in the corpus; download both files again")
        image = _coco_image(folder, record.place, reference[1])
        text = wording.text({"query_text": record.text("query-text")})
        queries.append(Query(name, image, text, (str(target[0]),)))
    note = f"LaSCo {split}, gallery={'corpus' if split == 'val' else 'the pictures its rows name'}; reference kept"
    return Benchmark(
        "lasco", split, "cir", queries, list(gallery.values()), _lasco_protocol(preset, wording.name, note)
    )


def read_llavasco(
    folder: DatasetFolder,
    split: str,
    *,
    stride: int | None,
    limit: int | None,
    gallery: str,
    prompt: str | None,
    preset: str,
) -> Benchmark:
    """Read one split of LlavaSCo: a JSON list, or one object after another.

    Args:
        folder: The dataset's folder, with `<split>_llavasco.json` and `<split>2014/`.
        split: `val` or `train`.
        stride: Use every n-th row. 1 by default; 70 under `union_reference`.
        limit: Use only the first rows, before the stride. All by default; 350,000 under `union_reference`.
        gallery: `named`, the images that the used rows name; or, for `val`, `corpus`, that of LaSCo.
        prompt: Name or template. `union_llava` adds the target's caption: for training, or under `union_reference`.
        preset: `official`, or `union_reference`, which validates with the target's caption in the text, as its authors
            do. Such a metric does not measure retrieval; the note says so.

    Returns:
        The benchmark. Query ids are the row's numbers in the file, before the stride.
    """
    reference = preset == "union_reference"
    wording = LLAVASCO.find_prompt(_prompt(prompt, reference, split))
    if reference:  # the authors' loader takes [:350000:70]
        stride, limit = stride or 70, limit or 350_000
    stride = stride or 1
    if gallery == "corpus" and split != "val":
        raise ConfigError("gallery=corpus has validation images; use gallery=named for split=train")
    items = _corpus(folder) if gallery == "corpus" else {}
    records = read_records(folder.annotation(f"{split}_llavasco.json"), concatenated=True)
    for record in records:  # all rows, whatever the stride, so that a broken file is found at once
        _check_row(record)
    queries = []
    for row in range(len(records))[:limit:stride]:
        record = records[row]
        image, target = record.integer("reference_image_id"), record.integer("target_image_id")
        if gallery == "named":
            for number in (image, target):
                _add(items, number, folder, record.place, _coco(split, number))
        elif str(target) not in items:
            raise DataError(f"{record.place}: target {target} is not in the corpus; use gallery=named")
        text = wording.text({key: record.text(key) for key in ("relative_caption", "llava_target_caption")})
        queries.append(Query(str(row), _coco_image(folder, record.place, _coco(split, image)), text, (str(target),)))
    note = f"LlavaSCo {split}, gallery={gallery}, stride={stride}, limit={limit}; reference kept"
    if wording.name == LEAKING_PROMPT:
        note += "; LEAK: the text holds the target's own caption, as the authors' loader adds it"
    return Benchmark(
        "llavasco", split, "cir", queries, list(items.values()), _lasco_protocol(preset, wording.name, note)
    )


def _prompt(prompt: str | None, reference: bool, split: str) -> str | None:
    """Keep the target's caption out of validation, but for the authors' own protocol."""
    if prompt is None and reference and split == "val":
        return LEAKING_PROMPT
    if prompt == LEAKING_PROMPT and split == "val" and not reference:
        raise ConfigError(f"prompt {prompt!r} contains the target's caption; use another, or use it for training only")
    return prompt


def _check_row(record: Record) -> None:
    for key in ("relative_caption", "llava_reference_caption", "llava_target_caption"):
        record.text(key)
    for key in ("reference_image_id", "target_image_id"):
        record.integer(key)


def _lasco_protocol(preset: str, prompt: str, note: str) -> Protocol:
    metrics = tuple(f"R@{k}" for k in _KS)
    return Protocol(preset, metrics, "R@10", ties="gallery order", prompt=prompt, note=note)


def _corpus(folder: DatasetFolder) -> dict[str, GalleryItem]:
    """Read the corpus: a list of objects with id and path, or one object of paths by id."""
    file = folder.annotation("lasco_val_corpus.json")
    value = read_json(file)
    rows: list[tuple[str, object, object]] = []
    if isinstance(value, dict):
        rows = [(f"{file}, {key!r}", key, path) for key, path in value.items()]
    elif isinstance(value, list):
        records = [check_record(entry, f"{file}, row {row}") for row, entry in enumerate(value)]
        rows = [(record.place, record.get("id"), record.get("path")) for record in records]
    if not rows:
        raise DataError(f"{file}: contains no image; expected a list of objects with id and path")
    gallery: dict[str, GalleryItem] = {}
    seen: dict[str, str] = {}
    for place, number, path in rows:
        name = check_name(number, "id", place)
        refuse_repeated(name, place, seen)
        gallery[name] = GalleryItem(name, _coco_image(folder, place, check_path(path, "path", place)))
    return gallery


def _add(gallery: dict[str, GalleryItem], number: int, folder: DatasetFolder, place: str, path: str) -> None:
    if str(number) not in gallery:
        gallery[str(number)] = GalleryItem(str(number), _coco_image(folder, place, path))


def _coco(split: str, number: int) -> str:
    return f"{split}2014/COCO_{split}2014_{number:012d}.jpg"


def _coco_image(folder: DatasetFolder, place: str, path: str) -> Path:
    """Find a COCO image; the corpus file has an extra `val/` before the folder that the rows lack."""
    plain = path.removeprefix("val/").removeprefix("train/")
    return folder.image(place, plain, f"{plain.partition('2014/')[0]}/{plain}", f"coco/{plain}")
