"""Retrieval of single images and instances with a sketch, a text or both: i-CIR, FS-COCO, CSTBIR, ShoeV2 and ChairV2.

- i-CIR (billpsomas/icir): each query ranks the images of its own instance alone, among them hard negatives.
- FS-COCO (pinakinathc/fscoco): a freehand sketch of a COCO photo, a text, or both ask for the photo.
- CSTBIR (vl2g/CSTBIR): a QuickDraw sketch of an object that the text describes asks for a Visual Genome photo.
- ShoeV2 and ChairV2 (QMUL): a sketch asks for the photo that it was drawn of.
"""

import gc
import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, final

import numpy as np
from PIL import Image

from union_igrot.datasets.annotations import (
    GENOME,
    DatasetFolder,
    check_integer,
    check_name,
    check_path,
    check_record,
    check_text,
    read_columns,
)
from union_igrot.datasets.builtin import CHAIRV2, CSTBIR, FSCOCO, ICIR, SHOEV2
from union_igrot.datasets.registry import BenchmarkDeclaration, Text
from union_igrot.errors import ConfigError, DataError, ImageError
from union_igrot.images.decode import as_image
from union_igrot.storage.text import read_csv, read_json_items, read_lines, read_text, refuse_repeated
from union_igrot.types import Benchmark, GalleryItem, ImageSource, NoImage, Protocol, Query

_SUFFIXES = (".jpg", ".png", ".jpeg")

# --- i-CIR


@final
@dataclass(frozen=True, slots=True)
class TarImage:
    """An image within a tar file."""

    path: Path
    name: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        """Cache key, made of the tar file's path and the member's place."""
        return f"tar|{self.path}|{self.name}|{self.offset}|{self.size}"

    def open(self) -> Image.Image:
        """Decode the image."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        try:
            return as_image(data)
        except ImageError as error:
            raise ImageError(f"{self.path}, {self.name}: {error}") from None


def read_icir(folder: DatasetFolder, split: str, *, prompt: str | None) -> Benchmark:
    """Read i-CIR, extracted (`query_files.csv`, `database_files.csv`) or as WebDataset (`webdataset/`, `annotations/`).

    Query ids are the lines' numbers. A database image is relevant if it has the query's instance and text.
    """
    wording = ICIR.find_prompt(prompt)
    packed = (folder.root / "webdataset").is_dir()
    shards = _index_shards(folder.root / "webdataset") if packed and folder.check_images else {}

    def image(place: str, path: str) -> ImageSource:
        if not shards:
            return folder.listed_image(place, path)
        if path not in shards:
            raise ImageError(f"{place}: {path} is in no tar file of {folder.root / 'webdataset'}; download all of them")
        return shards[path]

    gallery: dict[tuple[str, str, str], GalleryItem] = {}
    own, relevant = defaultdict[str, list[str]](list), defaultdict[tuple[str, str], list[str]](list)
    known: set[str] = set()
    seen: dict[tuple[str, str, str], str] = {}
    for place, row in _icir_rows(folder, "database"):
        refuse_repeated(row, place, seen)
        path, text, instance = row
        name = path if path not in known else f"{path}#{len(gallery)}"  # an image of two instances has two ids
        known.add(name)
        gallery[row] = GalleryItem(name, image(place, path), instance)
        own[instance].append(name)
        relevant[instance, text].append(name)
    targets = {key: tuple(names) for key, names in relevant.items()}
    candidates = {instance: tuple(names) for instance, names in own.items()}
    queries = []
    for number, (place, (path, text, instance)) in enumerate(_icir_rows(folder, "query")):
        if (instance, text) not in targets:
            raise DataError(f"{place}: no database image has instance {instance!r} and this text; download both files")
        wanted, subset = targets[instance, text], candidates[instance]
        words = wording.text({"text_query": text})
        queries.append(Query(str(number), image(place, path), words, wanted, subset=subset, label=instance))
    protocol = Protocol(
        metrics=("mAP", "mmAP", "minmAP"),
        primary="mAP",
        ap_norm="all",
        ap_rule="trapezoid",
        ties="gallery order",
        candidates="subset",
        prompt=wording.name,
        note=f"i-CIR: each query ranks the images of its own of {len(candidates)} instances; mmAP, minmAP: means over "
        "instances of their mean and minimum",
    )
    return Benchmark("icir", split, "cir", queries, list(gallery.values()), protocol)


def _icir_rows(folder: DatasetFolder, side: str) -> Iterator[tuple[str, tuple[str, str, str]]]:
    file = folder.annotation(f"{side}_files.csv", f"annotations/{side}_files.csv")
    for place, (path, text, instance) in read_columns(file, "image_path", "text_query", "instance_id"):
        yield place, (check_path(path, "image_path", place), text, instance)


def _index_shards(folder: Path) -> dict[str, TarImage]:
    """Return the images of all tar files by the path that the sample's JSON names; no image is read."""
    found: dict[str, TarImage] = {}
    for path in sorted(folder.glob("*/*.tar")):
        images: dict[str, TarImage] = {}
        paths: dict[str, str] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in filter(tarfile.TarInfo.isfile, tar):
                    key, _, suffix = member.name.rpartition(".")
                    if suffix != "json":
                        images[key] = TarImage(path, member.name, member.offset_data, member.size)
                    elif (content := tar.extractfile(member)) is not None:
                        place = f"{path}, {member.name}"
                        paths[key] = check_path(
                            check_record(json.load(content), place).get("img_path"), "img_path", place
                        )
        except (tarfile.TarError, OSError, ValueError) as error:
            raise DataError(f"{path}: not a WebDataset tar file ({error}); download it again") from None
        found |= {name: images[key] for key, name in paths.items() if key in images}
    return found


