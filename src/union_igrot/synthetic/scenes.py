"""Scenes of the generated world, their captions, and edits in words.

A scene is one or two things on a background; an edit is a modification text and the scenes that satisfy it.
Everything is drawn from a seeded `random.Random`, whose stream is the same on every machine.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product

SEEN_SHAPES = (
    "circle", "square", "triangle", "star", "heart", "cross", "arrow",
    "crescent", "diamond", "drop", "flower", "house", "fish", "tree",
)  # fmt: skip
"""Shapes whose sketches are used in training."""
HELD_OUT_SHAPES = ("bolt", "hourglass", "gear", "boat", "mushroom", "bottle")
"""Shapes without sketches in pretraining and training; photos of them have captions."""
SHAPES = SEEN_SHAPES + HELD_OUT_SHAPES
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white", "black")
SIZES = ("small", "medium", "large")
FILLS = ("plain", "striped", "dotted", "checked")
BACKGROUNDS = ("grass", "sand", "sea", "sky", "bricks", "wood", "snow", "night")
POSITIONS = ("left", "right", "top", "bottom", "middle")
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
EDIT_KINDS = ("colour", "shape", "size", "fill", "background", "add", "remove", "move")
SPLIT_BUCKETS: dict[str, range] = {"train": range(70), "val": range(70, 80), "test": range(80, 100)}

_WHERE = {
    "left": "on the left", "right": "on the right", "top": "at the top",
    "bottom": "at the bottom", "middle": "in the middle",
}  # fmt: skip


def with_article(words: str) -> str:
    """Put `a` or `an` before a phrase."""
    return f"{'an' if words[0] in 'aeio' or words.startswith('hour') else 'a'} {words}"


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of a scene."""

    shape: str
    color: str
    size: str
    fill: str
    position: str

    def words(self, forget: Callable[[], bool] = lambda: False) -> str:
        """Describe the thing, without the attributes for which `forget` returns True."""
        fill = "" if self.fill == "plain" else self.fill
        parts = [word for word in (self.size, self.color, fill) if word and not forget()]
        return " ".join([*parts, self.shape])


@dataclass(frozen=True)
class Scene:
    """A background with one thing, or two of different shapes at opposite positions."""

    background: str
    things: tuple[Thing, ...]

    @cached_property
    def code(self) -> str:
        """Identity of the content, independent of the order of the things."""
        things = sorted(f"{t.shape}.{t.color}.{t.size}.{t.fill}.{t.position}" for t in self.things)
        return "|".join([self.background, *things])

    @cached_property
    def split(self) -> str:
        """The only split in which this scene may appear, by a hash of its content."""
        bucket = int.from_bytes(hashlib.sha256(self.code.encode()).digest()[:4], "big") % 100
        return next(name for name, buckets in SPLIT_BUCKETS.items() if bucket in buckets)


@dataclass(frozen=True)
class Edit:
    """A modification text and all scenes that satisfy it; several if the text leaves something open.

    `kinds` are one or two of `EDIT_KINDS`.
    """

    kinds: tuple[str, ...]
    text: str
    targets: tuple[Scene, ...]


def pick(rng: random.Random, options: Sequence[str], exclude: str | None = None) -> str:
    """Draw one option other than `exclude`."""
    left = options if exclude is None else [option for option in options if option != exclude]
    return left[int(rng.random() * len(left))]


def random_thing(rng: random.Random, shape: str | None = None, position: str | None = None) -> Thing:
    """Draw a thing; also its shape and position if they are None."""
    return Thing(
        shape or pick(rng, SHAPES),
        pick(rng, COLORS),
        pick(rng, SIZES),
        pick(rng, FILLS),
        position or pick(rng, POSITIONS),
    )


def random_scene(rng: random.Random, split: str, things: int | None = None, shape: str | None = None) -> Scene:
    """Draw a scene of a split; also the number of things and the shape of the first one if they are None."""
    while True:
        count = things or 1 + int(rng.random() * 2)
        first = random_thing(rng, shape, pick(rng, POSITIONS, exclude="middle") if count == 2 else None)
        group = [first]
        if count == 2:
            group.append(random_thing(rng, pick(rng, SHAPES, exclude=first.shape), OPPOSITE[first.position]))
        scene = Scene(pick(rng, BACKGROUNDS), tuple(group))
        if scene.split == split:
            return scene


def caption(rng: random.Random, scene: Scene, forget: float = 0.0) -> str:
    """Describe a scene in a sentence; each detail is left out with probability `forget`."""

    def forgotten() -> bool:
        return rng.random() < forget

    things = list(scene.things)
    if rng.random() < 0.5:
        things.reverse()
    parts = [with_article(t.words(forgotten)) + ("" if forgotten() else f" {_WHERE[t.position]}") for t in things]
    ground = "" if forgotten() else f" {pick(rng, ('on', 'over', 'in front of'))} {scene.background}"
    return f"{pick(rng, ('', '', 'a photo of ', 'a picture with '))}{' and '.join(parts)}{ground}"


def _replaced(scene: Scene, thing: Thing, new: Thing) -> Scene:
    return replace(scene, things=tuple(new if t == thing else t for t in scene.things))


_ATTRIBUTES = {
    "colour": ("color", COLORS, ("make the {0} {1}", "change the {0} to {1}", "the {0} is {1}")),
    "fill": ("fill", FILLS, ("make the {0} {1}", "the {0} should be {1}")),
    "shape": ("shape", SHAPES, ("replace the {0} with {2}", "turn the {0} into {2}", "{2} instead of the {0}")),
}
"""Attribute, values and texts by kind of edit; the texts take the shape, the value, and the value with its article."""


