"""LaSCo and LlavaSCo: large sets of COCO triplets with written or generated differences.

Sources: levymsn/LaSCo; LlavaSCo is the UNION authors' (paper arXiv 2511.22253). A validation query never holds a
caption of its target, unless the authors' own protocol is asked for by name. Does not know how images are encoded.
"""

from pathlib import Path

from union_igrot.datasets.annotations import Record, as_name, as_path, as_record, choose, once, read_json, read_records
from union_igrot.datasets.files import Files
from union_igrot.datasets.prompts import default_prompt, template
from union_igrot.errors import ConfigError, DataError
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query

SPLITS = ("val", "train")
LEAKING_PROMPT = "union_llava"
_KS = (1, 5, 10, 50, 100, 500, 1000)


def lasco(files: Files, split: str = "val", *, prompt: str | None = None, preset: str = "official") -> Benchmark:
    """Read one split of LaSCo.

    Args:
        files: The dataset's folder, with `lasco_<split>.json`, `lasco_val_corpus.json` and the COCO 2014 images.
        split: `val`, whose gallery is the corpus file; or `train`, whose gallery is the images that its rows name.
        prompt: See `prompts`.
        preset: `official` or `union_reference`; they are the same here.

    Returns:
        The benchmark. Query ids are the qids.
    """
    prompt = default_prompt("lasco") if prompt is None else prompt
    word = template("lasco", prompt)
    records = read_records(files.annotation(f"lasco_{split}.json"))
    gallery = _corpus(files) if split == "val" else {}
    seen: set[str] = set()
    queries = []
    for at, record in enumerate(records):
        qid = record.name("qid")
        name = f"{qid}-{at}" if qid in seen else qid  # not said to be unique
        seen.add(name)
        reference, target = record.pair("query-image"), record.pair("target-image")
        if split == "train":
            for number, path in (reference, target):
                _add(gallery, number, files, record.where, path)
        elif str(target[0]) not in gallery:
            raise DataError(f"{record.where}: target {target[0]} is not in the corpus; fetch both files again")
        image = _picture(files, record.where, reference[1])
        text = word({"query_text": record.text("query-text")})
        queries.append(Query(name, image, text, (str(target[0]),)))
    note = f"LaSCo {split}, gallery={'corpus' if split == 'val' else 'the pictures its rows name'}; reference kept"
    return Benchmark("lasco", split, "cir", queries, list(gallery.values()), _protocol(preset, prompt, note))


def llavasco(
    files: Files,
    split: str = "val",
    *,
    stride: int | None = None,
    limit: int | None = None,
    gallery: str = "named",
    prompt: str | None = None,
    preset: str = "official",
) -> Benchmark:
    """Read one split of LlavaSCo: a JSON list, or one object after another.

    Args:
        files: The dataset's folder, with `<split>_llavasco.json` and `<split>2014/`.
        split: `val` or `train`.
        stride: Take every n-th row. 1 by default; 70 under `union_reference`.
        limit: Look at the first rows alone, before the stride. All by default; 350,000 under `union_reference`.
        gallery: `named`, the images that the taken rows name; or, for `val`, `corpus`, that of LaSCo.
        prompt: See `prompts`. `union_llava` adds the target's caption: for training, or under `union_reference`.
        preset: `official`, or `union_reference`, which validates with the target's caption in the text, as its authors
            do. Such a metric is no measure of retrieval; the note says so.

    Returns:
        The benchmark. Query ids are the row's numbers in the file, before the stride.
    """
    reference = preset == "union_reference"
    prompt = _prompt(prompt, reference, split)
    stride, limit = _slice(stride, limit, reference)
    if choose("gallery", gallery, ("named", "corpus")) == "corpus" and split != "val":
        raise ConfigError("gallery=corpus holds validation images; take gallery=named for split=train")
    word = template("llavasco", prompt)
    items = _corpus(files) if gallery == "corpus" else {}
    records = read_records(files.annotation(f"{split}_llavasco.json"), several=True)
    queries = []
    for record in records:
        _check_row(record)
    for at in range(len(records))[:limit:stride]:
        record = records[at]
        asked, answer = record.number("reference_image_id"), record.number("target_image_id")
        if gallery == "named":
            for number in (asked, answer):
                _add(items, number, files, record.where, _coco(split, number))
        elif str(answer) not in items:
            raise DataError(f"{record.where}: target {answer} is not in the corpus; take gallery=named")
        text = word({key: record.text(key) for key in ("relative_caption", "llava_target_caption")})
        queries.append(Query(str(at), _picture(files, record.where, _coco(split, asked)), text, (str(answer),)))
    note = f"LlavaSCo {split}, gallery={gallery}, stride={stride}, limit={limit}; reference kept"
    if prompt == LEAKING_PROMPT:
        note += "; LEAK: the text holds the target's own caption, as the authors' loader adds it"
    return Benchmark("llavasco", split, "cir", queries, list(items.values()), _protocol(preset, prompt, note))


