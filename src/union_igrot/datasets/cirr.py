"""CIRR: natural photos with a sentence, ranked in the whole split and in a subset of six look-alikes.

Source: Cuberick-Orion/CIRR, branch cirr_dataset. The reference is always out of the ranking. Does not know how
submission files look.
"""

from union_igrot.datasets.annotations import Record, as_path, as_record, once, read_json, read_records
from union_igrot.datasets.files import Files
from union_igrot.datasets.prompts import Template, default_prompt, template
from union_igrot.errors import DataError
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query

SPLITS = ("val", "train", "test1")


def cirr(files: Files, split: str = "val", *, prompt: str | None = None, preset: str = "official") -> Benchmark:
    """Read one split of CIRR.

    Args:
        files: The dataset's folder, with `cirr/captions/`, `cirr/image_splits/` and the images that these name.
        split: `val`, `train`, or `test1` (whose targets are not published).
        prompt: See `prompts`.
        preset: `official` or `union_reference`; they are the same here.

    Returns:
        The benchmark. Query ids are the pairids; a subset holds the five members beside the reference.
    """
    prompt = default_prompt("cirr") if prompt is None else prompt
    word = template("cirr", prompt)
    records = read_records(files.annotation(f"cirr/captions/cap.rc2.{split}.json"))
    listing = files.annotation(f"cirr/image_splits/split.rc2.{split}.json")
    named = as_record(read_json(listing), str(listing))
    paths = {name: as_path(path, name, f"{listing}, {name!r}") for name, path in named.fields.items()}
    if not paths:
        raise DataError(f"{listing}: names no image; fetch the file again")
    gallery = [GalleryItem(name, files.image(f"{listing}, {name!r}", path)) for name, path in paths.items()]
    seen: dict[str, str] = {}
    queries = []
    for record in records:
        once(record.name("pairid"), record.where, seen)
        queries.append(_query(record, split, files, paths, word))
    protocol = Protocol(
        name=preset,
        metrics=("R@1", "R@2", "R@5", "R@10", "R@50", "Rs@1", "Rs@2", "Rs@3"),
        primary="R@5",
        exclude_reference=True,
        means=(("R@5", "Rs@1"),),
        prompt=prompt,
        note=f"CIRR {split}; the reference is out of every ranking; subsets of five beside the reference",
    )
    return Benchmark("cirr", split, "cir", queries, gallery, protocol)


def _query(record: Record, split: str, files: Files, paths: dict[str, str], word: Template) -> Query:
    reference = record.name("reference")
    target = () if split == "test1" else (record.name("target_hard"),)
    members = record.record("img_set").names("members")
    for name in (reference, *target, *members):
        if name not in paths:
            raise DataError(f"{record.where}: {name!r} is not in the split file; fetch both files again")
    if reference in target:
        raise DataError(f"{record.where}: the reference is its own target, {reference!r}; fetch the file again")
    if not {reference, *target} <= set(members):
        raise DataError(f"{record.where}: img_set.members lacks the reference or the target; fetch the file again")
    return Query(
        id=record.name("pairid"),
        image=files.image(record.where, paths[reference]),
        text=word({"caption": record.text("caption")}),
        targets=target,
        exclude=(reference,),
        subset=tuple(name for name in members if name != reference),
    )
