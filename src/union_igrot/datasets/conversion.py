"""Conversion of an image's domain or attribute: the FREEDOM suite and PatternCom.

Every query image is asked for once with each other domain or value; images of the same class that have it are
relevant. The query image stays in the gallery.

- FREEDOM (NikosEfth/freedom): NICO++, Mini-DomainNet, LTLL, and ImageNet-R on the lists of DTIN. Its recall and
  precision add 1e-5 to their divisors, which is left out here.
- PatternCom (billpsomas/rscir): six attributes of PatternNet's aerial images.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from union_igrot.datasets.annotations import DatasetFolder, check_path, read_columns, read_labeled_paths
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


def read_nico(folder: DatasetFolder, split: str, *, prompt: str | None) -> Benchmark:
    """Read NICO++ in FREEDOM's version, `query_files.csv` and `database_files.csv`."""
    queries, gallery = (_read_rows(folder, NICO, f"{side}_files.csv", _NICO) for side in ("query", "database"))
    return _domains(NICO, folder, split, queries, gallery, (50, 100), prompt)


def read_minidn(folder: DatasetFolder, split: str, *, prompt: str | None) -> Benchmark:
    """Read Mini-DomainNet in FREEDOM's version, `query_files.csv` and `database_files.csv`."""
    queries, gallery = (_read_rows(folder, MINIDN, f"{side}_files.csv", _MINIDN) for side in ("query", "database"))
    return _domains(MINIDN, folder, split, queries, gallery, (50, 100), prompt)


def read_ltll(folder: DatasetFolder, split: str, *, prompt: str | None) -> Benchmark:
    """Read LTLL, landmarks today and long ago; `full_files.csv` has queries and gallery."""
    rows = _read_rows(folder, LTLL, "full_files.csv", _LTLL)
    return _domains(LTLL, folder, split, rows, rows, (5, 10), prompt)


def read_imagenet_r(folder: DatasetFolder, split: str, *, prompt: str | None) -> Benchmark:
    """Read ImageNet-R in FREEDOM's protocol, on the targets of DTIN's list; every image is a query."""
    listed = read_labeled_paths(folder.annotation("imgnet/imgnet_targets.txt", "imgnet_targets.txt"))
    names = [*DOMAINS, "real", "real", "real"]  # real photos have a higher number than the others
    for row in listed:
        if row.label // 1000 >= len(names):
            raise DataError(f"{row.place}: label {row.label} has no known domain; expected class + 1000 * domain")
    rows = [_Shown(one.place, one.path, names[one.label // 1000], str(one.label % 1000)) for one in listed]
    renamed = [row._replace(value=_IMAGENET_R[row.value]) for row in rows]
    return _domains(IMAGENET_R, folder, split, renamed, renamed, (10, 50), prompt)


def _read_rows(
    folder: DatasetFolder, declaration: BenchmarkDeclaration, name: str, domains: Mapping[str, str]
) -> list[_Shown]:
    rows = []
    seen: dict[str, str] = {}
    file = folder.annotation(name, f"{declaration.name}/{name}")
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
    def image(row: _Shown) -> GalleryItem:  # paths of the lists begin with the name of the dataset
        return GalleryItem(
            row.path, folder.image(row.place, row.path, row.path.partition("/")[2] or row.path), row.label
        )

    wording = declaration.find_prompt(prompt)
    domains = sorted({row.value for row in gallery})
    asked = [
        Query(
            f"{row.path}@{target}",
            image(row).image,
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
    return Benchmark(declaration.name, split, "cir", asked, [image(row) for row in gallery], protocol)


def _conversions(
    queries: Iterable[_Shown], gallery: Iterable[_Shown], values: Mapping[str, Iterable[str]]
) -> Iterator[tuple[_Shown, str, tuple[str, ...]]]:
    """Yield each query with each other value of its class, and the relevant images, which queries share."""
    members: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for row in gallery:
        members[row.label, row.value].append(row.path)
    targets = {key: tuple(paths) for key, paths in members.items()}
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
    values: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for place, (name, given, value) in read_columns(file, "filename", "attribute", "value"):
        if name not in items or given != attribute:
            wrong = f"attribute is {given!r}" if name in items else f"{name!r} is not in patternnet.csv"
            raise DataError(f"{place}: {wrong}; expected an image of PatternNet and {attribute}")
        refuse_repeated(name, place, seen)
        rows.append(_Shown(place, name, value, _aerial_class(name)))
        values[rows[-1].label][value] = None
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
