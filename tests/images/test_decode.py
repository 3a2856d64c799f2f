"""Decoding: images of every kind, type and damage."""

import io
import os
import struct
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import ExifTags, Image, ImageOps

from union_igrot.errors import ConfigError, ImageError
from union_igrot.images.decode import as_image, check_image, image_key, open_image

WIDE, HIGH = 5, 3
PIXELS = np.random.default_rng(0).integers(0, 256, (HIGH, WIDE, 3), dtype=np.uint8)


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
    Image.new("LA", (2, 2), (0, 0)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_transparent_palette_and_transparent_color_key(tmp_path):
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


def test_bilevel_gray_and_cmyk(tmp_path):
    Image.new("1", (2, 2), 1).save(tmp_path / "one.png")
    Image.new("L", (2, 2), 77).save(tmp_path / "gray.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    assert open_image(tmp_path / "one.png").getpixel((0, 0)) == (255, 255, 255)
    assert open_image(tmp_path / "gray.png").getpixel((0, 0)) == (77, 77, 77)
    red, green, blue = open_image(tmp_path / "cmyk.jpg").getpixel((4, 4))
    assert red > 245
    assert max(green, blue) < 10


def test_sixteen_bit_gray_is_scaled_and_not_clipped(tmp_path):
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
def test_float_gray_takes_the_smallest_white_that_holds_it(tmp_path, values, expected):
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "a.tif")
    opened = open_image(tmp_path / "a.tif")
    assert [opened.getpixel((x, 0))[0] for x in range(3)] == expected


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for suffix in ("gif", "webp", "png", "tif"):
        options = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
        assert open_image(tmp_path / f"a.{suffix}").getpixel((1, 1)) == (255, 0, 0), suffix


# --- open_image: orientation


@pytest.mark.slow
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


def test_corrupt_exif_leaves_the_image_as_stored_without_a_warning(tmp_path):
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
    with pytest.raises(ConfigError, match="at_least: 0"):
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
        with pytest.raises(ImageError, match=rf"a\.{suffix} \(.+\)"):
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
        ".": "is a folder",
        "a\0b.png": "cannot be reached",
        "x" * 5000: "cannot be reached",
    }
    for name, reason in cases.items():
        with pytest.raises(ImageError, match=reason) as caught:
            open_image(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_decompression_bomb_is_an_error_and_a_large_image_is_no_warning(tmp_path, monkeypatch):
    noise(20, 20).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    assert open_image(tmp_path / "a.png").size == (20, 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=r"a\.png.*pixels"):
        open_image(tmp_path / "a.png")


@pytest.mark.slow
@given(st.sampled_from(["jpg", "png", "webp", "tif", "gif", "bmp"]), st.data())
@settings(max_examples=60, deadline=None)
def test_no_damage_raises_anything_but_an_image_error(tmp_path_factory, suffix, data):
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


def test_a_lazy_image_opens_itself():
    image = noise(4, 3)
    assert open_image(Held(image)) is image
    assert as_image(Held(image)) is image
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


# --- as_image


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


def test_every_form_of_an_image_gives_the_same_pixels(tmp_path):
    for name, form in forms(tmp_path).items():
        assert same(as_image(form)), name
        if name == "open file":
            form.close()


def test_gray_is_spread_over_the_colors():
    gray = PIXELS[..., 0]
    wanted = np.repeat(gray[..., None], 3, axis=2)
    for form in (gray, gray[..., None], torch.from_numpy(gray), torch.from_numpy(gray)[None], Image.fromarray(gray)):
        assert same(as_image(form), wanted)
    truth = gray > 99
    assert same(as_image(truth), np.repeat(truth[..., None], 3, axis=2).astype(np.uint8) * 255)
    half = (torch.from_numpy(gray) / 255).to(torch.bfloat16)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (np.zeros((3, 64, 65)), ("3x64x65", "transpose(1, 2, 0)")),
        (torch.zeros(64, 65, 3), ("64x65x3", "permute(2, 0, 1)")),
        (np.zeros((2, 64, 64, 3)), ("2x64x64x3", "one image at a time")),
        (torch.zeros(1, 3, 4, 4), ("1x3x4x4", "one image at a time")),
        (np.zeros((64, 65, 7)), ("64x65x7", "HxWx3")),
        (np.zeros(12), ("array of 12",)),
        (np.float64(3.0), ("float64",)),
        (np.zeros(()), ("no dimension",)),
        (np.zeros((0, 4, 3)), ("no pixel",)),
        (torch.zeros(3, 4, 0), ("no pixel",)),
        (np.zeros((4, 4), np.int64), ("int64", "uint8 (0..255)")),
        (np.zeros((4, 4), complex), ("complex128",)),
        (np.array([["a"]]), ("<U1",)),
        (torch.zeros(3, 4, 4, dtype=torch.int32), ("tensor of 3x4x4, int32",)),
        (np.full((4, 4), 255.0), ("255", "0..1")),
        (torch.full((3, 4, 4), -2.1), ("-2.1", "normalization")),
        (np.full((4, 4), np.nan), ("nan",)),
        (np.full((4, 4), np.inf), ("inf",)),
        (b"", ("0 bytes",)),
        (b"GIF89a", ("6 bytes",)),
        (io.StringIO("text"), ("mode 'rb'",)),
        (Path("not there.png"), ("missing",)),
        ("not there.png", ("missing",)),
        (None, ("NoneType",)),
        ([1, 2], ("list", "array or tensor")),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, tuple) else "",
)
def test_other_objects_are_errors_of_one_line(given, parts):
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


