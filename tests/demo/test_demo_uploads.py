import io
import multiprocessing
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from union_igrot.demo.session import (
    GRID,
    MAX_STROKES,
    THUMBNAIL_SIDE,
    decode_thumbnail,
    draw_strokes,
    encode_thumbnail,
    photo_reference,
    read_sketch,
    short_file_name,
)
from union_igrot.errors import DataError, ImageError
from union_igrot.service.uploads import KEPT_SIDE, Limits, UploadDecoder, decode_upload


def decode_photo(data, name, limits):
    return photo_reference(decode_upload(data, name, limits), name)


def as_file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header names many pixels and whose data would unpack to them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * min(height, 2000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_formats(kind):
    given = Image.new("RGB", (300, 200), (200, 30, 40))
    held = decode_photo(as_file(given, kind), f"cat.{kind.lower()}", Limits())
    assert (held.kind, held.name) == ("photo", f"cat.{kind.lower()}")
    kept = decode_thumbnail(held.image)
    assert kept.size == (300, 200)
    assert np.abs(np.asarray(kept).mean((0, 1)) - (200, 30, 40)).max() < 4
    assert max(decode_thumbnail(held.thumbnail).size) == THUMBNAIL_SIDE


def test_photos_are_upright_reduced_and_on_white():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    held = decode_photo(as_file(Image.new("RGB", (3000, 1500), "blue"), "JPEG", exif=exif), "big.jpg", Limits())
    assert decode_thumbnail(held.image).size == (KEPT_SIDE // 2, KEPT_SIDE)
    clear = decode_photo(as_file(Image.new("RGBA", (100, 100), (0, 0, 0, 0))), "clear.png", Limits())
    assert np.asarray(decode_thumbnail(clear.image)).min() >= 254


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        as_file(Image.effect_noise((90, 90), 80), "JPEG")[:900],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n",  # Pillow would start another program
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    ],
    ids=["empty", "text", "no header", "truncated", "postscript", "svg"],
)
def test_broken_and_foreign_files(data):
    with pytest.raises(ImageError, match=r"^Cannot decode holiday\.jpg; use a JPEG"):
        decode_photo(data, "holiday.jpg", Limits())


@pytest.mark.parametrize(("width", "height"), [(8000, 8000), (12_000, 9000), (60_000, 60_000)])
def test_a_decompression_bomb_is_refused_by_its_header(width, height, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("its pixels were decoded"))
    with pytest.raises(ImageError, match="more than 50 million pixels"):
        decode_photo(bomb(width, height), "bomb.png", Limits())


def test_limits():
    with pytest.raises(ImageError, match=r"x is larger than 0\.001 MB"):
        decode_photo(bytes(1001), "x", Limits(megabytes=0.001))
    data = as_file(Image.new("RGB", (20, 10)))
    assert decode_photo(data, "x", Limits(megabytes=len(data) / 1e6)).kind == "photo"
    assert decode_photo(data, "x", Limits(megapixels=200 / 1e6)).kind == "photo"
    with pytest.raises(ImageError, match="million pixels"):
        decode_photo(data, "x", Limits(megapixels=199 / 1e6))


@pytest.mark.parametrize(
    ("given_name", "shown"),
    [
        ("cat.jpg", "cat.jpg"),
        ("C:\\images\\cat.jpg", "cat.jpg"),
        ("../../etc/passwd", "passwd"),
        ("a\x00\nb.jpg", "ab.jpg"),
        ("", "The photo"),
        ("x" * 80, "x" * 59 + "…"),
    ],
)
def test_short_file_names(given_name, shown):
    assert short_file_name(given_name) == shown


def test_strokes_are_drawn_at_their_coordinates():
    page = np.asarray(draw_strokes([((0, 500), (1000, 500)), ((500, 500),)]).convert("L"))
    assert page.shape == (512, 512)
    dark = page < 128
    assert dark[256].all()
    assert not dark[:240].any()
    assert not dark[272:].any()
    dot = np.asarray(draw_strokes([((250, 750),)]).convert("L")) < 128
    rows, columns = np.nonzero(dot)
    assert np.abs(np.array([rows.mean(), columns.mean()]) - (384, 128)).max() < 1
    assert 12 <= np.ptp(rows) <= 16


POINTS = st.lists(st.tuples(*[st.integers(0, GRID)] * 2), min_size=1, max_size=6)


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(st.lists(POINTS.map(tuple), min_size=1, max_size=4))
def test_large_drawings_are_scaled_down_and_small_ones_unchanged(strokes):
    rows, columns = np.nonzero(np.asarray(draw_strokes(strokes, 0.5).convert("L")) < 128)
    assert max(np.ptp(rows), np.ptp(columns)) <= 0.5 * 512 + 18
    side = max(max(p[a] for s in strokes for p in s) - min(p[a] for s in strokes for p in s) for a in (0, 1))
    if side <= 500:
        assert draw_strokes(strokes, 0.5).tobytes() == draw_strokes(strokes).tobytes()


def test_a_sketch_is_read_from_strokes():
    assert read_sketch(None) is read_sketch([]) is read_sketch([[]]) is None
    held = read_sketch([[[1, 2], [3, 4]], [], [[5, 6]]])
    assert (held.kind, held.strokes) == ("sketch", (((1, 2), (3, 4)), ((5, 6),)))
    assert max(decode_thumbnail(held.thumbnail).size) == THUMBNAIL_SIDE


@pytest.mark.parametrize(
    "given_strokes", [7, "ab", [7], [[7]], [[[1]]], [[[1, 2, 3]]], [[[1, 2.5]]], [[[-1, 0]]], {"a": 1}]
)
def test_invalid_strokes(given_strokes):
    with pytest.raises(DataError, match="sketch is invalid"):
        read_sketch(given_strokes)
    with pytest.raises(DataError, match="too many strokes"):
        read_sketch([[[1, 1]]] * (MAX_STROKES + 1))


@pytest.mark.parametrize("side", [48, 80, 81, 500])
def test_thumbnails_are_lossless_if_small(side):
    image = Image.radial_gradient("L").resize((side, side)).convert("RGB")
    there = np.asarray(decode_thumbnail(encode_thumbnail(image)), dtype=int)
    assert np.abs(there - np.asarray(image, dtype=int)).max() <= (0 if side <= 80 else 12)


@pytest.mark.slow
def test_photos_are_decoded_in_another_process_within_a_time_limit():
    decode = UploadDecoder(Limits(megabytes=0.5), seconds=60.0)
    data = as_file(Image.new("RGB", (30, 20), "red"))
    assert decode(data, "a.png").tobytes() == decode_upload(data, "a.png", Limits()).tobytes()
    for broken, message in ((b"broken", "Cannot decode a"), (bytes(600_000), "larger than 0.5 MB")):
        with pytest.raises(ImageError, match=message):
            decode(broken, "a.png")
    (idle,) = decode._idle
    idle[0].kill()
    idle[0].join()
    assert decode(data, "a.png").size == (30, 20)  # by another process
    children = set(multiprocessing.active_children())
    assert len(decode._idle) == 1  # one process decodes again and again
    with pytest.raises(ImageError, match=r"^b\.png took longer than 0 s to decode; use another file"):
        UploadDecoder(Limits(), seconds=0.0)(as_file(Image.effect_noise((2000, 2000), 90)), "b.png")
    assert set(multiprocessing.active_children()) == children