# --- FS-COCO


def read_fscoco(folder: DatasetFolder, split: str, *, query: str, prompt: str | None) -> Benchmark:
    """Read FS-COCO: `text/<user>/<id>.txt`, with sketches in `raster_sketches/` and photos in `images/`."""
    wording = FSCOCO.find_prompt(prompt)
    file = folder.annotation(f"{split}.txt", f"fscoco/{split}.txt")
    base = "" if file.parent == folder.root else "fscoco/"
    texts = {int(path.stem): path for path in sorted(file.parent.glob("text/*/*.txt")) if path.stem.isdecimal()}
    gallery, queries = [], []
    seen: dict[int, str] = {}
    for place, line in read_lines(file):
        number = check_integer(line.strip(), "COCO id", place)
        refuse_repeated(number, place, seen)
        if number not in texts:
            raise DataError(f"{place}: no text/<user>/{number:012d}.txt; extract the whole archive")
        name = f"{texts[number].parent.name}/{texts[number].stem}"
        photo = folder.image(place, *(f"{base}images/{name}{suffix}" for suffix in _SUFFIXES))
        gallery.append(GalleryItem(str(number), photo))
        sketch: ImageSource = NoImage()
        if query != "text":
            sketch = folder.image(place, *(f"{base}raster_sketches/{name}{suffix}" for suffix in _SUFFIXES))
        caption = check_text(read_text(texts[number]).strip(), "text", str(texts[number]))
        text = None if query == "sketch" else wording.text({"text": caption})
        queries.append(Query(str(number), sketch, text, (str(number),)))
    protocol = Protocol(
        metrics=("R@1", "R@5", "R@10", "MeanRank"),
        primary="R@10",
        ties="pessimistic",
        prompt="none" if query == "sketch" else wording.name,
        note=f"FS-COCO {split}: query={query}, gallery: photos of the split"
        + ("; no query image: all methods but chance embed the text alone" if query == "text" else ""),
    )
    name = f"fscoco_{query}"
    return Benchmark(name, split, "sbir" if query == "sketch" else "cir", queries, gallery, protocol)


# --- CSTBIR


@final
@dataclass(frozen=True, slots=True)
class QuickDrawBitmap:
    """A sketch of QuickDraw's `numpy_bitmap` files, 28 pixels wide, dark on white and enlarged to 224."""

    path: Path
    row: int

    @property
    def key(self) -> str:
        """Cache key, made of the file's path and the row."""
        return f"quickdraw|{self.path}|{self.row}"

    def open(self) -> Image.Image:
        """Render the sketch."""
        try:
            strokes = np.load(self.path, mmap_mode="r", allow_pickle=False)[self.row].reshape(28, 28).astype(np.uint8)
        except (OSError, ValueError, IndexError) as error:
            raise ImageError(f"{self.path}, row {self.row}: not a sketch of 784 bytes ({error})") from None
        return Image.fromarray(255 - strokes).resize((224, 224), Image.Resampling.BICUBIC).convert("RGB")


