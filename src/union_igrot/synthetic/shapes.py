"""The generated world as benchmarks: `shapes_cir` and `shapes_sbir`, and triplets to train on.

Everything follows from a seed; scenes are split by a hash of their content, so that none
of training recurs in validation or test. Does not know models or how metrics are computed.
"""

import random
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from union_igrot.errors import DataError
from union_igrot.synthetic.rendering import render_photo, render_sketch
from union_igrot.synthetic.scenes import (
    HELD_OUT_SHAPES,
    SEEN_SHAPES,
    SHAPES,
    SPLITS,
    Edit,
    Scene,
    caption,
    edit_scene,
    pick,
    random_edit,
    random_scene,
)
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query, TrainingSet, Triplet

CIR_PROTOCOL = Protocol(
    metrics=("R@1", "R@5", "R@10", "R@50", "mAP@10", "mAP", "Rs@1", "Rs@2"),
    primary="mAP@10",
    exclude_reference=True,
    note="generated world; every gallery picture whose scene obeys the sentence is a target; subsets of six as in CIRR",
)
SBIR_PROTOCOL = Protocol(
    metrics=("mAP", "mAP@200", "P@100", "P@200", "R@1", "R@10"),
    primary="mAP",
    note="generated world; photos of the sketch's shape are targets; six of twenty shapes never sketched in training",
)


@dataclass(frozen=True, slots=True)
class ShapesImage:
    """An image of the generated world, drawn when it is opened.

    Attributes:
        scene: What it shows.
        seed: Seed of everything a scene leaves open.
        style: `photo` or `sketch`.
    """

    scene: Scene
    seed: int
    style: Literal["photo", "sketch"] = "photo"

    @property
    def key(self) -> str:
        """Its identity, of the version of the drawing code, style, seed, content and which thing is drawn first."""
        return f"shapes-1/{self.style}/{self.seed}/{self.scene.code}/{self.scene.things[0].shape}"

    def open(self) -> Image.Image:
        """Draw it, 48 x 48, RGB."""
        return render_photo(self.scene, self.seed) if self.style == "photo" else render_sketch(self.scene, self.seed)


def _check(split: str, **counts: int) -> None:
    if split not in SPLITS:
        raise DataError(f"shapes: split {split!r} does not exist; choose one of {', '.join(SPLITS)}")
    for name, count in counts.items():
        if count < 1:
            raise DataError(f"shapes: {name} is {count}; give a number of at least 1")


