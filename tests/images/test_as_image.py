"""`as_image`: the same image in every form, and one clear line for what is none."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import ExifTags, Image

from small_world import Noise
from union_igrot.errors import ImageError
from union_igrot.images.decode import as_image
from union_igrot.images.transforms import image_batch
from union_igrot.types import Preprocess

WIDE, HIGH = 5, 3
PIXELS = np.random.default_rng(0).integers(0, 256, (HIGH, WIDE, 3), dtype=np.uint8)


def same(image: Image.Image, pixels: np.ndarray = PIXELS) -> bool:
    assert image.mode == "RGB"
    return np.array_equal(np.asarray(image), pixels)


def as_png(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", **options)
    return file.getvalue()


def forms(folder: Path) -> dict[str, object]:
    image = Image.fromarray(PIXELS)
    data = as_png(image)
    path = folder / "a b.png"
    path.write_bytes(data)
    floats = torch.from_numpy(PIXELS).permute(2, 0, 1) / 255
    return {
        "path": path,
        "text": str(path),
        "PIL": image,
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "open file": path.open("rb"),
        "buffer": io.BytesIO(data),
        "array": PIXELS,
        "array, not contiguous": np.ascontiguousarray(PIXELS.transpose(1, 0, 2)).transpose(1, 0, 2),
        "array of floats": (PIXELS / 255).astype(np.float64),
        "array of uint16": PIXELS.astype(np.uint16) * 257,
        "opaque array": np.dstack([PIXELS, np.full((HIGH, WIDE), 255, np.uint8)]),
        "tensor": torch.from_numpy(PIXELS).permute(2, 0, 1),
        "tensor of floats": floats,
        "tensor of a graph": floats.clone().requires_grad_(),
        "opaque tensor": torch.cat([floats, torch.ones(1, HIGH, WIDE)]),
    }


def test_every_form_of_a_picture_gives_the_same_pixels(tmp_path):
    for name, form in forms(tmp_path).items():
        assert same(as_image(form)), name
        if name == "open file":
            form.close()


def test_a_picture_of_ones_own_is_opened():
    assert same(as_image(Noise(3, 1)), np.asarray(Noise(3, 1).open()))


def test_grey_is_spread_over_the_colours():
    grey = PIXELS[..., 0]
    wanted = np.repeat(grey[..., None], 3, axis=2)
    for form in (grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[None], Image.fromarray(grey)):
        assert same(as_image(form), wanted)
    truth = grey > 99
    assert same(as_image(truth), np.repeat(truth[..., None], 3, axis=2).astype(np.uint8) * 255)
    half = (torch.from_numpy(grey) / 255).to(torch.bfloat16)
    assert np.abs(np.asarray(as_image(half)).astype(int) - wanted).max() <= 1


def test_transparency_is_laid_over_white():
    clear = np.zeros((2, 2, 4), np.uint8)
    clear[0, 0] = (10, 20, 30, 255)
    for form in (clear, torch.from_numpy(clear).permute(2, 0, 1), Image.fromarray(clear), clear / 255):
        pixels = np.asarray(as_image(form))
        assert pixels[0, 0].tolist() == [10, 20, 30]
        assert (pixels[1] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_held_by_the_caller_is_turned_as_the_file_is(tmp_path, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "turned.png"
    path.write_bytes(as_png(Image.fromarray(PIXELS), exif=exif))
    turned = np.asarray(as_image(path))
    with Image.open(path) as held:
        assert same(as_image(held), turned)
    assert same(as_image(path.read_bytes()), turned)


def test_a_large_jpeg_in_memory_may_be_decoded_small():
    file = io.BytesIO()
    Image.new("RGB", (800, 400), "red").save(file, format="JPEG")
    assert as_image(file.getvalue()).size == (800, 400)
    assert as_image(file.getvalue(), at_least=100).size == (200, 100)
    file.seek(0)
    assert as_image(file, at_least=100).size == (200, 100)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (np.zeros((3, 64, 65)), ("3x64x65", "channels stand first", "transpose(1, 2, 0)")),
        (torch.zeros(64, 65, 3), ("64x65x3", "channels stand last", "permute(2, 0, 1)")),
        (np.zeros((2, 64, 64, 3)), ("2x64x64x3", "one image at a time")),
        (torch.zeros(1, 3, 4, 4), ("1x3x4x4", "one image at a time")),
        (np.zeros((64, 65, 7)), ("64x65x7", "HxWx3")),
        (np.zeros(12), ("of 12 is no image",)),
        (np.float64(3.0), ("float64",)),
        (np.zeros(()), ("no dimension",)),
        (np.zeros((0, 4, 3)), ("no pixel",)),
        (torch.zeros(3, 4, 0), ("no pixel",)),
        (np.zeros((4, 4), np.int64), ("int64", "uint8 (0..255)")),
        (np.zeros((4, 4), complex), ("complex128",)),
        (np.array([["a"]]), ("<U1",)),
        (torch.zeros(3, 4, 4, dtype=torch.int32), ("a tensor of 3x4x4, int32,",)),
        (np.full((4, 4), 255.0), ("255", "0..1")),
        (torch.full((3, 4, 4), -2.1), ("-2.1", "normalization")),
        (np.full((4, 4), np.nan), ("nan",)),
        (np.full((4, 4), np.inf), ("inf",)),
        (b"", ("0 bytes",)),
        (b"GIF89a", ("6 bytes: cannot be read as an image",)),
        (io.StringIO("text"), ("mode 'rb'",)),
        (Path("not there.png"), ("missing",)),
        ("not there.png", ("missing",)),
        (None, ("NoneType is no image",)),
        ([1, 2], ("list is no image", "an array or a tensor")),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, tuple) else "",
)
def test_what_is_no_picture_is_one_clear_line(given, parts):
    with pytest.raises(ImageError) as caught:
        as_image(given)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_an_image_whose_file_is_gone_or_torn_is_named(tmp_path):
    path = tmp_path / "torn.png"
    path.write_bytes(as_png(Image.effect_noise((64, 64), 50))[:600])
    with Image.open(path) as held, pytest.raises(ImageError, match=r"torn\.png"):
        as_image(held)
    closed = Image.open(path)
    closed.close()
    with pytest.raises(ImageError, match=r"torn\.png"):
        as_image(closed)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 4]), st.integers(0, 2**32 - 1))
def test_an_array_and_its_tensor_are_one_picture(high, wide, channels, seed):
    array = np.random.default_rng(seed).integers(0, 256, (high, wide, channels), dtype=np.uint8)
    first = as_image(array)
    assert first.size == (wide, high)
    assert same(as_image(torch.from_numpy(array).permute(2, 0, 1)), np.asarray(first))
    # Blending with transparency rounds; the levels themselves are kept.
    assert same(as_image(array / 255), np.asarray(first))


def test_a_batch_takes_every_form(tmp_path):
    held = forms(tmp_path)
    held["open file"].close()
    del held["open file"]
    batch = image_batch(held.values(), Preprocess(4, (0.5,) * 3, (0.5,) * 3, "squash"))
    assert batch.shape == (len(held), 3, 4, 4)
    assert all(torch.equal(row, batch[0]) for row in batch)