_CSV_KEYS = ("split", "text", "object_category", "image_filename", "sketch_filename")
_JSON_KEYS = ("split", "text", "label", "image", "sketch")


def read_cstbir(
    folder: DatasetFolder, split: str, *, gallery: str, oracle: bool, annotations: str | None, prompt: str | None
) -> Benchmark:
    """Read one split of CSTBIR, row by row: `CSTBIR_dataset.json` or a CSV file of the authors' loader.

    Query ids are the rows' numbers in the file. Sketches are files in `sketches/`, or are rendered from
    `numpy_bitmap/<category>.npy`. The split `open` has the rows whose split contains `open`.
    """
    wording = CSTBIR.find_prompt(prompt)
    blank, told = (wording.text({"text": "[sketch]", "label": label}) for label in ("", "cat"))
    if blank != told and not oracle:
        raise ConfigError(f"prompt {wording.name!r} tells the category of the sketch; set oracle=true to allow that")
    file = folder.annotation(*([annotations] if annotations else ["CSTBIR_dataset.json", "CSTBIR_dataset.csv"]))
    queries: list[Query] = []
    photos: dict[str, GalleryItem] = {}
    targets: dict[str, tuple[str, ...]] = {}
    sketches: dict[str, ImageSource] = {}
    labels: dict[str, str] = {}
    texts: dict[tuple[str, str], Text] = {}
    with _no_collection():
        for number, (_, text, label, photo, sketch) in _sketch_rows(file, split):
            if photo not in photos:
                photos[photo] = GalleryItem(photo, _genome_photo(folder, photo, f"{file}, row {number}"))
                targets[photo] = (photo,)
            if sketch not in sketches:
                sketches[sketch] = _sketch(folder, sketch, f"{file}, row {number}")
            if label not in labels:
                labels[label] = check_name(label, "label", f"{file}, row {number}")
            key = text, label if blank != told else ""
            if key not in texts:
                words = check_name(text, "text", f"{file}, row {number}")
                texts[key] = wording.text({"text": words, "label": label})
            queries.append(Query(str(number), sketches[sketch], texts[key], targets[photo], label=labels[label]))
    items = list(photos.values())
    if gallery != "targets":
        items = _listed_gallery(folder, gallery, photos)
    protocol = Protocol(
        metrics=("R@10", "R@20", "R@50", "R@100", "MedianRank"),
        primary="R@10",
        prompt=wording.name,
        note=f"CSTBIR {split}, gallery={gallery}: {len(items):,} photos; not comparable with other galleries"
        + ("; ORACLE: the text tells the category of the sketch" if oracle else ""),
    )
    return Benchmark("cstbir", split, "cir", queries, items, protocol)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the search for cycles: it takes a quarter of the time in which millions of queries are made."""
    paused = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if paused:
            gc.enable()


def _sketch_rows(file: Path, split: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield the rows of a split with their numbers: split, text, label, photo and sketch, all of them texts."""
    others = set()
    empty = True
    for number, values in enumerate(_csv_values(file) if file.suffix == ".csv" else _json_values(file)):
        name = values[0]
        if name == split or type(name) is not str or (split == "open" and "open" in name):
            if set(map(type, values)) != {str}:
                for key, one in zip(_JSON_KEYS, values, strict=True):
                    check_text(one, key, f"{file}, row {number}")
            empty = False
            yield number, values
        else:
            others.add(name)
    if empty:
        names = ", ".join(sorted(others)[:10]) or "none"
        raise DataError(f"{file}: has no row of split {split!r} (its splits: {names}); pass data.annotations=FILE")


def _csv_values(file: Path) -> Iterator[tuple[Any, ...]]:
    rows = read_csv(file)
    place, header = next(rows, (f"{file}, line 1", []))
    if missing := [key for key in _CSV_KEYS if key not in header]:
        raise DataError(f"{place}: column {missing[0]!r} is missing; expected {', '.join(_CSV_KEYS)}")
    at = [header.index(key) for key in _CSV_KEYS]
    for place, cells in rows:
        if len(cells) != len(header):
            raise DataError(f"{place}: {len(cells)} fields, but the header has {len(header)}; quote the text")
        yield tuple([cells[column] for column in at])


def _json_values(file: Path) -> Iterator[tuple[Any, ...]]:
    chosen = itemgetter(*_JSON_KEYS)
    for number, value in enumerate(read_json_items(file)):
        try:
            yield chosen(value)
        except (KeyError, TypeError, IndexError):
            record = check_record(value, f"{file}, row {number}")
            yield tuple(map(record.get, _JSON_KEYS))  # raises for the key that is missing