def _edit_attribute(rng: random.Random, scene: Scene, kind: str) -> Edit | None:
    attribute, values, texts = _ATTRIBUTES[kind]
    thing = scene.things[int(rng.random() * len(scene.things))]
    value = pick(rng, values, exclude=getattr(thing, attribute))
    if kind == "shape" and any(t.shape == value for t in scene.things):
        return None
    text = pick(rng, texts).format(thing.shape, value, with_article(value))
    return Edit((kind,), text, (_replaced(scene, thing, replace(thing, **{attribute: value})),))


def _edit_size(rng: random.Random, scene: Scene) -> Edit:
    thing = scene.things[int(rng.random() * len(scene.things))]
    at = SIZES.index(thing.size)
    value = pick(rng, SIZES, exclude=thing.size)
    sizes: tuple[str, ...] = (value,)
    if rng.random() < 0.5:
        text = f"make the {thing.shape} {value}"
    elif SIZES.index(value) > at:
        text, sizes = f"make the {thing.shape} bigger", SIZES[at + 1 :]
    else:
        text, sizes = f"make the {thing.shape} smaller", SIZES[:at]
    return Edit(("size",), text, tuple(_replaced(scene, thing, replace(thing, size=size)) for size in sizes))


def _edit_background(rng: random.Random, scene: Scene) -> Edit:
    value = pick(rng, BACKGROUNDS, exclude=scene.background)
    text = pick(rng, (f"change the background to {value}", f"put it on {value}", f"with {value} behind"))
    return Edit(("background",), text, (replace(scene, background=value),))


def _edit_add(rng: random.Random, scene: Scene) -> Edit | None:
    if len(scene.things) == 2 or scene.things[0].position == "middle":
        return None
    first = scene.things[0]
    new = random_thing(rng, pick(rng, SHAPES, exclude=first.shape), OPPOSITE[first.position])
    sizes, size = ((new.size,), f"{new.size} ") if rng.random() < 0.5 else (SIZES, "")
    # The text never names the fill, so every fill satisfies it.
    targets = tuple(replace(scene, things=(first, replace(new, size=s, fill=f))) for s, f in product(sizes, FILLS))
    return Edit(("add",), f"add {with_article(f'{size}{new.color} {new.shape}')} {_WHERE[new.position]}", targets)


def _edit_remove(rng: random.Random, scene: Scene) -> Edit | None:
    if len(scene.things) == 1:
        return None
    gone = int(rng.random() * 2)
    name = scene.things[gone].shape
    text = pick(rng, (f"remove the {name}", f"without the {name}", f"take the {name} away"))
    return Edit(("remove",), text, (replace(scene, things=(scene.things[1 - gone],)),))


def _edit_move(rng: random.Random, scene: Scene) -> Edit:
    if len(scene.things) == 2:
        one, two = scene.things
        moved = (replace(one, position=two.position), replace(two, position=one.position))
        return Edit(("move",), f"swap the {one.shape} and the {two.shape}", (replace(scene, things=moved),))
    thing = scene.things[0]
    position = pick(rng, POSITIONS, exclude=thing.position)
    text = pick(rng, (f"move the {thing.shape} to the {position}", f"the {thing.shape} is {_WHERE[position]}"))
    return Edit(("move",), text, (_replaced(scene, thing, replace(thing, position=position)),))


_EDITORS: dict[str, Callable[[random.Random, Scene], Edit | None]] = {
    **{kind: partial(_edit_attribute, kind=kind) for kind in _ATTRIBUTES},
    "size": _edit_size,
    "background": _edit_background,
    "add": _edit_add,
    "remove": _edit_remove,
    "move": _edit_move,
}


def random_edit(rng: random.Random, scene: Scene, kind: str | None = None) -> Edit | None:
    """Draw a single edit of a scene, of the given kind or any; None if the kind does not apply."""
    return _EDITORS[kind or pick(rng, EDIT_KINDS)](rng, scene)


def double_edit(rng: random.Random, scene: Scene) -> Edit | None:
    """Draw two edits of different kinds in one text; None if the draw does not apply."""
    first = random_edit(rng, scene)
    if first is None:
        return None
    second_kind = pick(rng, ("colour", "size", "fill", "background"), exclude=first.kinds[0])
    targets: list[Scene] = []
    text = ""
    state = rng.getstate()
    for scene_after in first.targets:
        rng.setstate(state)  # the same second change for each target of the first
        second = random_edit(rng, scene_after, second_kind)
        if second is None or (text and second.text != text):
            return None
        text = second.text
        targets.extend(second.targets)
    kept = tuple({target.code: target for target in targets if target.code != scene.code}.values())
    return Edit((*first.kinds, second_kind), f"{first.text} and {text}", kept) if kept else None


def edit_scene(rng: random.Random, scene: Scene, double: float = 0.25) -> Edit:
    """Draw an edit with at least one target in the scene's own split; `double` of them change two things at once.

    Targets of other splits are left out; they never appear in this split's images.
    """
    while True:
        edit = double_edit(rng, scene) if rng.random() < double else random_edit(rng, scene)
        if edit is None:
            continue
        targets = tuple(target for target in edit.targets if target.split == scene.split)
        if targets:
            return replace(edit, targets=targets)
