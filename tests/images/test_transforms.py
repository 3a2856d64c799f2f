"""Images of every kind, broken ones among them, and the pipeline that makes tensors of them."""

import io
import os
import pickle
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageOps
from torchvision import transforms as tv

from union_igrot.errors import ConfigError, ImageError
from union_igrot.images.decode import check_image, image_key, open_image
from union_igrot.images.transforms import ImageToTensor
from union_igrot.types import Preprocess

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def noise(width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def smooth(width, height):
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8))


class Held:
    key = "held:1"

    def __init__(self, image):
        self.image = image

    def open(self):
        return self.image


# --- open_image: modes


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "TIFF"])
def test_lossless_files_come_back_to_the_pixel(tmp_path, suffix):
    image = noise(7, 5)
    image.save(tmp_path / f"a.{suffix}")
    opened = open_image(tmp_path / f"a.{suffix}")
    assert opened.mode == "RGB"
    assert type(opened) is Image.Image
    assert opened.tobytes() == image.tobytes()


def test_alpha_lies_over_white(tmp_path):
    image = Image.new("RGBA", (3, 1))
    for x, pixel in enumerate([(255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 128)]):
        image.putpixel((x, 0), pixel)
    image.save(tmp_path / "a.png")
    opened = open_image(tmp_path / "a.png")
    assert [opened.getpixel((x, 0)) for x in range(3)] == [(255, 0, 0), (255, 255, 255), (127, 127, 127)]


def test_grey_with_alpha_lies_over_white(tmp_path):
    Image.new("LA", (2, 2), (0, 0)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_transparent_palette_and_transparent_colour_key(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "one.png", transparency=0)
    image.save(tmp_path / "bytes.png", transparency=b"\x00\xff")
    image.save(tmp_path / "a.gif", transparency=0)
    Image.new("RGB", (2, 1), (9, 9, 9)).save(tmp_path / "key.png", transparency=(9, 9, 9))
    for name in ("one.png", "bytes.png", "a.gif"):
        opened = open_image(tmp_path / name)
        assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (10, 20, 30)], name
    assert open_image(tmp_path / "key.png").getpixel((0, 0)) == (255, 255, 255)


def test_bilevel_grey_and_cmyk(tmp_path):
    Image.new("1", (2, 2), 1).save(tmp_path / "one.png")
    Image.new("L", (2, 2), 77).save(tmp_path / "grey.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    assert open_image(tmp_path / "one.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_image(tmp_path / "grey.png").getpixel((0, 0)) == (77, 77, 77)
    red, green, blue = open_image(tmp_path / "cmyk.jpg").getpixel((4, 4))
    assert red > 245
    assert max(green, blue) < 10


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    opened = open_image(tmp_path / "a.png")
    assert [opened.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 51.0, 255.0], [0, 51, 255]),
        ([0.0, 50000.0, 100000.0], [0, 128, 255]),
        ([-3.0, np.nan, 1.0], [0, 0, 255]),
        ([np.inf, 0.0, 0.0], [0, 0, 0]),
    ],
)
def test_float_grey_takes_the_smallest_white_that_holds_it(tmp_path, values, expected):
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "a.tif")
    opened = open_image(tmp_path / "a.tif")
    assert [opened.getpixel((x, 0))[0] for x in range(3)] == expected


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for suffix in ("gif", "webp", "png", "tif"):
        options = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
        assert open_image(tmp_path / f"a.{suffix}").getpixel((1, 1)) == (255, 0, 0), suffix


