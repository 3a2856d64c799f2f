"""CIRR: natural photos with a modification text, ranked in the whole split and in a subset of six similar images.

Source: Cuberick-Orion/CIRR, branch cirr_dataset. The reference is always excluded from the ranking.
"""

from union_igrot.datasets.annotations import DatasetFolder, Record, check_path, check_record, read_records
from union_igrot.datasets.builtin import CIRR
from union_igrot.datasets.registry import Template
from union_igrot.errors import DataError
from union_igrot.storage.text import read_json, refuse_repeated
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query


def read_cirr(folder: DatasetFolder, split: str, *, prompt: str | None, preset: str) -> Benchmark:
    """Read one split of CIRR.

    Args:
        folder: The dataset's folder, with `cirr/captions/`, `cirr/image_splits/` and the images that these name.
        split: `val`, `train`, or `test1` (whose targets are not published).
        prompt: Name or template.
        preset: `official` or `union_reference`; they are the same here.

    Returns:
        The benchmark. Query ids are the pairids; a subset has the five members other than the reference.
    """
    wording = CIRR.find_prompt(prompt)
    records = read_records(folder.annotation(f"cirr/captions/cap.rc2.{split}.json"))
    file = folder.annotation(f"cirr/image_splits/split.rc2.{split}.json")
    listed = check_record(read_json(file), str(file))
    paths = {name: check_path(path, name, f"{file}, {name!r}") for name, path in listed.fields.items()}
    if not paths:
        raise DataError(f"{file}: names no image; download the file again")
    gallery = [GalleryItem(name, folder.image(f"{file}, {name!r}", path)) for name, path in paths.items()]
    seen: dict[str, str] = {}
    queries = []
    for record in records:
        refuse_repeated(record.name("pairid"), record.place, seen)
        queries.append(_query(record, split, folder, paths, wording.text))
    protocol = Protocol(
        name=preset,
        metrics=("R@1", "R@2", "R@5", "R@10", "R@50", "Rs@1", "Rs@2", "Rs@3"),
        primary="R@5",
        exclude_reference=True,
        means=(("R@5", "Rs@1"),),
        prompt=wording.name,
        note=f"CIRR {split}; the reference is out of every ranking; subsets of five beside the reference",
    )
    return Benchmark("cirr", split, "cir", queries, gallery, protocol)


def _query(record: Record, split: str, folder: DatasetFolder, paths: dict[str, str], text: Template) -> Query:
    reference = record.name("reference")
    target = () if split == "test1" else (record.name("target_hard"),)
    members = record.record("img_set").names("members")
    for name in (reference, *target, *members):
        if name not in paths:
            raise DataError(f"{record.place}: {name!r} is not in the split file; download both files again")
    if reference in target:
        raise DataError(f"{record.place}: the reference is its own target, {reference!r}; download the file again")
    if not {reference, *target} <= set(members):
        raise DataError(f"{record.place}: img_set.members lacks the reference or the target; download the file again")
    return Query(
        id=record.name("pairid"),
        image=folder.image(record.place, paths[reference]),
        text=text({"caption": record.text("caption")}),
        targets=target,
        exclude=(reference,),
        subset=tuple(name for name in members if name != reference),
    )
