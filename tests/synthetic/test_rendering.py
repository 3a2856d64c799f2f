"""Pixels: always the same, and what the scene says."""

import hashlib

import numpy as np
import pytest

from union_igrot.synthetic.rendering import (
    BACKGROUND_RGB,
    CENTERS,
    COLOR_RGB,
    PIXELS,
    render_photo,
    render_sketch,
)
from union_igrot.synthetic.scenes import BACKGROUNDS, COLORS, FILLS, POSITIONS, SHAPES, SIZES, Scene, Thing

GOLDEN = "15d686f80e107cbd01330566a26b2b6e1fb86b2a73d751099601aeec31242dd2"
"""Changes with the drawing code alone; then the version in `ShapesImage.key` changes too."""


def one(shape="circle", color="red", size="large", fill="plain", position="middle", background="snow"):
    return Scene(background, (Thing(shape, color, size, fill, position),))


def many():
    """Forty scenes with every shape, color, size, fill, position and background; every fifth holds two things."""
    for i in range(40):
        thing = Thing(SHAPES[i % 20], COLORS[i % 10], SIZES[i % 3], FILLS[(i + i // 20) % 4], POSITIONS[i % 5])
        second = Thing(SHAPES[(i + 7) % 20], COLORS[(i + 3) % 10], SIZES[(i + 1) % 3], FILLS[(i + 2) % 4], "right")
        yield Scene(BACKGROUNDS[i % 8], (thing, second) if i % 5 == 0 else (thing,))


def pixels(image):
    return np.asarray(image).astype(np.float64)


def ink(scene, seed):
    """Share of ink of each pixel of a sketch."""
    return 1 - pixels(render_sketch(scene, seed)).mean(2) / 255


def test_same_seed_same_pixels_for_ever():
    digest = hashlib.sha256()
    for seed, scene in enumerate(many()):
        for image in (render_photo(scene, seed), render_sketch(scene, seed)):
            digest.update(image.tobytes())
    assert digest.hexdigest() == GOLDEN


@pytest.mark.parametrize("shape", SHAPES)
def test_sketch_is_dark_strokes_on_white_at_the_place(shape):
    for seed, position in enumerate(POSITIONS):
        strokes = ink(one(shape, position=position, size="medium"), seed)
        assert strokes.max() > 0.6
        assert 0.01 < strokes.mean() < 0.35
        y, x = (np.average(axis, weights=strokes) / PIXELS for axis in np.mgrid[0:PIXELS, 0:PIXELS])
        assert abs(x - CENTERS[position][0]) < 0.13
        assert abs(y - CENTERS[position][1]) < 0.13


def test_sketch_knows_nothing_of_colour_fill_or_background():
    first = render_sketch(one(), 3).tobytes()
    assert render_sketch(one(color="blue", fill="dotted", background="night"), 3).tobytes() == first
    assert render_sketch(one(shape="fish"), 3).tobytes() != first


@pytest.mark.slow
@pytest.mark.parametrize("color", COLORS)
def test_a_thing_has_its_color(color):
    """The mean over seeds is nearest to the named color, light and noise aside."""
    middle = slice(PIXELS // 2 - 2, PIXELS // 2 + 2)
    means = [pixels(render_photo(one(color=color), seed))[middle, middle].mean((0, 1)) for seed in range(24)]
    shown = np.mean(means, axis=0)
    assert min(COLORS, key=lambda c: np.linalg.norm(shown - np.array(COLOR_RGB[c]))) == color


@pytest.mark.slow
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_background_has_its_color(background):
    """The corners' mean over seeds is nearest to a mixture of the named background's two colors."""
    corners = [
        pixels(render_photo(one(size="small", background=background), seed))[:8].reshape(-1, 3).mean(0)
        for seed in range(24)
    ]
    shown = np.mean(corners, axis=0)

    def distance(name):
        base, other = (np.array(c, dtype=np.float64) for c in BACKGROUND_RGB[name])
        along = np.clip((shown - base) @ (other - base) / ((other - base) @ (other - base)), 0, 1)
        return np.linalg.norm(shown - base - along * (other - base))

    assert min(BACKGROUNDS, key=distance) == background


def test_fills_differ_within_a_thing():
    middle = slice(PIXELS // 2 - 5, PIXELS // 2 + 5)

    def contrast(fill):
        return np.mean([pixels(render_photo(one(fill=fill), s))[middle, middle].std((0, 1)).mean() for s in range(12)])

    assert contrast("plain") * 1.8 < min(contrast(fill) for fill in FILLS if fill != "plain")
    first = {render_photo(one(fill=fill), 1).tobytes() for fill in FILLS}
    assert len(first) == len(FILLS)