# --- open_image: orientation


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_that_of_pillow(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    smooth(48, 32).save(path, exif=exif)
    with Image.open(path) as stored:
        stored.load()
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    opened = open_image(path)
    assert opened.size == ((32, 48) if orientation >= 5 else (48, 32))
    assert opened.tobytes() == expected.tobytes()


def test_corrupt_exif_leaves_the_picture_as_stored_without_a_warning(tmp_path):
    whole = Image.Exif()
    whole[0x0112] = 6
    blocks = {
        "cut": whole.tobytes()[:-9],
        "rubbish": b"Exif\x00\x00rubbish that is no TIFF header",
        "offset": b"Exif\x00\x00II*\x00" + struct.pack("<L", 10**6),
        "entry": b"Exif\x00\x00II*\x00" + struct.pack("<LHHHLL", 8, 1, 0x0112, 3, 5000, 10**6),
    }
    for name, block in blocks.items():
        for suffix in ("jpg", "png", "webp"):
            smooth(48, 32).save(tmp_path / f"{name}.{suffix}", exif=block)
            assert open_image(tmp_path / f"{name}.{suffix}").size == (48, 32), (name, suffix)


# --- open_image: draft


@pytest.mark.parametrize(("at_least", "size"), [(100, (100, 200)), (101, (200, 400)), (400, (800, 400)), (9999, None)])
def test_draft_keeps_the_short_side_and_the_orientation(tmp_path, at_least, size):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    smooth(800, 400).save(path, exif=exif, quality=95)
    full, reduced = open_image(path), open_image(path, at_least=at_least)
    assert reduced.size == ((400, 800) if size is None or max(size) == 800 else size)
    a, b = (np.asarray(x.resize((20, 40)), dtype=float) for x in (full, reduced))
    assert np.abs(a - b).max() < 12


def test_draft_leaves_other_formats_alone(tmp_path):
    smooth(80, 40).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png", at_least=5).size == (80, 40)
    with pytest.raises(ConfigError, match="at_least is 0"):
        open_image(tmp_path / "a.png", at_least=0)


# --- open_image: what cannot be read


def encoded(suffix):
    stream = io.BytesIO()
    noise(64, 64).save(stream, format={"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
    return stream.getvalue()


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp", "tif", "gif"])
def test_truncated_files_are_errors_that_name_them(tmp_path, suffix):
    data = encoded(suffix)
    path = tmp_path / f"a.{suffix}"
    for at_least in (None, 8):
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(ImageError, match=rf"a\.{suffix}: cannot be read as an image \(.+\); replace"):
            open_image(path, at_least=at_least)


def test_missing_empty_and_other_things(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    os.mkfifo(tmp_path / "pipe.png")
    cases = {
        "nowhere.png": "missing",
        "text.png/inside.png": "missing",
        "empty.png": r"empty \(0 bytes\)",
        "text.png": "no known image format",
        "pipe.png": "not a regular file",  # opening it would wait for ever
        ".": "not a regular file",
        "a\0b.png": "cannot be reached",
        "x" * 5000: "cannot be reached",
    }
    for name, reason in cases.items():
        with pytest.raises(ImageError, match=reason) as caught:
            open_image(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_an_error_and_a_large_picture_is_no_warning(tmp_path, monkeypatch):
    noise(20, 20).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    assert open_image(tmp_path / "a.png").size == (20, 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"a\.png.*pixels"):
        open_image(tmp_path / "a.png")


@given(st.sampled_from(["jpg", "png", "webp", "tif", "gif", "bmp"]), st.data())
@settings(max_examples=60, deadline=None)
def test_no_damage_raises_anything_but_a_picture_error(tmp_path_factory, suffix, data):
    content = bytearray(encoded(suffix))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, min(len(content) - 1, 400)))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / f"damaged.{suffix}"
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    try:
        mode = open_image(path).mode
    except ImageError as error:
        mode = "RGB" if str(path) in str(error) else str(error)
    assert mode == "RGB"


def test_warning_filters_are_restored_after_many_threads(tmp_path, monkeypatch):
    noise(20, 20).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # each opening would warn
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(lambda _: open_image(tmp_path / "a.png").size, range(200)))
    assert sizes == [(20, 20)] * 200
    assert list(warnings.filters) == before


def test_a_picture_opens_itself():
    image = noise(4, 3)
    assert open_image(Held(image)) is image
    assert open_image(Held(Image.new("L", (2, 2), 5))).mode == "RGB"


# --- identity


def test_key_follows_path_size_and_time(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    noise(4, 4).save(path)
    key = image_key(path)
    assert str(path) in key
    monkeypatch.chdir(tmp_path)
    assert image_key(path.relative_to(tmp_path)) == key
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1000))
    changed = image_key(path)
    assert changed != key
    path.write_bytes(path.read_bytes() + b"0")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1000))
    assert image_key(path) not in (key, changed)
    assert image_key(Held(noise(1, 1))) == "held:1"
    assert check_image(path).st_size == found.st_size + 1
    with pytest.raises(ImageError, match=r"b\.png: the image is missing"):
        image_key(tmp_path / "b.png")


