"""Benchmarks and training samples of the generated world: `shapes_cir`, `shapes_sbir` and `shapes_training`.

Everything follows from a seed. Scenes are split by a hash of their content, so that no training scene occurs in
validation or test.
"""

import random
from dataclasses import dataclass, replace
from typing import Literal

from PIL import Image

from union_igrot.errors import DataError
from union_igrot.synthetic.rendering import render_photo, render_sketch
from union_igrot.synthetic.scenes import (
    HELD_OUT_SHAPES,
    SEEN_SHAPES,
    SHAPES,
    SPLIT_BUCKETS,
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
    ties="gallery order",
    note="generated world; every gallery image whose scene satisfies the text is a target; subsets of six as in CIRR",
)
SBIR_PROTOCOL = Protocol(
    metrics=("mAP", "mAP@200", "P@100", "P@200", "R@1", "R@10"),
    primary="mAP",
    ties="gallery order",
    classes="all",
    note="generated world; photos of the sketch's shape are targets; six of twenty shapes never sketched in training",
)


@dataclass(frozen=True, slots=True)
class ShapesImage:
    """An image of the generated world, rendered when it is opened, as a photo or a sketch."""

    scene: Scene
    seed: int
    style: Literal["photo", "sketch"] = "photo"

    @property
    def key(self) -> str:
        """Identity from version of the rendering, style, seed, content and the object drawn first."""
        return f"shapes-1/{self.style}/{self.seed}/{self.scene.code}/{self.scene.things[0].shape}"

    def open(self) -> Image.Image:
        """Render it, 48 x 48, RGB."""
        return render_photo(self.scene, self.seed) if self.style == "photo" else render_sketch(self.scene, self.seed)


def _check(split: str, **counts: int) -> None:
    if split not in SPLIT_BUCKETS:
        raise DataError(f"invalid split of shapes: {split!r} (expected {', '.join(SPLIT_BUCKETS)})")
    for name, count in counts.items():
        if count < 1:
            raise DataError(f"invalid value for {name}: {count} (expected an integer >= 1)")


class _GalleryBuilder:
    """Gallery items in the order they are added, and their ids by scene."""

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

    def ids_of(self, scenes: tuple[Scene, ...]) -> list[str]:
        return [name for scene in scenes for name in self._by_code.get(scene.code, [])]


def _hard_negative(rng: random.Random, reference: Scene, edit: Edit, *, keep_edit: bool) -> Scene | None:
    """Return the reference with a wrong edit, or with `keep_edit` a target with another change."""
    correct = {target.code for target in edit.targets}
    for _ in range(40):
        start = edit.targets[0] if keep_edit else reference
        kind = pick(rng, ("colour", "size", "fill", "background")) if keep_edit else edit.kinds[0]
        other = random_edit(rng, start, kind)
        if other is None:
            continue
        wrong = other.targets[0]
        if wrong.split == reference.split and wrong.code not in correct and wrong.code != reference.code:
            return wrong
    return None


