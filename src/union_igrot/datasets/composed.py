"""Composed retrieval: FashionIQ, CIRR, CIRCO, GeneCIS, domain-transfer ImageNet, LaSCo and LlavaSCo.

- FashionIQ (XiaoxiaoGuo/fashion-iq): clothes and two captions of what should be different, in three categories. Two
  galleries are in use and their metrics cannot be compared: `original` is the category's split file; `val`
  (yanbeic/VAL) is every image that the queries name, with each caption a query of its own and the reference excluded.
- CIRR (Cuberick-Orion/CIRR, branch cirr_dataset): natural photos, ranked in the whole split and in a subset of six
  similar images. The reference is always excluded from the ranking.
- CIRCO (miccunifi/CIRCO): COCO photos with several targets each. The first target of a query is its single
  `target_img_id`, the only one that the official recall counts.
- GeneCIS (facebookresearch/genecis): four tasks with a condition of a few words and ten to fifteen candidates per
  query. The images of attribute tasks are objects cut out of Visual Genome photos, those of object tasks COCO photos.
- Domain-transfer ImageNet (DTIN): images of the photo's class in another domain are relevant. The lists are Pic2Word's.
  Recall is the fraction of the targets found (Pic2Word) or optionally any target found (MagicLens, UNION). Pic2Word
  adds 1e-5 to the divisor, which is left out here.
- LaSCo (levymsn/LaSCo) and LlavaSCo (the UNION authors'): COCO triplets with written or generated texts. A validation
  query never contains a caption of its target, unless the authors' own protocol is selected by name.

On request, corrections by other authors are read: the spelling of FashionIQ's captions (haokunwen/DQU-CIR, words by
words, some of them wrong), and several targets of CIRR and FashionIQ (jjungyujin/SoFT, images with a confidence).
"""

import reprlib
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from union_igrot.datasets.annotations import (
    GENOME,
    DatasetFolder,
    Record,
    check_name,
    check_path,
    check_record,
    check_text,
    group_by,
    read_labeled_paths,
    read_list,
    read_records,
    refuse_unknown,
)
from union_igrot.datasets.builtin import (
    CATEGORIES,
    CIRCO,
    CIRR,
    DOMAINS,
    DTIN,
    FASHIONIQ,
    GENECIS,
    LASCO,
    LEAKING_PROMPT,
    LLAVASCO,
)
from union_igrot.datasets.registry import Template, Text
from union_igrot.errors import ConfigError, DataError
from union_igrot.images.identity import Crop
from union_igrot.storage.text import read_json, refuse_repeated
from union_igrot.types import Benchmark, GalleryItem, ImageSource, Protocol, Query

_COCO_UNLABELED = "COCO2017_unlabeled"
_COCO_VAL = ("val2017", "coco/val2017", "coco2017/val2017", "images/val2017")
_CIRCO_ASPECTS = (
    *("cardinality", "addition", "negation", "direct_addressing", "compare_change", "comparative_statement"),
    *("statement_with_conjunction", "spatial_relations_background", "viewpoint"),
)
_REAL_DOMAIN = 6  # of DTIN's queries
_DTIN_KS = (1, 5, 10, 50, 100, 200)
_LASCO_KS = (1, 5, 10, 50, 100, 500, 1000)
_BLANKED = str.maketrans(dict.fromkeys(string.punctuation, " "))
_LLAVASCO_TEXTS = ("relative_caption", "llava_reference_caption", "llava_target_caption")


# --- corrections by other authors


def _read_spelling(folder: DatasetFolder, category: str) -> Callable[[str], str]:
    """Return the function that corrects a caption of FashionIQ: lower case, no punctuation, words replaced."""
    name = f"correction_dict_{category}.json"
    file = folder.annotation(f"captions/{name}", name)
    given = check_record(read_json(file), str(file)).fields
    words = {word: check_text(right, word, str(file)) for word, right in given.items()}
    return lambda text: " ".join(words.get(word, word) for word in text.lower().translate(_BLANKED).split())


