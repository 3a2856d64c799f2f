"""Scenes, captions and edits against a reader of the sentences that knows nothing of how they are made."""

import random
import re
from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings, strategies as st

from union_igrot.synthetic.scenes import (
    BACKGROUNDS,
    COLORS,
    EDIT_KINDS,
    FILLS,
    OPPOSITE,
    POSITIONS,
    SHAPES,
    SIZES,
    SPLIT_BUCKETS,
    Scene,
    Thing,
    caption,
    double_edit,
    edit_scene,
    random_edit,
    random_scene,
)

SEEDS = st.integers(0, 2**32)
WHERE = {
    "on the left": "left",
    "on the right": "right",
    "at the top": "top",
    "at the bottom": "bottom",
    "in the middle": "middle",
}


def one_of(words):
    return f"({'|'.join(words)})"


SHAPE, COLOR, SIZE, FILL = one_of(SHAPES), one_of(COLORS), one_of(SIZES), one_of(FILLS)
GROUND, PLACE, AT, A = one_of(BACKGROUNDS), one_of(POSITIONS), one_of(WHERE), "an? "


def plain(scene):
    """A scene as a background and a set of (shape, color, size, fill, position)."""
    return scene.background, frozenset((t.shape, t.color, t.size, t.fill, t.position) for t in scene.things)


def named(things, shape):
    (found,) = [t for t in things if t[0] == shape]
    return found


def changed(scene, shape, slot, values):
    """Every scene in which the named thing's slot has one of the values, all else as it was."""
    background, things = scene
    old = named(things, shape)
    return {(background, things - {old} | {(*old[:slot], value, *old[slot + 1 :])}) for value in values}


def added(scene, size, color, shape, at):
    background, things = scene
    sizes = SIZES if size is None else (size.strip(),)
    return {(background, things | {(shape, color, s, f, WHERE[at])}) for s, f in product(sizes, FILLS)}


def without(scene, shape):
    background, things = scene
    return {(background, things - {named(things, shape)})}


def swapped(scene, one, two):
    background, things = scene
    first, second = named(things, one), named(things, two)
    assert things == {first, second}
    return {(background, frozenset({(*first[:4], second[4]), (*second[:4], first[4])}))}


def bigger(scene, shape):
    return changed(scene, shape, 2, SIZES[SIZES.index(named(scene[1], shape)[2]) + 1 :])


def smaller(scene, shape):
    return changed(scene, shape, 2, SIZES[: SIZES.index(named(scene[1], shape)[2])])


RULES = [
    *[
        (pattern, lambda s, shape, color: changed(s, shape, 1, [color]))
        for pattern in (f"make the {SHAPE} {COLOR}", f"change the {SHAPE} to {COLOR}", f"the {SHAPE} is {COLOR}")
    ],
    *[
        (pattern, lambda s, shape, fill: changed(s, shape, 3, [fill]))
        for pattern in (f"make the {SHAPE} {FILL}", f"the {SHAPE} should be {FILL}")
    ],
    *[
        (pattern, lambda s, shape, new: changed(s, shape, 0, [new]))
        for pattern in (f"replace the {SHAPE} with {A}{SHAPE}", f"turn the {SHAPE} into {A}{SHAPE}")
    ],
    (f"{A}{SHAPE} instead of the {SHAPE}", lambda s, new, shape: changed(s, shape, 0, [new])),
    (f"make the {SHAPE} {SIZE}", lambda s, shape, size: changed(s, shape, 2, [size])),
    (f"make the {SHAPE} bigger", bigger),
    (f"make the {SHAPE} smaller", smaller),
    *[
        (pattern, lambda s, ground: {(ground, s[1])})
        for pattern in (f"change the background to {GROUND}", f"put it on {GROUND}", f"with {GROUND} behind")
    ],
    (f"add {A}({one_of(SIZES)[1:-1]} )?".replace("(small|medium|large )", "((?:small|medium|large) )")
     + f"{COLOR} {SHAPE} {AT}", added),
    *[(pattern, without) for pattern in (f"remove the {SHAPE}", f"without the {SHAPE}", f"take the {SHAPE} away")],
    (f"swap the {SHAPE} and the {SHAPE}", swapped),
    (f"move the {SHAPE} to the {PLACE}", lambda s, shape, position: changed(s, shape, 4, [position])),
    (f"the {SHAPE} is {AT}", lambda s, shape, at: changed(s, shape, 4, [WHERE[at]])),
]  # fmt: skip


