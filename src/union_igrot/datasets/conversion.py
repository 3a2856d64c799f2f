"""Conversion of an image's domain or attribute: the FREEDOM suite and PatternCom.

Every query image is asked for once with each other domain or value; images of the same class that have it are
relevant. The query image stays in the gallery.

- FREEDOM (NikosEfth/freedom): NICO++, Mini-DomainNet, LTLL, and ImageNet-R on the lists of DTIN. Its recall and
  precision add 1e-5 to their divisors, which is left out here.
- PatternCom (billpsomas/rscir): six attributes of PatternNet's aerial images.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from union_igrot.datasets.annotations import DatasetFolder, check_path, group_by, read_columns, read_labeled_paths
from union_igrot.datasets.builtin import DOMAINS, IMAGENET_R, LTLL, MINIDN, NICO, PATTERNCOM
from union_igrot.datasets.registry import BenchmarkDeclaration
from union_igrot.errors import DataError
from union_igrot.storage.text import refuse_repeated
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query

_NICO = {name: name for name in ("autumn", "dim", "grass", "outdoor", "rock", "water")} | {"dim": "dimlight"}
_MINIDN = {"clipart": "clipart", "painting": "painting", "real": "photo", "sketch": "sketch"}
_LTLL = {"New": "Today", "Old": "Archive"}
_IMAGENET_R = {"real": "photo"} | {name: name for name in DOMAINS}
_MERGED = {
    **dict.fromkeys(("denseresidential", "sparseresidential"), "residential"),
    **dict.fromkeys(("closedroad", "intersection"), "road"),
    **dict.fromkeys(("bridge", "overpass"), "roadpass"),
    **dict.fromkeys(("ferryterminal", "harbor"), "pier"),
    **dict.fromkeys(("parkingspace", "parkinglot"), "parking"),
}
_PATTERNCOM_KS = (5, 10, 15, 20)


class _Shown(NamedTuple):
    """An image that shows an object of a class in a domain, or with the value of an attribute."""

    place: str
    path: str
    value: str
    label: str


def _read_freedom(
    declaration: BenchmarkDeclaration,
    files: tuple[str, str],
    domains: Mapping[str, str],
    ks: tuple[int, ...],
    folder: DatasetFolder,
    split: str,
    *,
    prompt: str | None,
) -> Benchmark:
    """Read a dataset in FREEDOM's version; `files` are the lists of queries and gallery."""
    queries, gallery = (_read_rows(folder, declaration.name, file, domains) for file in files)
    return _domains(declaration, folder, split, queries, gallery, ks, prompt)


_TWO_LISTS = ("query_files.csv", "database_files.csv")
read_nico = partial(_read_freedom, NICO, _TWO_LISTS, _NICO, (50, 100))
read_minidn = partial(_read_freedom, MINIDN, _TWO_LISTS, _MINIDN, (50, 100))
read_ltll = partial(_read_freedom, LTLL, ("full_files.csv", "full_files.csv"), _LTLL, (5, 10))