class _SeveralTargets:
    """The targets of queries by reference and target; the query's own target first."""

    def __init__(self, folder: DatasetFolder, name: str | None) -> None:
        self._found: dict[tuple[str, str], tuple[str, ...]] = {}
        self._name, self._places, self._used = name, dict[tuple[str, str], str](), 0
        for row in read_records(folder.annotation(name)) if name else ():
            reference, target = row.name("reference_image_name"), row.name("target_image_name")
            threshold, scores = row.get("threshold"), row.record("confidence_scores").fields
            for value in (threshold, *scores.values()):
                if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
                    raise DataError(f"{row.place}: {value!r} is not a threshold or score; expected a number 0..1")
            others = (one for one, score in scores.items() if score >= threshold and one not in (reference, target))
            self._found[reference, target] = (target, *others)
            self._places[reference, target] = row.place

    def of(self, reference: str, target: str, known: dict[str, str]) -> tuple[str, ...]:
        """Return the targets of a query, all of them in the gallery of `known` ids."""
        targets = self._found.get((reference, target), (target,))
        for one in targets:
            if one not in known and one != target:
                raise DataError(f"{self._places[reference, target]}: {one!r} is not in the gallery; check the split")
        self._used += (reference, target) in self._found
        return targets

    @property
    def note(self) -> str:
        """A clause on the targets for the protocol; empty without a file.

        Raises:
            DataError: If the file has no row of the queries.
        """
        if self._found and not self._used:
            raise DataError(f"{self._name}: has no row of these queries; pass the file of the same split and category")
        return f"; several targets of {self._name} for {self._used:,} queries" if self._name else ""


# --- FashionIQ


class _CaptionPair(NamedTuple):
    place: str
    candidate: str
    target: str | None
    captions: tuple[str, str]


def read_fashioniq(
    folder: DatasetFolder,
    split: str,
    *,
    category: str,
    gallery: str,
    captions: str | None,
    spelling: bool,
    targets: str | None,
    prompt: str | None,
    preset: str,
) -> Benchmark:
    """Read one category of FashionIQ, from `captions/` (or `json/`), `image_splits/` and `images/`.

    `captions` is `joined`, one query for each row, by default for the original gallery; or `each`, one for each
    caption, by default for VAL's. Query ids are `category-split-row`, followed by `-0` and `-1` if each caption is a
    query.
    """
    val = gallery == "val"
    each = (captions or ("each" if val else "joined")) == "each"
    if each and prompt is not None:
        raise ConfigError("prompt joins two captions and cannot be used with captions=each; leave it out")
    if val and split == "test":
        raise ConfigError("gallery=val needs the targets, which are not published for split=test; use gallery=original")
    wording = FASHIONIQ.find_prompt(prompt)
    rows, places = _read_caption_pairs(folder, split, category)
    if val:
        places = {name: row.place for row in rows for name in (row.candidate, row.target) if name is not None}
        places = dict(sorted(places.items()))
    items = [GalleryItem(name, _product_image(folder, name, place)) for name, place in places.items()]
    several = _SeveralTargets(folder, targets)
    spelled = _read_spelling(folder, category) if spelling else str
    queries = []
    for number, row in enumerate(rows):
        name = f"{category}-{split}-{number}"
        first, second = map(spelled, row.captions)
        texts: dict[str, Text] = {f"{name}-0": first, f"{name}-1": second}
        if not each:
            texts = {name: wording.text({"c1": first, "c2": second})}
        wanted: tuple[str, ...] = ()
        if row.target is not None:
            refuse_unknown([row.target], places, row.place, "the split file")
            wanted = several.of(row.candidate, row.target, places)
        image = _product_image(folder, row.candidate, row.place)
        exclude = (row.candidate,) if val else ()
        queries += [Query(key, image, text, wanted, exclude) for key, text in texts.items()]
    note = f"gallery={gallery}; {'each caption asks' if each else 'both captions joined'}; FashionIQ {category}"
    note += several.note + ("; spelling corrected" if spelling else "")
    averaged = any(len(query.wordings) > 1 for query in queries)
    name = f"{wording.name}, unit embeddings of both orders averaged" if averaged else wording.name
    protocol = Protocol(
        name=preset,
        metrics=("R@10", "R@50"),
        primary="R@10",
        exclude_reference=val,
        ties="gallery order",
        means=(("R@10", "R@50"),),
        prompt="caption as it stands" if each else name,
        note=f"{note}; the dataset's metric is the mean over {', '.join(CATEGORIES)}",
    )
    return Benchmark(f"fashioniq_{category}", split, "cir", queries, items, protocol)