# --- images that would take too long or too much memory, and formats


def progressive(size=(64, 64)):
    file = io.BytesIO()
    smooth(*size).save(file, "JPEG", progressive=True)
    return file.getvalue()


def test_a_jpeg_with_hundreds_of_scans_is_refused(tmp_path):
    whole = progressive()
    last = whole[whole.rfind(b"\xff\xc4") : -2]  # table and data of the last scan
    assert open_image(write(tmp_path, whole[:-2] + 50 * last + b"\xff\xd9")).size == (64, 64)
    for at_least in (None, 8):
        with pytest.raises(ImageError, match="more than 100 scans"):
            open_image(write(tmp_path, whole[:-2] + 200 * last + b"\xff\xd9"), at_least)
    # A marker without a length hides nothing: what follows it would be the length of 65,476 bytes.
    with pytest.raises(ImageError, match="more than 100 scans"):
        open_image(write(tmp_path, whole[:-2] + b"\xff\x01" + 200 * last + b"\xff\xd9"))
    # Whatever follows the image does not count, nor metadata.
    assert open_image(write(tmp_path, whole + 500 * b"\xff\xda\0\x02")).size == (64, 64)
    comment = b"\xff\xfe" + struct.pack(">H", 402) + 200 * b"\xff\xda"
    assert open_image(write(tmp_path, whole[:2] + comment + whole[2:])).size == (64, 64)


@pytest.mark.parametrize("rest", [bytes(2**26), b"\xff" * 2**20, b"\xff\xfe\0\x02" * 2**20])
def test_a_header_without_an_image_is_refused_at_once(tmp_path, rest):
    path = write(tmp_path, progressive()[:20] + rest)
    start = time.process_time()
    with pytest.raises(ImageError, match=r"no image follows|segments before"):
        open_image(path)
    assert time.process_time() - start < 1


def write(folder, data):
    (folder / "a.jpg").write_bytes(data)
    return folder / "a.jpg"


def test_the_largest_image_is_a_setting_and_counts_what_is_decoded(tmp_path, monkeypatch):
    for name, options in (("a.png", {}), ("a.jpg", {}), ("b.jpg", {"progressive": True})):
        smooth(80, 40).save(tmp_path / name, **options)
    monkeypatch.setenv("UNION_MAX_MEGAPIXELS", "0.001")
    assert open_image(tmp_path / "a.jpg", at_least=8).size == (20, 10)
    for name in ("a.png", "a.jpg", "b.jpg"):
        with pytest.raises(ImageError, match=r"80 x 40 pixels are more than the limit of .*UNION_MAX_MEGAPIXELS"):
            open_image(tmp_path / name, at_least=None if name == "a.jpg" else 8)
    monkeypatch.setenv("UNION_MAX_MEGAPIXELS", "many")
    with pytest.raises(ImageError, match="UNION_MAX_MEGAPIXELS: 'many'"):
        open_image(tmp_path / "a.png")
    monkeypatch.delenv("UNION_MAX_MEGAPIXELS")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(tmp_path / "a.png").size == (80, 40)


def test_no_file_starts_a_program(tmp_path, monkeypatch):
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    for source in (tmp_path / "a.jpg", (tmp_path / "a.jpg").read_bytes()):
        with pytest.raises(ImageError, match="vector drawing"):
            as_image(source)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("suffix", ["avif", "jfif", "jp2", "heic", "qoi", "tga"])
def test_formats_beside_the_common_ones(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "heic":
        pytest.importorskip("pillow_heif", reason='the extra "heif" is not installed').register_heif_opener()
    smooth(64, 48).save(path)
    assert np.abs(np.asarray(open_image(path)).astype(int) - np.asarray(smooth(64, 48))).mean() < 6


def test_raw_files_and_addresses_are_named(tmp_path):
    smooth(64, 48).save(tmp_path / "a.tif")
    (tmp_path / "a.tif").rename(tmp_path / "a.NEF")
    with pytest.raises(ImageError, match=r"a\.NEF: camera RAW file"):
        open_image(tmp_path / "a.NEF")
    with pytest.raises(ImageError, match=r"https://host/a\.jpg is a web address"):
        as_image("https://host/a.jpg")
