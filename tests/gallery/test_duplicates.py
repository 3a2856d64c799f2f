"""Near duplicates: literal groups, a slow search for groups, and the command."""

import io
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

import toy_engine  # noqa: F401 - registers its engine
from union_igrot.cli.duplicates import main
from union_igrot.errors import ConfigError
from union_igrot.gallery import duplicates
from union_igrot.gallery.duplicates import find_duplicates, perceptual_hashes
from union_igrot.gallery.engines.base import Rows
from union_igrot.gallery.engines.factory import MemoryIndex, open_index


def smooth(seed, size=(160, 120)):
    """An image of a few large spots, as photos have low frequencies."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def jpeg(image, quality=80):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def angle(degrees):
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


def fill(index, *rows):
    """Write rows of id, hash, width (as high as wide), thumbnail and vector."""
    names, digests, widths, thumbnails, vectors = zip(*rows, strict=True)
    columns = {"hash": digests, "width": widths, "height": widths, "size": [7] * len(rows), "thumbnail": thumbnails}
    index.upsert(Rows(list(names), torch.tensor(vectors), columns))
    return index


def shown(groups):
    return [[(hit.id, hit.columns["duplicate"]) for hit in group] for group in groups]


def test_the_strongest_reason_counts_and_the_best_copy_is_first():
    photo = smooth(1)
    index = fill(
        MemoryIndex(2),
        ("small.jpg", "b", 80, jpeg(photo.resize((80, 60)), 40), angle(30)),
        ("copy.jpg", "a", 160, jpeg(photo), angle(0)),
        ("first.jpg", "c", 640, jpeg(photo), angle(0)),
        ("burst.jpg", "d", 320, jpeg(smooth(2)), angle(10)),
        ("other.jpg", "e", 320, jpeg(smooth(3)), angle(90)),
        ("again.jpg", "c", 640, jpeg(photo), angle(0)),
    )
    found = find_duplicates(index, 0.95)
    expected = [
        ("first.jpg", None),
        ("again.jpg", "same file"),
        ("copy.jpg", "same image"),
        ("small.jpg", "same image"),
    ]
    similar = [("first.jpg", None), ("burst.jpg", "similar")]
    assert shown(found) == [expected, similar], (
        "copies are in one group, and only the best of them is similar to others"
    )
    assert found[0].scores == pytest.approx([1, 1, 1, math.cos(math.pi / 6)])
    assert found[1].scores == pytest.approx([1, math.cos(math.pi / 18)])
    assert dict(found[0][3].columns) == {"duplicate": "same image", "width": 80, "height": 80, "size": 7}
    assert all(hit.thumbnail is not None for hit in found[0])
    assert shown(find_duplicates(index, None)) == [expected]
    assert shown(find_duplicates(index, 0.95, "width < 600 and width > 100")) == [
        [("burst.jpg", None), ("copy.jpg", "similar")]
    ]
    assert len(index) == 6


@pytest.mark.parametrize(("widths", "expected"), [((3, 2, 1), ["ab"]), ((2, 3, 1), ["bac"]), ((1, 2, 3), ["cb"])])
def test_groups_are_not_chained(widths, expected):
    rows = [
        (name, name, width, b"", angle(15 * at)) for at, (name, width) in enumerate(zip("abc", widths, strict=True))
    ]
    found = find_duplicates(fill(MemoryIndex(2), *rows), math.cos(math.radians(20)))
    assert ["".join(group.ids) for group in found] == expected


def test_images_without_thumbnail_or_hash_have_no_copies_by_it():
    vectors = [angle(0), angle(90)]
    index = MemoryIndex(2)
    index.upsert(Rows(["a", "b"], torch.tensor(vectors), {}))
    assert find_duplicates(index, 0.9) == []
    assert find_duplicates(MemoryIndex(2), 0.9) == []


@pytest.mark.parametrize("threshold", [0, -1, 1.01, math.nan])
def test_an_invalid_threshold(threshold):
    with pytest.raises(ConfigError, match="threshold"):
        find_duplicates(MemoryIndex(2), threshold)


def test_the_calibration_of_an_index_is_no_part_of_its_embeddings():
    index = MemoryIndex(4, {"calibration": {"weight": 0.5}})
    vectors = torch.tensor([[1.0, 0, -0.3, 0], [1, 0, 0.4, 0.1], [0, 1, 0, 0]])
    index.upsert(Rows(["a", "b", "c"], vectors, {}))
    (group,) = find_duplicates(index, 0.99)
    assert (group.ids, group.scores) == (["a", "b"], [1, 1])


def slow_hash(small):
    low = [
        [
            sum(
                small[y][x] * math.cos(math.pi * u * (2 * y + 1) / 64) * math.cos(math.pi * v * (2 * x + 1) / 64)
                for y in range(32)
                for x in range(32)
            )
            for v in range(8)
        ]
        for u in range(8)
    ]
    flat = [value for row in low for value in row]
    return [value > float(np.median(flat)) for value in flat]


def test_perceptual_hashes_are_signs_of_low_frequencies():
    small = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    bits = np.unpackbits(perceptual_hashes(small).view(np.uint8).reshape(3, 8), axis=1).astype(bool)
    assert bits.tolist() == [slow_hash(one.tolist()) for one in small]


def slow_groups(rows, duplicates_of):
    """Literal: by decreasing width, each row that is in no group takes the duplicates that are in none."""
    groups, grouped = [], set()
    for at, first in enumerate(rows):
        members = [other[0] for other in rows[at + 1 :] if other[0] not in grouped and duplicates_of(first, other)]
        if members and first[0] not in grouped:
            grouped |= {first[0], *members}
            groups.append([first[0], *members])
    return groups


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5), st.integers(0, 71)), max_size=25),
    st.sampled_from([1, 200, 2**20]),
)
@settings(max_examples=60, deadline=None)
def test_groups_equal_a_slow_search_in_blocks_of_any_size(given_rows, block):
    rows = [
        (f"{at}", f"{digest}" if digest < 4 else f"own {at}", width, b"", angle(5 * step + 0.1))
        for at, (digest, width, step) in enumerate(given_rows)
    ]
    limit = math.cos(math.radians(12.5))
    index = fill(MemoryIndex(2), *rows) if rows else MemoryIndex(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "BLOCK_BYTES", block)
        found = find_duplicates(index, limit)
    ordered = sorted(rows, key=lambda row: -row[2])
    copies = slow_groups(ordered, lambda a, b: a[1] == b[1])
    left = [row for row in ordered if not any(row[0] in group[1:] for group in copies)]
    similar = slow_groups(left, lambda a, b: sum(x * y for x, y in zip(a[4], b[4], strict=True)) >= limit)
    expected = [
        (group[0], sorted(group[1:]), reason)
        for groups, reason in ((copies, "same file"), (similar, "similar"))
        for group in groups
    ]
    reasons = [{hit.columns["duplicate"] for hit in group[1:]} for group in found]
    assert sorted(
        (group.ids[0], sorted(group.ids[1:]), *why) for group, why in zip(found, reasons, strict=True)
    ) == sorted(expected)


# The command


NASTY = "/photos/<script>alert('x')</script>\x1b[31m.jpg"


@pytest.fixture
def uri():
    name = "toy:duplicates"
    with open_index(name, dim=2, create=True) as index:
        index.delete([str(one) for batch in index.scan(["id"]) for one in batch["id"]])
        fill(
            index, (NASTY, "a", 640, jpeg(smooth(1)), angle(0)), ("/photos/b.jpg", "a", 640, jpeg(smooth(1)), angle(0))
        )
    return name


def test_the_command_prints_lines_and_writes_a_page(uri, tmp_path, capsys):
    main([f"index={uri}", f"html={tmp_path / 'page.html'}", "progress=false"])
    (line,) = capsys.readouterr().out.splitlines()
    group = json.loads(line)
    assert group["group"] == 1
    assert [(one["id"], one["duplicate"], one["score"]) for one in group["images"]] == [
        (NASTY, None, 1.0),
        ("/photos/b.jpg", "same file", 1.0),
    ]
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert page.count("data:image/jpeg;base64,") == 2
    assert "same file" in page


def test_the_command_prints_a_table(uri, capsys):
    main([f"index={uri}", "format=table", "progress=false"])
    out = capsys.readouterr().out
    assert "group 1 of 1" in out
    assert "same file" in out
    assert "\x1b" not in out


def test_the_command_exits_with_1_without_duplicates(uri, capsys):
    with pytest.raises(SystemExit) as ended:
        main([f"index={uri}", "where=id = '/photos/b.jpg'", "progress=false"])
    assert ended.value.code == 1
    assert capsys.readouterr() == ("", "no duplicates\n")


def test_a_page_that_cannot_be_written_is_one_line(uri, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([f"index={uri}", f"html={tmp_path}/none/page.html", "progress=false"])
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