def _read_caption_pairs(folder: DatasetFolder, split: str, category: str) -> tuple[list[_CaptionPair], dict[str, str]]:
    """Return the rows, and the place of each image of the split file."""
    captions = f"cap.{category}.{split}.json"
    records = read_records(folder.annotation(f"captions/{captions}", f"json/{captions}"))
    file = folder.annotation(f"image_splits/split.{category}.{split}.json")
    places: dict[str, str] = {}
    for row, value in enumerate(read_list(file)):
        place = f"{file}, row {row}"
        refuse_repeated(_product_id(value, "entry", place), place, places)
    return [_caption_pair(record, split == "test") for record in records], places


def _caption_pair(record: Record, hidden: bool) -> _CaptionPair:
    captions = record.get("captions")
    if not isinstance(captions, list) or len(captions) != 2:
        raise DataError(f"{record.place}: captions must be a list of two texts; download the file again")
    first, second = (check_text(caption, "captions", record.place) for caption in captions)
    candidate = _product_id(record.get("candidate"), "candidate", record.place)
    target = None if hidden else _product_id(record.get("target"), "target", record.place)
    if candidate == target:
        raise DataError(f"{record.place}: the candidate is its own target, {target!r}; download the file again")
    return _CaptionPair(record.place, candidate, target, (first, second))


def _product_id(value: object, name: str, place: str) -> str:
    number = check_name(value, name, place)
    if "/" in number or "\\" in number:
        raise DataError(f"{place}: {name} is {number!r}, a path; expected the number of a product")
    return number


def _product_image(folder: DatasetFolder, name: str, place: str) -> Path:
    return folder.image(place, f"images/{name}.png", f"images/{name}.jpg", f"images/{name}.jpeg")


# --- CIRR


def read_cirr(folder: DatasetFolder, split: str, *, targets: str | None, prompt: str | None, preset: str) -> Benchmark:
    """Read one split of CIRR; query ids are the pairids, and a subset has the five members beside the reference."""
    wording = CIRR.find_prompt(prompt)
    records = read_records(folder.annotation(f"cirr/captions/cap.rc2.{split}.json"))
    file = folder.annotation(f"cirr/image_splits/split.rc2.{split}.json")
    listed = check_record(read_json(file), str(file))
    names = [check_name(name, "a name", f"{file}, {reprlib.repr(name)}") for name in listed.fields]
    paths = {name: check_path(listed.fields[name], name, f"{file}, {name!r}") for name in names}
    if not paths:
        raise DataError(f"{file}: names no image; download the file again")
    gallery = [GalleryItem(name, _cirr_image(folder, f"{file}, {name!r}", path)) for name, path in paths.items()]
    several = _SeveralTargets(folder, targets)
    seen: dict[str, str] = {}
    queries = []
    for record in records:
        refuse_repeated(record.name("pairid"), record.place, seen)
        queries.append(_cirr_query(record, split, folder, paths, wording.text, several))
    protocol = Protocol(
        name=preset,
        metrics=("R@1", "R@2", "R@5", "R@10", "R@50", "Rs@1", "Rs@2", "Rs@3"),
        primary="R@5",
        exclude_reference=True,
        ties="gallery order",
        means=(("R@5", "Rs@1"),),
        prompt=wording.name,
        note=f"CIRR {split}; the reference is out of every ranking; subsets of five beside the reference{several.note}",
    )
    return Benchmark("cirr", split, "cir", queries, gallery, protocol)


def _cirr_query(
    record: Record, split: str, folder: DatasetFolder, paths: dict[str, str], text: Template, several: _SeveralTargets
) -> Query:
    reference = record.name("reference")
    target = () if split == "test1" else (record.name("target_hard"),)
    members = record.record("img_set").names("members")
    refuse_unknown((reference, *target, *members), paths, record.place, "the split file")
    if reference in target:
        raise DataError(f"{record.place}: the reference is its own target, {reference!r}; download the file again")
    if not {reference, *target} <= set(members):
        raise DataError(f"{record.place}: img_set.members lacks the reference or the target; download the file again")
    return Query(
        id=record.name("pairid"),
        image=_cirr_image(folder, record.place, paths[reference]),
        text=text({"caption": record.text("caption")}),
        targets=tuple(name for one in target for name in several.of(reference, one, paths)),
        exclude=(reference,),
        subset=tuple(name for name in members if name != reference),
    )