def _sketch(folder: DatasetFolder, name: str, place: str) -> ImageSource:
    path = check_path(name, "sketch", place)
    category, _, number = path.rpartition("/")[2].rpartition(".")[0].rpartition("_")
    names = [f"sketches/{path}", f"sketches/{category}/{path}", path]
    bitmaps = f"{folder.root}/numpy_bitmap/{category}.npy"
    wanted = folder.check_images and number.isdecimal() and os.path.isfile(bitmaps)  # noqa: PTH113 - fast
    if wanted and not any(os.path.isfile(f"{folder.root}/{one}") for one in names):  # noqa: PTH113 - fast
        return QuickDrawBitmap(Path(bitmaps), int(number))
    return folder.image(place, *names)


def _genome_photo(folder: DatasetFolder, name: str, place: str) -> Path:
    return folder.image(place, *[f"{top}/{check_path(name, 'image', place)}" for top in GENOME])


def _listed_gallery(folder: DatasetFolder, name: str, photos: Iterable[str]) -> list[GalleryItem]:
    file = folder.annotation(name)
    places: dict[str, str] = {}
    for place, line in read_lines(file):
        refuse_repeated(check_path(line.strip(), "image", place), place, places)
    if missing := [photo for photo in photos if photo not in places]:
        raise DataError(
            f"{file}: lacks {missing[0]!r}, a target ({len(missing)} targets are missing); complete the list"
        )
    return [GalleryItem(one, _genome_photo(folder, one, place)) for one, place in places.items()]


# --- ShoeV2 and ChairV2


def _drawn_photos(
    declaration: BenchmarkDeclaration, name: str, folder: DatasetFolder, split: str, *, prompt: str | None
) -> Benchmark:
    """Read `photo_<split>.txt` and `sketch_<split>.txt`, or the folders `<split>A` (sketches) and `<split>B`."""
    wording = declaration.find_prompt(prompt)
    tops: list[tuple[str, ...]] = [(f"{split}B",), (f"{split}A",)]
    listed = (folder.root / f"photo_{split}.txt").is_file() or not (folder.root / tops[1][0]).is_dir()
    if listed:
        tops = [(f"{name}_photo", "photo"), (f"{name}_sketch_png", f"{name}_sketch", "sketch_png", "sketch")]
    photos, sketches = (
        _drawn_files(folder.annotation(f"{side}_{split}.txt") if listed else folder.root / names[0])
        for side, names in zip(("photo", "sketch"), tops, strict=True)
    )

    def image(side: int, stem: str, place: str) -> Path:
        return folder.image(place, *(f"{top}/{stem}{suffix}" for top in tops[side] for suffix in (".png", *_SUFFIXES)))

    queries = []
    for stem, place in sketches.items():
        target = stem.rpartition("_")[0]
        if target not in photos:
            raise DataError(
                f"{place}: sketch {stem!r} is of {target!r}, which is no photo of {split}; complete the lists"
            )
        queries.append(Query(stem, image(1, stem, place), wording.text({}), (target,)))
    gallery = [GalleryItem(stem, image(0, stem, place)) for stem, place in photos.items()]
    protocol = Protocol(
        metrics=("R@1", "R@5", "R@10"),
        primary="R@1",
        prompt=wording.name,
        note=f"{name} {split}: the photo that was drawn among {len(gallery):,} photos; R@k is Acc@k of the papers",
    )
    return Benchmark(declaration.name, split, "sbir", queries, gallery, protocol)


read_shoev2 = partial(_drawn_photos, SHOEV2, "ShoeV2")
read_chairv2 = partial(_drawn_photos, CHAIRV2, "ChairV2")


def _drawn_files(path: Path) -> dict[str, str]:
    """Return the names without suffix of a list or a folder, with their places."""
    found: dict[str, str] = {}
    rows = read_lines(path) if path.is_file() else ((str(path), one.name) for one in sorted(path.iterdir()))
    for place, line in rows:
        stem = check_path(line.strip(), "file name", place).rpartition("/")[2].rpartition(".")[0]
        refuse_repeated(check_name(stem, "file name", place), place, found)
    if not found:
        raise DataError(f"{path}: is empty; download the dataset again")
    return found
