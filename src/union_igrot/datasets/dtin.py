"""Domain-transfer ImageNet: a photo and a domain; images of the photo's class in that domain are the targets.

Source: Pic2Word (`imgnet_real_query.txt`, `imgnet_targets.txt`). Of the two definitions of recall in use, the fraction
of the targets found (Pic2Word) is the default; any target found (MagicLens, UNION) is an option. Pic2Word adds 1e-5 to
the divisor, which is left out here.
"""

from collections import defaultdict

from union_igrot.datasets.annotations import DatasetFolder, LabeledPath, read_labeled_paths
from union_igrot.datasets.builtin import DOMAINS, DTIN
from union_igrot.errors import DataError
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query

_REAL = 6
_KS = (1, 5, 10, 50, 100, 200)


def read_dtin(
    folder: DatasetFolder,
    split: str,
    *,
    domain: str,
    recall_mode: str | None,
    only_with_gt: bool,
    prompt: str | None,
    preset: str,
) -> Benchmark:
    """Read one target domain.

    Args:
        folder: The dataset's folder, with `imgnet/imgnet_real_query.txt`, `imgnet/imgnet_targets.txt` and the
            images, whose paths may or may not begin with the lists' own first folder, `imgnet/`.
        split: `val`, the only one.
        domain: `cartoon`, `origami`, `toy` or `sculpture`.
        recall_mode: `fraction` (default) or `any` (default under `union_reference`).
        only_with_gt: Leave out the queries without a target in the domain. By default they count as 0.
        prompt: Name or template.
        preset: `official`, or `union_reference` with average precision by trapezoids over the hits in the top k.

    Returns:
        The benchmark. Its gallery is the same for every domain and includes the queries' own photos as distractors.
    """
    reference = preset == "union_reference"
    mode = recall_mode or ("any" if reference else "fraction")
    wording = DTIN.find_prompt(prompt)
    text = wording.text({"domain": domain})
    photos = read_labeled_paths(folder.annotation("imgnet/imgnet_real_query.txt", "imgnet_real_query.txt"))
    listed = read_labeled_paths(folder.annotation("imgnet/imgnet_targets.txt", "imgnet_targets.txt"))
    members: defaultdict[int, list[str]] = defaultdict(list)
    gallery = []
    for row in listed:
        if row.label // 1000 not in (*range(len(DOMAINS)), _REAL):
            raise DataError(f"{row.place}: label {row.label} has no known domain; expected class + 1000 * domain")
        if row.label // 1000 == DOMAINS.index(domain):
            members[row.label % 1000].append(row.path)
        gallery.append(GalleryItem(row.path, folder.image(row.place, *_paths(row.path)), str(row.label % 1000)))
    targets = {label: tuple(paths) for label, paths in members.items()}
    labeled = [(row, _class_of(row)) for row in photos]
    queries = [
        Query(row.path, folder.image(row.place, *_paths(row.path)), text, targets.get(row.label, ()), label=label)
        for row, label in labeled
        if not only_with_gt or row.label in targets
    ]
    unanswered = "left out" if only_with_gt else "counted as 0"
    protocol = Protocol(
        name=preset,
        metrics=(*(f"R@{k}" for k in _KS), *(f"P@{k}" for k in _KS), "mAP"),
        primary="R@10",
        ap_norm="hits" if reference else "min",
        ap_rule="trapezoid" if reference else "step",
        recall="any" if mode == "any" else "fraction",
        unanswered="omit" if only_with_gt else "zero",
        prompt=wording.name,
        note=f"DTIN {domain}; queries without an answer {unanswered}; the query's own photo is a distractor",
    )
    return Benchmark(f"dtin_{domain}", split, "cir", queries, gallery, protocol)


def _class_of(row: LabeledPath) -> str:
    if row.label >= 1000:
        raise DataError(f"{row.place}: label {row.label} is not the class of a query; expected a number below 1000")
    return str(row.label)


def _paths(path: str) -> tuple[str, str]:
    return path, path.partition("/")[2] or path