def _prompt(prompt: str | None, reference: bool, split: str) -> str:
    """Keep the target's caption out of validation, but for the authors' own protocol."""
    if prompt is None:
        return LEAKING_PROMPT if reference and split == "val" else default_prompt("llavasco")
    if prompt == LEAKING_PROMPT and split == "val" and not reference:
        raise ConfigError(f"prompt {prompt!r} gives the target's caption away; choose another, or train with it")
    return prompt


def _slice(stride: int | None, limit: int | None, reference: bool) -> tuple[int, int | None]:
    """Fill in what is not given; the authors' loader takes `[:350000:70]`."""
    if reference:
        stride, limit = 70 if stride is None else stride, 350_000 if limit is None else limit
    stride = 1 if stride is None else stride
    if stride < 1 or (limit is not None and limit < 1):
        raise ConfigError(f"stride is {stride} and limit is {limit}; give numbers >= 1")
    return stride, limit


def _check_row(record: Record) -> None:
    """Check every row, whatever the stride, so that a broken file is found at once."""
    for key in ("relative_caption", "llava_reference_caption", "llava_target_caption"):
        record.text(key)
    for key in ("reference_image_id", "target_image_id"):
        record.number(key)


def _protocol(preset: str, prompt: str, note: str) -> Protocol:
    return Protocol(preset, tuple(f"R@{k}" for k in _KS), "R@10", prompt=prompt, note=note)


def _corpus(files: Files) -> dict[str, GalleryItem]:
    """Read the corpus: a list of objects with id and path, or one object of paths by id."""
    file = files.annotation("lasco_val_corpus.json")
    value = read_json(file)
    pairs: list[tuple[str, object, object]] = []
    if isinstance(value, dict):
        pairs = [(f"{file}, {key!r}", key, path) for key, path in value.items()]
    elif isinstance(value, list):
        records = [as_record(entry, f"{file}, row {row}") for row, entry in enumerate(value)]
        pairs = [(record.where, record.get("id"), record.get("path")) for record in records]
    if not pairs:
        raise DataError(f"{file}: holds no image; it must be a list of objects with id and path")
    gallery: dict[str, GalleryItem] = {}
    seen: dict[str, str] = {}
    for where, number, path in pairs:
        name = as_name(number, "id", where)
        once(name, where, seen)
        gallery[name] = GalleryItem(name, _picture(files, where, as_path(path, "path", where)))
    return gallery


def _add(gallery: dict[str, GalleryItem], number: int, files: Files, where: str, path: str) -> None:
    if str(number) not in gallery:
        gallery[str(number)] = GalleryItem(str(number), _picture(files, where, path))


def _coco(split: str, number: int) -> str:
    return f"{split}2014/COCO_{split}2014_{number:012d}.jpg"


def _picture(files: Files, where: str, path: str) -> Path:
    """Find a COCO image; the corpus file has an extra `val/` before the folder that the rows lack."""
    plain = path.removeprefix("val/").removeprefix("train/")
    return files.image(where, plain, f"{plain.partition('2014/')[0]}/{plain}", f"coco/{plain}")
