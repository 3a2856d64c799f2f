"""The list of image formats, and what is said of other files."""

import pytest
from PIL import Image

from union_igrot.images import formats
from union_igrot.images.formats import (
    FORMATS,
    IMAGE_SUFFIXES,
    decoded_formats,
    describe_name,
    describe_unused,
    is_ignored,
    is_image_name,
    unknown_format,
)


def test_every_suffix_belongs_to_its_format_in_pillow():
    registered = Image.registered_extensions()
    for name in decoded_formats():
        for suffix in set(FORMATS[name]) & registered.keys():
            assert registered[suffix] in (name, "MPO", "BMP"), suffix
    assert len(set(IMAGE_SUFFIXES)) == len(IMAGE_SUFFIXES)
    assert {"JPEG", "PNG", "WEBP", "AVIF", "JPEG2000"} <= set(decoded_formats())


def test_no_decoded_format_starts_a_program():
    assert not {"EPS", "WMF", "PDF", "MPEG", "HDF5", "GRIB", "BUFR"} & set(decoded_formats())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.JPG", True), ("a.avif", True), ("b.jfif", True), ("c.nef", False), ("d.txt", False), ("e", False)],
)
def test_names_of_images(name, expected):
    assert is_image_name(name) is expected


@pytest.mark.parametrize("name", [".git", "@eaDir", "#recycle", "$RECYCLE.BIN", "Thumbs.db"])
def test_service_names_are_ignored(name):
    assert is_ignored(name)
    assert not is_ignored(f"my {name}")


@pytest.mark.parametrize(
    ("head", "name", "expected"),
    [
        (b"\0\0\0\x18ftypcrx " + bytes(20), "x", "camera RAW"),
        (b"\0\0\0\x18ftypisom" + bytes(20), "x", "video"),
        (b"\xff\x0a", "x", "JPEG XL"),
        (b"\n<svg xmlns", "x", "vector drawing"),
        (b"%!PS-Adobe", "holiday.jpg", "vector drawing"),
        (b"MM\0*", "a.NEF", "camera RAW"),
        (b"hello", "a.jpg", "no known image format"),
    ],
)
def test_unknown_formats_are_described(head, name, expected):
    assert expected in unknown_format(head, name)


@pytest.mark.parametrize(("known", "expected"), [((), "union-igrot[heif]"), (("HEIF",), "damaged HEIC image")])
def test_the_advice_to_install_a_plug_in_is_for_those_without_it(monkeypatch, known, expected):
    monkeypatch.setattr(formats, "decoded_formats", lambda: known)
    assert expected in unknown_format(b"\0\0\0\x18ftypheic" + bytes(20))
    assert bool(describe_name("a.HEIC")) is not bool(known)


def test_unused_files_are_counted_by_suffix():
    assert describe_unused([]) == ""
    assert describe_unused(["a.txt"]) == "1 other file (1 .txt)"
    said = describe_unused(["a.txt", "b.TXT", "c.nef", "README"])
    assert said.startswith("4 other files (2 .txt, 1 .nef: camera RAW file")
    assert "1 without suffix" in said
