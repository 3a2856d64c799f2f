"""Domain-transfer ImageNet: an ImageNet photo and a domain; the same class in that domain answers.

Source: Pic2Word (`imgnet_real_query.txt`, `imgnet_targets.txt`). Of the two definitions of recall in use, the share
of the answers found (Pic2Word) is the default; any answer found (MagicLens, UNION) is an option. Pic2Word adds 1e-5 to
the divisor, which is left out here. Does not know how images are encoded.
"""

from collections import defaultdict

from union_igrot.datasets.annotations import Labelled, choose, read_labelled
from union_igrot.datasets.files import Files
from union_igrot.datasets.prompts import default_prompt, template
from union_igrot.errors import DataError
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query

DOMAINS = ("cartoon", "origami", "toy", "sculpture")
SPLITS = ("val",)
_REAL = 6
_KS = (1, 5, 10, 50, 100, 200)


def dtin(
    files: Files,
    split: str = "val",
    *,
    domain: str | None = None,
    recall_mode: str | None = None,
    only_with_gt: bool = False,
    prompt: str | None = None,
    preset: str = "official",
) -> Benchmark:
    """Read one target domain.

    Args:
        files: The dataset's folder, with `imgnet/imgnet_real_query.txt`, `imgnet/imgnet_targets.txt` and the
            images, whose folder may or may not begin with the lists' own first part, `imgnet/`.
        split: `val`, the only one.
        domain: `cartoon`, `origami`, `toy` or `sculpture`.
        recall_mode: `fraction` (default) or `any` (default under `union_reference`).
        only_with_gt: Leave out the queries without an answer in the domain. By default they count as 0.
        prompt: See `prompts`.
        preset: `official`, or `union_reference` with average precision by trapezoids over the hits in the top k.

    Returns:
        The benchmark. Its gallery is the same for every domain and holds the queries' own photos as distractors.
    """
    domain = choose("domain", domain, DOMAINS)
    number = DOMAINS.index(domain)
    reference = preset == "union_reference"
    mode = choose("recall_mode", recall_mode or ("any" if reference else "fraction"), ("fraction", "any"))
    prompt = default_prompt("dtin") if prompt is None else prompt
    text = template("dtin", prompt)({"domain": domain})
    asking = read_labelled(files.annotation("imgnet/imgnet_real_query.txt", "imgnet_real_query.txt"))
    listed = read_labelled(files.annotation("imgnet/imgnet_targets.txt", "imgnet_targets.txt"))
    answers: defaultdict[int, list[str]] = defaultdict(list)
    gallery = []
    for row in listed:
        if row.label // 1000 not in (*range(len(DOMAINS)), _REAL):
            raise DataError(f"{row.where}: label {row.label} belongs to no domain; it must be class + 1000 * domain")
        if row.label // 1000 == number:
            answers[row.label % 1000].append(row.path)
        gallery.append(GalleryItem(row.path, files.image(row.where, *_places(row.path)), str(row.label % 1000)))
    targets = {label: tuple(paths) for label, paths in answers.items()}
    asked = [(row, _class(row)) for row in asking]
    queries = [
        Query(row.path, files.image(row.where, *_places(row.path)), text, targets.get(row.label, ()), label=label)
        for row, label in asked
        if not only_with_gt or row.label in targets
    ]
    kept = "left out" if only_with_gt else "counted as 0"
    protocol = Protocol(
        name=preset,
        metrics=(*(f"R@{k}" for k in _KS), *(f"P@{k}" for k in _KS), "mAP"),
        primary="R@10",
        ap_norm="hits" if reference else "min",
        ap_rule="trapezoid" if reference else "step",
        recall="any" if mode == "any" else "fraction",
        unanswered="omit" if only_with_gt else "zero",
        prompt=prompt,
        note=f"DTIN {domain}; queries without an answer {kept}; the query's own photo is a distractor",
    )
    return Benchmark(f"dtin_{domain}", split, "cir", queries, gallery, protocol)


def _class(row: Labelled) -> str:
    if row.label >= 1000:
        raise DataError(f"{row.where}: label {row.label} is no class; a query's is below 1000")
    return str(row.label)


def _places(path: str) -> tuple[str, str]:
    return path, path.partition("/")[2] or path