def read_imagenet_r(folder: DatasetFolder, split: str, *, prompt: str | None) -> Benchmark:
    """Read ImageNet-R in FREEDOM's protocol, on the targets of DTIN's list; every image is a query."""
    listed = read_labeled_paths(folder.annotation("imgnet/imgnet_targets.txt", "imgnet_targets.txt"))
    names = [*DOMAINS, "real", "real", "real"]  # real photos have a higher number than the others
    for row in listed:
        if row.label // 1000 >= len(names):
            raise DataError(f"{row.place}: label {row.label} has no known domain; expected class + 1000 * domain")
    rows = [_Shown(x.place, x.path, _IMAGENET_R[names[x.label // 1000]], str(x.label % 1000)) for x in listed]
    return _domains(IMAGENET_R, folder, split, rows, rows, (10, 50), prompt)


def _read_rows(folder: DatasetFolder, dataset: str, name: str, domains: Mapping[str, str]) -> list[_Shown]:
    rows = []
    seen: dict[str, str] = {}
    file = folder.annotation(name, f"{dataset}/{name}")
    for place, (path, domain, label) in read_columns(file, "path", "domain", "class", separator=" "):
        if domain not in domains:
            raise DataError(f"{place}: domain is {domain!r}; expected one of {', '.join(domains)}")
        refuse_repeated(path, place, seen)
        rows.append(_Shown(place, check_path(path, "path", place), domains[domain], label))
    return rows


def _domains(
    declaration: BenchmarkDeclaration,
    folder: DatasetFolder,
    split: str,
    queries: Sequence[_Shown],
    gallery: Sequence[_Shown],
    ks: tuple[int, ...],
    prompt: str | None,
) -> Benchmark:
    wording = declaration.find_prompt(prompt)
    domains = sorted({row.value for row in gallery})
    asked = [
        Query(
            f"{row.path}@{target}",
            folder.listed_image(row.place, row.path),
            wording.text({"domain": target}),
            relevant,
            label=row.label,
            tags=(f"{row.value} -> {target}",),
        )
        for row, target, relevant in _conversions(queries, gallery, {row.label: domains for row in queries})
    ]
    protocol = Protocol(
        metrics=("mAP", *(f"R@{k}" for k in ks), *(f"P@{k}" for k in ks)),
        primary="mAP",
        ap_norm="all",
        ap_rule="trapezoid",
        average="macro",
        groups="tag",
        ties="gallery order",
        recall="fraction",
        precision_cut="attainable",
        unanswered="zero",
        prompt=wording.name,
        note=f"FREEDOM {declaration.name}: mean over the ordered pairs of {len(domains)} domains; reference in gallery",
    )
    items = [GalleryItem(row.path, folder.listed_image(row.place, row.path), row.label) for row in gallery]
    return Benchmark(declaration.name, split, "cir", asked, items, protocol)


def _conversions(
    queries: Iterable[_Shown], gallery: Iterable[_Shown], values: Mapping[str, Iterable[str]]
) -> Iterator[tuple[_Shown, str, tuple[str, ...]]]:
    """Yield each query with each other value of its class, and the relevant images, which queries share."""
    groups = group_by(gallery, lambda row: (row.label, row.value))
    targets = {key: tuple(row.path for row in rows) for key, rows in groups.items()}
    for row in queries:
        for value in values[row.label]:
            if value != row.value:
                yield row, value, targets.get((row.label, value), ())


def read_patterncom(folder: DatasetFolder, split: str, *, attribute: str, prompt: str | None) -> Benchmark:
    """Read one attribute of PatternCom; the gallery is all of PatternNet.

    Classes that are alike are merged, and an image that the attribute's list does not name is never relevant.
    """
    wording = PATTERNCOM.find_prompt(prompt)
    paths: dict[str, tuple[str, str]] = {}
    seen: dict[str, str] = {}
    columns = ("path", "number", "label")
    for place, (path, *_) in read_columns(folder.annotation("patternnet.csv"), *columns, separator=" ", more=True):
        name = path.rpartition("/")[2]
        refuse_repeated(name, place, seen)
        paths[name] = (place, check_path(path, "path", place))
    items = {
        name: GalleryItem(name, folder.image(place, path, f"images/{path}"), _aerial_class(name))
        for name, (place, path) in paths.items()
    }
    file = folder.annotation(f"PatternCom/{attribute}.csv", f"PatterCom/{attribute}.csv", f"{attribute}.csv")
    rows, seen = [], {}
    for place, (name, given, value) in read_columns(file, "filename", "attribute", "value"):
        if name not in items or given != attribute:
            wrong = f"attribute is {given!r}" if name in items else f"{name!r} is not in patternnet.csv"
            raise DataError(f"{place}: {wrong}; expected an image of PatternNet and {attribute}")
        refuse_repeated(name, place, seen)
        rows.append(_Shown(place, name, value, _aerial_class(name)))
    groups = group_by(rows, lambda row: row.label)
    values = {label: list(dict.fromkeys(row.value for row in some)) for label, some in groups.items()}
    queries = [
        Query(f"{row.path}@{value}", items[row.path].image, wording.text({"value": value}), relevant, label=row.label)
        for row, value, relevant in _conversions(rows, rows, values)
    ]
    protocol = Protocol(
        metrics=("mAP", *(f"P@{k}" for k in _PATTERNCOM_KS), *(f"R@{k}" for k in _PATTERNCOM_KS)),
        primary="mAP",
        ap_norm="all",
        ties="gallery order",
        recall="fraction",
        prompt=wording.name,
        note=f"PatternCom {attribute}; similar classes merged; reference in gallery; Avg is the mean of the six",
    )
    return Benchmark(f"patterncom_{attribute}", split, "cir", queries, list(items.values()), protocol)


def _aerial_class(name: str) -> str:
    label = re.split(r"\d", name, maxsplit=1)[0]
    return _MERGED.get(label, label)
