"""Queries over images of other datasets: CIRCLED's sessions of several turns, and MMEB's lists of candidates.

- CIRCLED (tk1441/CIRCLED on Hugging Face): each turn asks for the targets of its session, in the galleries of
  FashionIQ, CIRR and CIRCO.
- MMEB (TIGER-AI-Lab/VLM2Vec; ziyjiang/MMEB_Test_Instruct): CIRR and FashionIQ queries that rank a list of candidates
  each, the first of which is the target. Its numbers are comparable with no official protocol of these datasets.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from union_igrot.datasets.annotations import DatasetFolder, Record, check_path, check_text, read_records, refuse_unknown
from union_igrot.datasets.builtin import CIRCLED, MMEB
from union_igrot.datasets.composed import read_circo, read_cirr, read_fashioniq
from union_igrot.errors import ConfigError, DataError
from union_igrot.storage.text import refuse_repeated
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query

_READERS: dict[str, Callable[..., Benchmark]] = {"cirr": read_cirr, "circo": read_circo, "fashioniq": read_fashioniq}


def read_circled(folder: DatasetFolder, split: str, *, subset: str, prompt: str | None) -> Benchmark:
    """Read the sessions of one subset, `<subset>_<split>.json`, with the dataset's own folder inside or beside."""
    wording = CIRCLED.find_prompt(prompt)
    if subset == "circo" and split != "val":
        raise ConfigError("invalid value for split: 'train' (expected val; CIRCLED has no training sessions of CIRCO)")
    name = subset if subset in _READERS else "fashioniq"
    stem = f"{subset}_{split}" if name == subset else f"{name}_{subset}_{split}"
    file = folder.annotation(*(f"{top}{stem}{end}" for top in ("", "data/") for end in (".json", ".jsonl")))
    images = {item.id: item for item in _galleries(folder, name, subset, split)}
    sessions = read_records(file, concatenated=True)
    most = max(len(session.records("turns")) for session in sessions)
    queries, seen = [], dict[str, str]()
    for session in sessions:
        turns, label = session.records("turns"), session.name("session_id")
        refuse_repeated(label, session.place, seen)
        targets = session.names("ground_truth_ids")
        for at, turn in enumerate(turns, 1):
            reference = turn.name("reference_image_id")
            if turn.integer("turn") != at:
                raise DataError(f"{turn.place}: turn is {turn.integer('turn')}; expected {at}, turns in order")
            refuse_unknown((reference, *targets), images, turn.place, f"the gallery of {subset} {split}")
            tags = (f"turn {at}", *(f"up to turn {last}" for last in range(at, most + 1)))
            tags += ("last turn",) * (at == len(turns))
            text = wording.text({"relative_caption": turn.text("relative_caption")})
            queries.append(Query(f"{label}-{at}", images[reference].image, text, targets, label=label, tags=tags))
    protocol = Protocol(
        metrics=("groupR@10", "R@10"),
        primary="groupR@10",
        ties="gallery order",
        prompt=wording.name,
        note=f"CIRCLED {subset} {split}: a group is a session; 'turn t' is R@10 of that turn, 'up to turn t' is Hits@t",
    )
    return Benchmark(f"circled_{subset}", split, "cir", queries, list(images.values()), protocol)


def _galleries(folder: DatasetFolder, name: str, subset: str, split: str) -> list[GalleryItem]:
    homes = [folder.root / name, folder.root.parent / name]
    home = DatasetFolder(next((one for one in homes if one.is_dir()), homes[0]), folder.check_images)
    options: dict[str, Any] = {"prompt": None, "preset": "official"}
    if name != "circo":
        options |= {"targets": None}
    if name == "fashioniq":
        options |= {"category": subset, "gallery": "original", "captions": None, "spelling": False}
    gallery = list(_READERS[name](home, split, **options).gallery)
    home.refuse_missing()
    return gallery


def read_mmeb(folder: DatasetFolder, split: str, *, task: str, prompt: str | None) -> Benchmark:
    """Read `<task>/test-*.parquet` (pyarrow is needed) or `<task>.jsonl`, with images in `image-tasks/`."""
    wording = MMEB.find_prompt(prompt)
    gallery: dict[str, GalleryItem] = {}

    def item(value: object, key: str, place: str) -> str:
        path = check_path(value, key, place)
        if path not in gallery:
            gallery[path] = GalleryItem(path, folder.image(place, f"image-tasks/{path}", path))
        return path

    queries = []
    for number, row in enumerate(_mmeb_rows(folder, task)):
        fields = {key: row.text(key).replace("<|image_1|>", "").strip() for key in ("qry_inst", "qry_text")}
        path = check_path(row.get("qry_img_path"), "qry_img_path", row.place)
        image = folder.image(row.place, f"image-tasks/{path}", path)
        listed = row.get("tgt_img_path")
        if not isinstance(listed, list) or len(listed) < 2:
            raise DataError(f"{row.place}: tgt_img_path is not a list of the target and other candidates")
        subset = tuple(item(value, "tgt_img_path", row.place) for value in listed)
        queries.append(Query(f"{task}-{number}", image, wording.text(fields), subset[:1], subset=subset))
    protocol = Protocol(
        metrics=("hit@1",),
        primary="hit@1",
        ties="pessimistic",
        candidates="subset",
        prompt=wording.name,
        note=f"MMEB {task}: each query ranks its own candidates; not comparable with {task}'s official protocol",
    )
    return Benchmark(f"mmeb_{task.lower()}", split, "cir", queries, list(gallery.values()), protocol)


def _mmeb_rows(folder: DatasetFolder, task: str) -> Iterator[Record]:
    shards = sorted(folder.root.glob(f"{task}/test-*.parquet"))
    if not shards:
        yield from read_records(folder.annotation(f"{task}.jsonl", f"{task}/test.jsonl"), concatenated=True)
    for file in shards:
        yield from _parquet_rows(file)


def _parquet_rows(file: Path) -> Iterator[Record]:
    try:
        from pyarrow import ArrowException, parquet  # noqa: PLC0415 - of an extra
    except ImportError:
        raise ConfigError(f"{file}: needs pyarrow; pip install pyarrow, or convert the file to .jsonl") from None
    try:
        rows = parquet.read_table(file).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(f"{file}: not a Parquet file ({check_text(str(error), 'error', str(file))[:80]})") from None
    for number, fields in enumerate(rows):
        yield Record(f"{file}, row {number}", fields)