def _cirr_image(folder: DatasetFolder, place: str, path: str) -> Path:
    """Find an image; NLVR2's download has `train/NAME.png` if the split file says `train/34/NAME.png`."""
    parts = path.split("/")
    return folder.image(place, path, *([f"{parts[0]}/{parts[-1]}"] if len(parts) > 2 else []))


# --- CIRCO


def read_circo(folder: DatasetFolder, split: str, *, prompt: str | None, preset: str) -> Benchmark:
    """Read one split of CIRCO; query ids are `0`, `1`, ..., and tags are the semantic aspects.

    The default prompt uses `shared_concept`, which zero-shot baselines do not see. The preset `union_reference`
    excludes the reference from the ranking, as its authors do.
    """
    wording = CIRCO.find_prompt(prompt)
    records = read_records(folder.annotation(f"annotations/{split}.json"))
    paths = _coco_paths(folder)
    gallery = [GalleryItem(name, folder.image(place, path)) for name, (place, path) in paths.items()]
    exclude = preset == "union_reference"
    queries = []
    for row, record in enumerate(records):
        if record.integer("id") != row:
            raise DataError(f"{record.place}: id is {record.integer('id')} (expected {row}); rows are missing")
        queries.append(_circo_query(record, split, folder, paths, wording.text, exclude))
    ks = (5, 10, 25, 50)
    fields = [{"shared_concept": concept, "relative_caption": ""} for concept in ("a", "b")]
    uses_concept = wording.text(fields[0]) != wording.text(fields[1])
    hint = "; the texts use shared_concept, which zero-shot baselines do not see"
    protocol = Protocol(
        name=preset,
        metrics=(*(f"mAP@{k}" for k in ks), *(f"R@{k}" for k in ks)),
        primary="mAP@10",
        exclude_reference=exclude,
        ties="gallery order",
        recall_targets="first",
        prompt=wording.name,
        note=f"CIRCO {split}; recall counts the single target alone" + (hint if uses_concept else ""),
    )
    return Benchmark("circo", split, "cir", queries, gallery, protocol)


def _coco_paths(folder: DatasetFolder) -> dict[str, tuple[str, str]]:
    """Return the place and the path of each image by its id."""
    file = folder.annotation(f"{_COCO_UNLABELED}/annotations/image_info_unlabeled2017.json")
    paths: dict[str, tuple[str, str]] = {}
    seen: dict[str, str] = {}
    for image in check_record(read_json(file), str(file)).records("images"):
        name = str(image.integer("id"))
        refuse_repeated(name, image.place, seen)
        path = check_path(image.get("file_name"), "file_name", image.place)
        paths[name] = (image.place, f"{_COCO_UNLABELED}/unlabeled2017/{path}")
    return paths


def _circo_query(
    record: Record, split: str, folder: DatasetFolder, paths: dict[str, tuple[str, str]], text: Template, exclude: bool
) -> Query:
    reference = str(record.integer("reference_img_id"))
    targets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    if split == "val":
        single = str(record.integer("target_img_id"))
        targets = tuple(str(number) for number in record.integers("gt_img_ids"))
        if single not in targets or reference in targets:
            raise DataError(f"{record.place}: gt_img_ids lacks target_img_id or has the reference; download it again")
        targets = (single, *(name for name in targets if name != single))
        aspects = record.get("semantic_aspects")
        if not isinstance(aspects, list) or any(aspect not in _CIRCO_ASPECTS for aspect in aspects):
            raise DataError(f"{record.place}: semantic_aspects must be a list of {', '.join(_CIRCO_ASPECTS)}")
        tags = tuple(aspects)
    refuse_unknown((reference, *targets), paths, record.place, "image_info_unlabeled2017.json")
    fields = {key: record.text(key) for key in ("shared_concept", "relative_caption")}
    image = folder.image(*paths[reference])
    excluded = (reference,) if exclude else ()
    return Query(str(record.integer("id")), image, text(fields), targets, excluded, tags=tags)


# --- GeneCIS