# --- tensors


class TargetPad:
    """The padding of CLIP4Cir, spelled out with nothing but paste."""

    def __init__(self, ratio):
        self.ratio = ratio

    def __call__(self, image):
        width, height = image.size
        if max(width, height) / min(width, height) < self.ratio:
            return image
        short = max(width, height) / self.ratio
        left, top = max(int((short - width) / 2), 0), max(int((short - height) / 2), 0)
        canvas = Image.new("RGB", (width + 2 * left, height + 2 * top))
        canvas.paste(image, (left, top))
        return canvas


def reference(preprocess):
    filters = {"bicubic": tv.InterpolationMode.BICUBIC, "bilinear": tv.InterpolationMode.BILINEAR}
    how, size = filters[preprocess.interpolation], preprocess.size
    steps = {
        "squash": [tv.Resize((size, size), how, antialias=True)],
        "crop": [tv.Resize(size, how, antialias=True), tv.CenterCrop(size)],
        "pad": [TargetPad(preprocess.pad_ratio), tv.Resize(size, how, antialias=True), tv.CenterCrop(size)],
    }[preprocess.fit]
    return tv.Compose([*steps, tv.ToTensor(), tv.Normalize(preprocess.mean, preprocess.std)])


@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 40),
    st.sampled_from(["squash", "crop", "pad"]),
    st.sampled_from(["bicubic", "bilinear"]),
    st.sampled_from([1.0, 1.25, 2.0]),
)
@settings(max_examples=80, deadline=None)
def test_equal_to_torchvision(width, height, size, fit, interpolation, ratio):
    short = min(width, height)
    width, height = min(width, 16 * short), min(height, 16 * short)
    preprocess = Preprocess(size, MEAN, STD, fit, interpolation, ratio)
    image = noise(width, height)
    assert torch.equal(ImageToTensor(preprocess)(image), reference(preprocess)(image))


def test_the_right_size_is_not_resampled():
    image = noise(16, 16)
    got = ImageToTensor(Preprocess(16, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "pad"))(image)
    assert torch.equal(got, torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255)


def test_a_long_strip_keeps_its_middle_and_its_memory():
    strip = Image.new("RGB", (200_000, 1), "red")
    strip.paste("blue", (99_990, 0, 100_010, 1))
    black = (0.0, 0.0, 0.0)
    for image in (strip, strip.transpose(Image.Transpose.ROTATE_90)):
        got = ImageToTensor(Preprocess(224, black, (1.0, 1.0, 1.0)))(image)
        assert got.shape == (3, 224, 224)
        assert got[2].min() == 1
        assert got[0].max() == 0


def test_other_modes_are_laid_on_white_first():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    got = ImageToTensor(Preprocess(4, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)))(clear)
    assert torch.equal(got, torch.ones(3, 4, 4))


def test_it_can_be_pickled():
    preprocess = Preprocess(8, MEAN, STD, "pad", "bilinear", 1.5)
    again = pickle.loads(pickle.dumps(ImageToTensor(preprocess)))
    assert again.preprocess == preprocess
    assert torch.equal(again(noise(9, 20)), reference(preprocess)(noise(9, 20)))


@pytest.mark.parametrize("wrong", [{"size": 0}, {"pad_ratio": 0.9}, {"std": (0.2, 0.0, 0.2)}])
def test_settings_that_cannot_be_applied(wrong):
    with pytest.raises(ConfigError, match="cannot be applied"):
        ImageToTensor(Preprocess(**{"size": 8, "mean": MEAN, "std": STD, **wrong}))