class _Album:
    """The images of a gallery as they are drawn up, found again by their scene."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.items: list[GalleryItem] = []
        self._by_code: dict[str, list[str]] = {}

    def add(self, scene: Scene, label: str | None = None) -> str:
        name = f"photo-{len(self.items):06d}"
        image = ShapesImage(scene, self._rng.getrandbits(40))
        self.items.append(GalleryItem(name, image, label, caption(self._rng, scene)))
        self._by_code.setdefault(scene.code, []).append(name)
        return name

    def showing(self, scenes: tuple[Scene, ...]) -> list[str]:
        return [name for scene in scenes for name in self._by_code.get(scene.code, [])]


def _hard_negative(rng: random.Random, reference: Scene, edit: Edit, *, keep_edit: bool) -> Scene | None:
    """Return the reference edited with a wrong value, or the answer with something else lost."""
    right = {answer.code for answer in edit.answers}
    for _ in range(40):
        start = edit.answers[0] if keep_edit else reference
        kind = pick(rng, ("colour", "size", "fill", "background")) if keep_edit else edit.kinds[0]
        other = random_edit(rng, start, kind)
        if other is None:
            continue
        wrong = other.answers[0]
        if wrong.split == reference.split and wrong.code not in right and wrong.code != reference.code:
            return wrong
    return None


@dataclass
class _Draft:
    """A query before the gallery is complete."""

    reference: str
    edit: Edit
    rivals: list[str]
    image: ShapesImage


def _subset(rng: random.Random, draft: _Draft, targets: tuple[str, ...], everything: list[str]) -> tuple[str, ...]:
    """Return six images: the reference, one target, the rivals, and others that are no targets."""
    subset = [draft.reference, targets[0], *draft.rivals]
    taken = {*subset, *targets}
    if len(everything) - len(taken) < 6 - len(subset):
        raise DataError(
            f"shapes: a gallery of {len(everything)} is too small for subsets of six; give at least 4 more distractors"
        )
    while len(subset) < 6:
        name = pick(rng, everything)
        if name not in taken:
            subset.append(name)
            taken.add(name)
    return tuple(subset)


def shapes_cir(
    split: str = "test", queries: int = 2000, seed: int = 0, edits: int = 2, distractors: int = 500
) -> Benchmark:
    """Make a composed-retrieval benchmark of the generated world.

    Each reference scene gets `edits` queries. The gallery holds the references (excluded
    from their own rankings), one to three images that answer each query, the reference
    scene drawn anew, hard negatives (a wrong value, something else lost) and random scenes.

    Args:
        split: `train`, `val` or `test`; scenes of different splits never coincide.
        queries: Number of queries.
        seed: Seed of the whole benchmark.
        edits: Queries that share one reference image.
        distractors: Random scenes added to the gallery.

    Returns:
        A benchmark whose queries have targets, exclusions, and subsets of six images as in
        CIRR, the reference and a target among them.

    Raises:
        DataError: Where the split does not exist, a number of queries or edits is below 1, one
            of distractors below 0, or the gallery too small for subsets of six.
    """
    _check(split, queries=queries, edits=edits)
    if distractors < 0:
        raise DataError(f"shapes: distractors is {distractors}; give a number of at least 0")
    rng = random.Random(f"shapes_cir {split} {seed}")
    album = _Album(rng)
    drafts: list[_Draft] = []
    while len(drafts) < queries:
        scene = random_scene(rng, split)
        reference = album.add(scene)
        source = album.items[-1].image
        assert isinstance(source, ShapesImage)
        anew = album.add(scene)
        for _ in range(min(edits, queries - len(drafts))):
            edit = edit_scene(rng, scene)
            rivals = [anew]
            for keep_edit in (True, False):
                wrong = _hard_negative(rng, scene, edit, keep_edit=keep_edit)
                rivals += [] if wrong is None else [album.add(wrong)]
            for copy in range(1 + int(rng.random() * 3)):
                album.add(edit.answers[copy % len(edit.answers)])
            drafts.append(_Draft(reference, edit, rivals, source))
    for _ in range(distractors):
        album.add(random_scene(rng, split))
    everything = [item.id for item in album.items]
    done = []
    for number, draft in enumerate(drafts):
        targets = tuple(album.showing(draft.edit.answers))
        kinds = draft.edit.kinds
        done.append(
            Query(
                id=f"query-{number:05d}",
                image=draft.image,
                text=draft.edit.text,
                targets=targets,
                exclude=(draft.reference,),
                subset=_subset(rng, draft, targets, everything),
                tags=kinds if len(kinds) == 1 else ("two changes",),
            )
        )
    return Benchmark("shapes_cir", split, "cir", tuple(done), tuple(album.items), CIR_PROTOCOL)


def shapes_sbir(split: str = "test", queries: int = 2000, seed: int = 0, gallery: int = 2000) -> Benchmark:
    """Make a sketch-based benchmark of the generated world.

    Queries are sketches of one thing, the gallery photos of one thing, both balanced over
    the shapes: all twenty in `test`, the fourteen seen ones in `val` and `train`, so that
    nothing is ever chosen by a look at the held-out shapes. Each query is tagged `seen` or
    `held-out`.

    Args:
        split: `train`, `val` or `test`.
        queries: Number of sketches.
        seed: Seed of the whole benchmark.
        gallery: Number of photos.

    Raises:
        DataError: Where the split does not exist or a number is below 1, or the gallery is
            smaller than the number of shapes.
    """
    shapes = SHAPES if split == "test" else SEEN_SHAPES
    _check(split, queries=queries)
    if gallery < len(shapes):
        raise DataError(f"shapes: a gallery of {gallery} cannot show {len(shapes)} shapes; give at least {len(shapes)}")
    rng = random.Random(f"shapes_sbir {split} {seed}")
    album = _Album(rng)
    by_shape: dict[str, list[str]] = {shape: [] for shape in shapes}
    for number in range(gallery):
        shape = shapes[number % len(shapes)]
        by_shape[shape].append(album.add(random_scene(rng, split, 1, shape), shape))
    targets = {shape: tuple(names) for shape, names in by_shape.items()}
    done = []
    for number in range(queries):
        shape = shapes[number % len(shapes)]
        sketch = ShapesImage(random_scene(rng, split, 1, shape), rng.getrandbits(40), "sketch")
        tag = "held-out" if shape in HELD_OUT_SHAPES else "seen"
        done.append(Query(f"sketch-{number:05d}", sketch, targets=targets[shape], label=shape, tags=(tag,)))
    return Benchmark("shapes_sbir", split, "sbir", tuple(done), tuple(album.items), SBIR_PROTOCOL)


def shapes_training(triplets: int = 5000, pairs: int = 2500, seed: int = 0) -> TrainingSet:
    """Draw training samples of both tasks from the training scenes.

    Args:
        triplets: Composed samples: a photo, a sentence, a photo that obeys it. Each has a
            reference of its own.
        pairs: Sketch samples: a sketch of a seen shape and a photo of the same shape.
        seed: Seed of the samples.

    Returns:
        The samples; two targets are of one group where they show the same scene (composed)
        or the same shape (sketches).

    Raises:
        DataError: Where both numbers are zero or one is negative.
    """
    if min(triplets, pairs) < 0 or triplets + pairs == 0:
        raise DataError(f"shapes: {triplets} triplets and {pairs} pairs cannot be trained on; give at least one sample")
    rng = random.Random(f"shapes training {seed}")
    samples = []
    for _ in range(triplets):
        scene = random_scene(rng, "train")
        edit = edit_scene(rng, scene)
        answer = edit.answers[int(rng.random() * len(edit.answers))]
        reference, target = (ShapesImage(s, rng.getrandbits(40)) for s in (scene, answer))
        samples.append(Triplet(reference, edit.text, target, answer.code, "cir"))
    for _ in range(pairs):
        shape = pick(rng, SEEN_SHAPES)
        drawn, shown = (random_scene(rng, "train", 1, shape) for _ in range(2))
        sketch = ShapesImage(drawn, rng.getrandbits(40), "sketch")
        samples.append(Triplet(sketch, None, ShapesImage(shown, rng.getrandbits(40)), shape, "sbir"))
    return TrainingSet("shapes", tuple(samples), classes=SEEN_SHAPES)
