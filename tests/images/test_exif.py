"""Columns from EXIF data: literal examples, and data that is corrupt or hostile."""

import datetime as dt
import io
import math
import warnings

import pytest
from hypothesis import given, settings, strategies as st
from PIL import ExifTags, Image

from photo_files import NIKON, PIXEL, photo
from union_igrot.images.decode import decode_image, file_exif
from union_igrot.images.exif import EXIF_COLUMNS, read_exif

PIXEL_COLUMNS = {
    "taken": "2024-05-01T18:30:05",
    "camera": "Pixel 8",
    "lens": "Pixel 8 back camera",
    "latitude": 47.4208333,
    "longitude": -122.505,
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_columns_of_a_photo_in_any_format(kind):
    data = photo(PIXEL, kind)
    assert file_exif(data) == pytest.approx(PIXEL_COLUMNS)
    while_decoding: dict = {}
    decode_image(io.BytesIO(data), exif=while_decoding)
    assert while_decoding == pytest.approx(PIXEL_COLUMNS)


def exif_of(main=(), detail=(), gps=()):
    return dict(file_exif(photo((dict(main), dict(detail), dict(gps)))))


def test_a_photo_without_data_and_one_with_some():
    assert exif_of() == {}
    assert file_exif(photo(NIKON)) == {"taken": "2023-12-31T23:59:59", "camera": "NIKON"}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("2024:05:01 18:30:05", "2024-05-01T18:30:05"),
        ("2024-05-01T18:30:05+02:00", "2024-05-01T18:30:05"),
        ("2024/05/01 18:30", "2024-05-01T18:30:00"),
        ("2024:05:01", "2024-05-01T00:00:00"),
        ("0000:00:00 00:00:00", None),
        ("2024:13:01 00:00:00", None),
        ("2023:02:29 00:00:00", None),
        ("    :  :     :  :  ", None),
        ("yesterday", None),
    ],
)
def test_dates(written, read):
    assert exif_of(detail={ExifTags.Base.DateTimeOriginal: written}).get("taken") == read


@pytest.mark.parametrize(
    ("written", "read"),
    [("  Canon\0EOS \x1b[31m R5\x07 ", "Canon EOS [31m R5"), ("x" * 5000, "x" * 200), ("\x00\x01", None)],
)
def test_names_of_cameras_are_printable_and_short(written, read):
    assert exif_of({ExifTags.Base.Model: written}).get("camera") == read


@pytest.mark.parametrize(
    ("north", "east", "read"),
    [
        (("N", (47, 25, 15)), ("W", (122, 30, 18)), (47.4208333, -122.505)),
        (("s", (0, 30, 0)), ("e", (180, 0, 0)), (-0.5, 180.0)),
        (("N", (90, 0, 1)), ("E", (1, 0, 0)), None),
        (("N", (1, 0, 0)), ("E", (180, 1, 0)), None),
        (("N", (0, 0, 0)), ("E", (0, 0, 0)), None),
        ((None, (47, 25, 15)), ("E", (1, 0, 0)), None),
        (("Q", (47, 25, 15)), ("E", (1, 0, 0)), None),
        (("N", ()), ("E", (1, 0, 0)), None),
    ],
)
def test_positions(north, east, read):
    gps = {}
    for tag, (side, angle) in ((2, north), (4, east)):
        gps |= ({} if side is None else {tag - 1: side}) | ({tag: angle} if angle else {})
    columns = exif_of(gps=gps)
    expected = {} if read is None else {"latitude": read[0], "longitude": read[1]}
    assert columns == pytest.approx(expected)


def check(columns):
    assert set(columns) <= set(EXIF_COLUMNS)
    assert ("latitude" in columns) == ("longitude" in columns)
    for name, value in columns.items():
        if EXIF_COLUMNS[name] == "str":
            assert isinstance(value, str)
            assert value.isprintable()
            assert 0 < len(value) <= 200
        else:
            assert isinstance(value, float)
            assert math.isfinite(value)
            assert abs(value) <= {"latitude": 90, "longitude": 180}[name]
    if "taken" in columns:
        assert dt.datetime.fromisoformat(columns["taken"]).isoformat() == columns["taken"]


def read_quietly(exif: bytes) -> dict:
    image = Image.new("RGB", (2, 2))
    image.info["exif"] = exif
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as while an image is decoded
        return dict(read_exif(image))


@given(
    st.binary(max_size=200), st.sampled_from([b"", b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0", b"Exif\0\0MM\0*\0\0\0\x08"])
)
@settings(max_examples=50, deadline=None)
def test_any_bytes_are_harmless(noise, head):
    check(read_quietly(head + noise))


@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_changed_bytes_are_harmless(changes):
    with Image.open(io.BytesIO(photo(PIXEL))) as image:
        data = bytearray(image.info["exif"])
    for place, value in changes:
        data[int(place * len(data))] = value
    check(read_quietly(bytes(data)))


ODD = st.one_of(
    st.none(), st.text(max_size=5), st.binary(max_size=5), st.integers(), st.floats(), st.lists(st.floats(), max_size=4)
)


@given(
    *[st.dictionaries(st.sampled_from(tags), ODD) for tags in ([0x010F, 0x0110], [0x9003, 0x9004, 0xA434], range(6))]
)
@settings(max_examples=50, deadline=None)
def test_values_of_any_type_are_harmless(main, detail, gps):
    class Hostile(Image.Exif):
        def get_ifd(self, tag):
            return detail if tag == ExifTags.IFD.Exif else gps

    class Picture(Image.Image):
        def getexif(self):
            exif = Hostile()
            exif.update(main)
            return exif

    check(read_exif(Picture()))