def read_genecis(folder: DatasetFolder, split: str, *, task: str, prompt: str | None, preset: str) -> Benchmark:
    """Read one task of GeneCIS; images are in `val2017/` (object tasks) or `VG_100K/` (attribute tasks).

    The gallery has each candidate of any query once. A query's `subset` names its own candidates, the target first, in
    the order of the file. One official row names its target twice; so does its subset.
    """
    wording = GENECIS.find_prompt(prompt)
    gallery: dict[str, GalleryItem] = {}
    queries = []
    for row, record in enumerate(read_records(folder.annotation(f"genecis/{task}.json", f"{task}.json"))):
        _, image = _candidate(record.record("reference"), folder, task)
        candidates = [_candidate(item, folder, task) for item in (record.record("target"), *record.records("gallery"))]
        for name, candidate in candidates:
            gallery.setdefault(name, GalleryItem(name, candidate))
        names = tuple(name for name, _ in candidates)
        text = wording.text({"condition": record.name("condition")})
        queries.append(Query(f"{task}-{row}", image, text, names[:1], subset=names))
    protocol = Protocol(
        name=preset,
        metrics=("R@1", "R@2", "R@3"),
        primary="R@1",
        ties="pessimistic",
        candidates="subset",
        prompt=wording.name,
        note=f"GeneCIS {task}; each query ranks its own candidates; the headline is the mean R@1 over the four tasks",
    )
    return Benchmark(f"genecis_{task}", split, "cir", queries, list(gallery.values()), protocol)


def _candidate(record: Record, folder: DatasetFolder, task: str) -> tuple[str, ImageSource]:
    if task.endswith("object"):
        number = record.integer("val_image_id")
        return str(number), folder.image(record.place, *(f"{name}/{number:012d}.jpg" for name in _COCO_VAL))
    number, box = record.integer("image_id"), record.box("instance_bbox")
    path = folder.image(record.place, *(f"{name}/{number}.jpg" for name in GENOME))
    return f"{number}:{','.join(map(str, box))}", Crop(path, box)


# --- DTIN


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
    """Read one target domain; its gallery is that of all domains and includes the queries' own photos.

    Paths of images may or may not begin with the lists' own first folder, `imgnet/`. The preset `union_reference`
    measures average precision by trapezoids over the hits in the top k and, by default, recall of any target.
    """
    reference = preset == "union_reference"
    mode = recall_mode or ("any" if reference else "fraction")
    wording = DTIN.find_prompt(prompt)
    text = wording.text({"domain": domain})

    photos = read_labeled_paths(folder.annotation("imgnet/imgnet_real_query.txt", "imgnet_real_query.txt"))
    listed = read_labeled_paths(folder.annotation("imgnet/imgnet_targets.txt", "imgnet_targets.txt"))
    for row in listed:
        if row.label // 1000 not in (*range(len(DOMAINS)), _REAL_DOMAIN):
            raise DataError(f"{row.place}: label {row.label} has no known domain; expected class + 1000 * domain")
    gallery = [GalleryItem(x.path, folder.listed_image(x.place, x.path), str(x.label % 1000)) for x in listed]
    wanted = 1000 * DOMAINS.index(domain)
    groups = group_by(listed, lambda row: row.label - wanted)
    targets = {label: tuple(row.path for row in rows) for label, rows in groups.items() if 0 <= label < 1000}
    for row in photos:
        if row.label >= 1000:
            raise DataError(f"{row.place}: label {row.label} is not the class of a query; expected a number below 1000")
    queries = [
        Query(
            row.path, folder.listed_image(row.place, row.path), text, targets.get(row.label, ()), label=str(row.label)
        )
        for row in photos
        if not only_with_gt or row.label in targets
    ]
    unanswered = "left out" if only_with_gt else "counted as 0"
    protocol = Protocol(
        name=preset,
        metrics=(*(f"R@{k}" for k in _DTIN_KS), *(f"P@{k}" for k in _DTIN_KS), "mAP"),
        primary="R@10",
        ap_norm="hits" if reference else "min",
        ap_rule="trapezoid" if reference else "step",
        ties="gallery order",
        recall="any" if mode == "any" else "fraction",
        unanswered="omit" if only_with_gt else "zero",
        prompt=wording.name,
        note=f"DTIN {domain}; queries without an answer {unanswered}; the query's own photo is a distractor",
    )
    return Benchmark(f"dtin_{domain}", split, "cir", queries, gallery, protocol)


# --- LaSCo and LlavaSCo