def _subset(rng: random.Random, targets: tuple[str, ...], others: list[str], everything: list[str]) -> tuple[str, ...]:
    """Return six images: one target, some others (reference and hard negatives), and further ones drawn at random."""
    subset = [others[0], targets[0], *others[1:]]
    taken = {*subset, *targets}
    if len(everything) - len(taken) < 6 - len(subset):
        raise DataError(f"a gallery of {len(everything)} is too small for subsets of six; add at least 4 distractors")
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

    Each reference scene has `edits` queries. The gallery holds the references (excluded from their own rankings), one
    to three targets of each query, the reference scene rendered again, hard negatives (a wrong edit, or a further
    change) and random scenes.

    Args:
        split: `train`, `val` or `test`; no scene is in two splits.
        queries: Number of queries.
        seed: Seed of the whole benchmark.
        edits: Queries that share one reference image.
        distractors: Random scenes added to the gallery.

    Returns:
        A benchmark whose queries have targets, exclusions, and subsets of six images as in CIRR, which include the
        reference and a target.

    Raises:
        DataError: If an argument is invalid or the gallery is too small for subsets of six.
    """
    _check(split, queries=queries, edits=edits)
    if distractors < 0:
        raise DataError(f"invalid value for distractors: {distractors} (expected an integer >= 0)")
    rng = random.Random(f"shapes_cir {split} {seed}")
    gallery = _GalleryBuilder(rng)
    drafts: list[tuple[Query, Edit, list[str]]] = []  # without targets and subset: the gallery is not complete
    while len(drafts) < queries:
        scene = random_scene(rng, split)
        reference = gallery.add(scene)
        source = gallery.items[-1].image
        assert isinstance(source, ShapesImage)
        redrawn = gallery.add(scene)
        for _ in range(min(edits, queries - len(drafts))):
            edit = edit_scene(rng, scene)
            others = [reference, redrawn]
            for keep_edit in (True, False):
                wrong = _hard_negative(rng, scene, edit, keep_edit=keep_edit)
                others += [] if wrong is None else [gallery.add(wrong)]
            for copy in range(1 + int(rng.random() * 3)):
                gallery.add(edit.targets[copy % len(edit.targets)])
            tags = edit.kinds if len(edit.kinds) == 1 else ("two changes",)
            query = Query(f"query-{len(drafts):05d}", source, edit.text, exclude=(reference,), tags=tags)
            drafts.append((query, edit, others))
    for _ in range(distractors):
        gallery.add(random_scene(rng, split))
    everything = [item.id for item in gallery.items]
    done = []
    for query, edit, others in drafts:
        targets = tuple(gallery.ids_of(edit.targets))
        done.append(replace(query, targets=targets, subset=_subset(rng, targets, others, everything)))
    return Benchmark("shapes_cir", split, "cir", tuple(done), tuple(gallery.items), CIR_PROTOCOL)


def shapes_sbir(split: str = "test", queries: int = 2000, seed: int = 0, gallery: int = 2000) -> Benchmark:
    """Make a sketch-based benchmark of the generated world.

    Queries are sketches of one thing and the gallery photos of one thing, both balanced over the shapes: all twenty
    in `test`, the fourteen seen ones in `val` and `train`, so that no choice depends on the held-out shapes. Each
    query is tagged `seen` or `held-out`.

    Args:
        split: `train`, `val` or `test`.
        queries: Number of sketches.
        seed: Seed of the whole benchmark.
        gallery: Number of photos.

    Raises:
        DataError: If an argument is invalid or the gallery is smaller than the number of shapes.
    """
    shapes = SHAPES if split == "test" else SEEN_SHAPES
    _check(split, queries=queries)
    if gallery < len(shapes):
        raise DataError(f"invalid value for gallery: {gallery} (expected an integer >= {len(shapes)})")
    rng = random.Random(f"shapes_sbir {split} {seed}")
    items = _GalleryBuilder(rng)
    by_shape: dict[str, list[str]] = {shape: [] for shape in shapes}
    for number in range(gallery):
        shape = shapes[number % len(shapes)]
        by_shape[shape].append(items.add(random_scene(rng, split, 1, shape), shape))
    targets = {shape: tuple(names) for shape, names in by_shape.items()}
    done = []
    for number in range(queries):
        shape = shapes[number % len(shapes)]
        sketch = ShapesImage(random_scene(rng, split, 1, shape), rng.getrandbits(40), "sketch")
        tag = "held-out" if shape in HELD_OUT_SHAPES else "seen"
        done.append(Query(f"sketch-{number:05d}", sketch, targets=targets[shape], label=shape, tags=(tag,)))
    return Benchmark("shapes_sbir", split, "sbir", tuple(done), tuple(items.items), SBIR_PROTOCOL)


def shapes_training(triplets: int = 5000, pairs: int = 2500, seed: int = 0) -> TrainingSet:
    """Draw training samples of both tasks from the training scenes.

    Args:
        triplets: Number of composed samples: a photo, a modification text and a photo that satisfies it.
        pairs: Number of sketch samples: a sketch of a seen shape and a photo of the same shape.
        seed: Seed of the samples.

    Returns:
        The samples; targets share a group if they show the same scene (composed) or shape (sketches).

    Raises:
        DataError: If both numbers are zero or one is negative.
    """
    if min(triplets, pairs) < 0 or triplets + pairs == 0:
        raise DataError(f"cannot train on {triplets} triplets and {pairs} pairs (expected at least one sample)")
    rng = random.Random(f"shapes training {seed}")
    samples = []
    for _ in range(triplets):
        scene = random_scene(rng, "train")
        edit = edit_scene(rng, scene)
        chosen = edit.targets[int(rng.random() * len(edit.targets))]
        reference, target = (ShapesImage(s, rng.getrandbits(40)) for s in (scene, chosen))
        samples.append(Triplet(reference, edit.text, target, chosen.code, "cir", scene.code))
    for _ in range(pairs):
        shape = pick(rng, SEEN_SHAPES)
        drawn, shown = (random_scene(rng, "train", 1, shape) for _ in range(2))
        sketch = ShapesImage(drawn, rng.getrandbits(40), "sketch")
        samples.append(Triplet(sketch, None, ShapesImage(shown, rng.getrandbits(40)), shape, "sbir"))
    return TrainingSet("shapes", tuple(samples), classes=SEEN_SHAPES)