def satisfying(sentence, scenes):
    """All scenes that satisfy the text, and the numbers of the rules that parse it."""
    for number, (pattern, rule) in enumerate(RULES):
        if match := re.fullmatch(pattern, sentence):
            return {target for scene in scenes for target in rule(scene, *match.groups())}, [number]
    for cut in re.finditer(" and ", sentence):
        first = satisfying(sentence[: cut.start()], scenes)
        second = first and satisfying(sentence[cut.end() :], first[0])
        if second:
            return second[0], first[1] + second[1]
    return None


def check_edit(scene, edit):
    assert edit is not None
    read = satisfying(edit.text, {plain(scene)})
    assert read is not None, edit.text
    targets, rules = read
    assert {plain(target) for target in edit.targets} == targets - {plain(scene)}, edit.text
    assert len({target.code for target in edit.targets}) == len(edit.targets) > 0
    assert scene.code not in {target.code for target in edit.targets}
    for target in edit.targets:
        check_scene(target)
    return rules


def check_scene(scene):
    assert scene.background in BACKGROUNDS
    for t in scene.things:
        assert t.shape in SHAPES
        assert t.color in COLORS
        assert t.size in SIZES
        assert t.fill in FILLS
        assert t.position in POSITIONS
    if len(scene.things) == 2:
        one, two = scene.things
        assert one.shape != two.shape
        assert OPPOSITE[one.position] == two.position
    else:
        assert len(scene.things) == 1


@pytest.mark.slow
def test_double_edit_text_and_targets_agree():
    rng = random.Random("double")
    pairs = Counter()
    for _ in range(1500):
        scene = random_scene(rng, "train")
        edit = double_edit(rng, scene)
        if edit is not None:
            rules = check_edit(scene, edit)
            first, second = edit.kinds
            assert first != second
            assert len(rules) == 2
            pairs[edit.kinds] += 1
    assert set(pairs) >= {(a, b) for a in EDIT_KINDS for b in ("colour", "size", "fill", "background") if a != b}


@pytest.mark.slow
def test_every_wording_is_drawn():
    rng = random.Random("ways")
    seen = Counter()
    for _ in range(1500):
        scene = random_scene(rng, "train")
        edit = random_edit(rng, scene)
        if edit is not None:
            seen.update(check_edit(scene, edit))
    assert set(seen) == set(range(len(RULES)))


def test_the_parser_refuses_a_wrong_target():
    star = Thing("star", "red", "small", "plain", "left")
    scene = Scene("sand", (star,))
    assert satisfying("make the star bigger", {plain(scene)})[0] == {
        ("sand", frozenset({("star", "red", size, "plain", "left")})) for size in ("medium", "large")
    }
    assert satisfying("make the star quieter", {plain(scene)}) is None


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.sampled_from(sorted(SPLIT_BUCKETS)), st.sampled_from([0.0, 0.25, 1.0]))
def test_edit_keeps_every_target_of_its_split(seed, split, double):
    rng = random.Random(seed)
    scene = random_scene(rng, split)
    edit = edit_scene(rng, scene, double)
    targets, rules = satisfying(edit.text, {plain(scene)})
    things = {position: Scene(position[0], tuple(Thing(*t) for t in position[1])) for position in targets}
    assert {plain(a) for a in edit.targets} == {k for k, s in things.items() if s.split == split} - {plain(scene)}
    assert {a.split for a in edit.targets} == {split}
    assert len(rules) == len(edit.kinds) == {0.0: 1, 1.0: 2}.get(double, len(rules))