def read_lasco(folder: DatasetFolder, split: str, *, prompt: str | None, preset: str) -> Benchmark:
    """Read one split of LaSCo; the gallery of `val` is the corpus file, that of `train` the images of its rows."""
    wording = LASCO.find_prompt(prompt)
    records = read_records(folder.annotation(f"lasco_{split}.json"))
    corpus = _corpus(folder) if split == "val" else None
    seen: set[str] = set()
    rows = []
    for row, record in enumerate(records):
        qid = record.name("qid")
        name = f"{qid}-{row}" if qid in seen else qid  # not documented to be unique
        seen.add(name)
        images = record.id_and_path("query-image"), record.id_and_path("target-image")
        rows.append(_CocoRow(record.place, name, *images, wording.text({"query_text": record.text("query-text")})))
    note = f"LaSCo {split}, gallery={'corpus' if split == 'val' else 'the images its rows name'}; reference kept"
    return _coco_benchmark("lasco", split, folder, rows, corpus, (preset, wording.name, note))


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

    Query ids are the row's numbers in the file, before the stride. The gallery `named` are the images that the used
    rows name; `corpus`, for `val`, is that of LaSCo. The preset `union_reference` validates with the target's caption
    in the text, as its authors do. Such a metric does not measure retrieval; the note says so.
    """
    authors = preset == "union_reference"
    wording = LLAVASCO.find_prompt(_llavasco_prompt(prompt, authors, split))
    if authors:  # the authors' loader takes [:350000:70]
        stride, limit = stride or 70, limit or 350_000
    stride = stride or 1
    if gallery == "corpus" and split != "val":
        raise ConfigError("gallery=corpus has validation images; use gallery=named for split=train")
    corpus = _corpus(folder) if gallery == "corpus" else None
    records = read_records(folder.annotation(f"{split}_llavasco.json"), concatenated=True)
    rows = []
    for row, record in enumerate(records):  # all of them, whatever the stride, so that a broken file is found at once
        numbers = record.integer("reference_image_id"), record.integer("target_image_id")
        reference, target = ((number, f"{split}2014/COCO_{split}2014_{number:012d}.jpg") for number in numbers)
        texts = {key: record.text(key) for key in _LLAVASCO_TEXTS}
        rows.append(_CocoRow(record.place, str(row), reference, target, wording.text(texts)))
    note = f"LlavaSCo {split}, gallery={gallery}, stride={stride}, limit={limit}; reference kept"
    if wording.name == LEAKING_PROMPT:
        note += "; LEAK: the text holds the target's own caption, as the authors' loader adds it"
    used = rows[:limit:stride]
    return _coco_benchmark("llavasco", split, folder, used, corpus, (preset, wording.name, note))


def _llavasco_prompt(prompt: str | None, reference: bool, split: str) -> str | None:
    """Keep the target's caption out of validation, but for the authors' own protocol."""
    if prompt is None and reference and split == "val":
        return LEAKING_PROMPT
    if prompt == LEAKING_PROMPT and split == "val" and not reference:
        raise ConfigError(f"prompt {prompt!r} contains the target's caption; use another, or use it for training only")
    return prompt


class _CocoRow(NamedTuple):
    place: str
    id: str
    reference: tuple[int, str]
    target: tuple[int, str]
    text: Text


def _coco_benchmark(
    name: str,
    split: str,
    folder: DatasetFolder,
    rows: Sequence[_CocoRow],
    corpus: dict[str, GalleryItem] | None,
    described: tuple[str, str, str],
) -> Benchmark:
    """Return a benchmark whose gallery is the corpus, or the images of the rows; `described`: preset, prompt, note."""
    gallery = {} if corpus is None else corpus
    queries = []
    for row in rows:
        for number, path in (row.reference, row.target) if corpus is None else ():
            gallery.setdefault(str(number), GalleryItem(str(number), _coco_image(folder, row.place, path)))
        target = str(row.target[0])
        refuse_unknown([target], gallery, row.place, "the corpus")
        queries.append(Query(row.id, _coco_image(folder, row.place, row.reference[1]), row.text, (target,)))
    preset, prompt, note = described
    metrics = tuple(f"R@{k}" for k in _LASCO_KS)
    protocol = Protocol(preset, metrics, "R@10", ties="gallery order", prompt=prompt, note=note)
    return Benchmark(name, split, "cir", queries, list(gallery.values()), protocol)


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


def _coco_image(folder: DatasetFolder, place: str, path: str) -> Path:
    """Find a COCO image; the corpus file has an extra `val/` before the folder that the rows lack."""
    plain = path.removeprefix("val/").removeprefix("train/")
    return folder.image(place, plain, f"{plain.partition('2014/')[0]}/{plain}", f"coco/{plain}")