@settings(max_examples=30, deadline=None)
@given(
    SEEDS,
    st.sampled_from(sorted(SPLIT_BUCKETS)),
    st.sampled_from([None, 1, 2]),
    st.none() | st.sampled_from(SHAPES),
)
def test_random_scene_follows_its_arguments(seed, split, things, shape):
    scene = random_scene(random.Random(seed), split, things, shape)
    check_scene(scene)
    assert scene.split == split
    assert things in (None, len(scene.things))
    assert shape in (None, scene.things[0].shape)
    assert scene == random_scene(random.Random(seed), split, things, shape)


@pytest.mark.slow
def test_random_scenes_are_uniform():
    rng = random.Random(0)
    scenes = [random_scene(rng, "train") for _ in range(3000)]
    things = [t for s in scenes for t in s.things]
    for values, drawn in (
        (SHAPES, [t.shape for t in things]),
        (COLORS, [t.color for t in things]),
        (SIZES, [t.size for t in things]),
        (FILLS, [t.fill for t in things]),
        (BACKGROUNDS, [s.background for s in scenes]),
        (POSITIONS, [s.things[0].position for s in scenes if len(s.things) == 1]),
    ):
        counts = Counter(drawn)
        assert set(counts) == set(values)
        assert min(counts.values()) > 0.7 * len(drawn) / len(values)
    assert 0.45 < sum(len(s.things) == 2 for s in scenes) / len(scenes) < 0.55


@pytest.mark.slow
def test_split_depends_on_content_alone():
    one = Thing("star", "red", "small", "plain", "left")
    two = Thing("boat", "blue", "large", "dotted", "right")
    assert Scene("sea", (one, two)).code == Scene("sea", (two, one)).code
    assert Scene("sea", (one, two)).code != Scene("sky", (one, two)).code
    assert Scene("sea", (one,)).code != Scene("sea", (two,)).code
    assert sorted(b for buckets in SPLIT_BUCKETS.values() for b in buckets) == list(range(100))
    scenes = [
        Scene(b, (Thing(s, c, "small", "plain", p),)) for b, s, c, p in product(BACKGROUNDS, SHAPES, COLORS, POSITIONS)
    ]
    shares = Counter(scene.split for scene in scenes)
    assert shares["train"] / len(scenes) == pytest.approx(0.7, abs=0.02)
    assert shares["val"] / len(scenes) == pytest.approx(0.1, abs=0.015)
    assert shares["test"] / len(scenes) == pytest.approx(0.2, abs=0.02)


def read_caption(text):
    """The background and the set of (shape, color, size, fill, position) of a caption, None if not named."""
    text = re.sub("^(a photo of|a picture with) ", "", text)
    match = re.fullmatch(f"(.*?)(?: (?:on|over|in front of) {GROUND})?", text)
    part = f"{A}(?:{SIZE} )?(?:{COLOR} )?(?:{FILL} )?{SHAPE}(?: {AT})?"
    things = set()
    for words in match[1].split(" and "):
        found = re.fullmatch(part, words)
        assert found, words
        size, color, fill, shape, at = found.groups()
        things.add((shape, color, size, fill, at and WHERE[at]))
    return match[2], frozenset(things)


@settings(max_examples=50, deadline=None)
@given(SEEDS, st.sampled_from([0.0, 0.3, 1.0]))
def test_caption_agrees_with_the_scene(seed, forget):
    rng = random.Random(seed)
    scene = random_scene(rng, "train")
    ground, things = read_caption(caption(rng, scene, forget))
    background, real = plain(scene)
    assert ground in ((background,) if forget == 0 else (None, background))
    assert {t[0] for t in things} == {t[0] for t in real}
    for said in things:
        truth = named(real, said[0])
        for slot in (1, 2, 4):
            assert said[slot] in ((truth[slot],) if forget == 0 else (None, truth[slot]))
        unsaid = (None,) if truth[3] == "plain" else (truth[3],) if forget == 0 else (None, truth[3])
        assert said[3] in unsaid
    if forget == 1:
        assert (ground, things) == (None, frozenset((t[0], None, None, None, None) for t in real))
