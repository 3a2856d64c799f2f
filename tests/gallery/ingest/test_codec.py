"""JPEGs decoded together by TorchCodec become the rows that Pillow makes of them, but for a step or two in a pixel.

On the CPU, where TorchCodec decodes too: what is particular to a GPU is in `test_cuda`.
"""

import io
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from codec_pictures import PICTURES, entries_of, indexed, jpeg, scene
from small_world import trainable
from union_igrot.errors import ConfigError
from union_igrot.gallery.ingest import decode as codec
from union_igrot.gallery.ingest.decode import JpegBatchDecoder
from union_igrot.gallery.ingest.entries import data_entry
from union_igrot.images.decode import decode_image, plain_jpeg
from union_igrot.images.transforms import ImageToPixels
from union_igrot.types import Preprocess

pytest.importorskip("torchcodec", reason='the extra "codec" is not installed')
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_rows_are_those_of_pillow(workers):
    file = io.BytesIO()
    scene(30).save(file, "PNG")
    entries = entries_of(png=file.getvalue(), **PICTURES, again=PICTURES["grey"])
    found = {}
    for decoder in ("pillow", "torchcodec"):
        report, index = indexed(entries, decoder, workers=workers)
        assert (report.added, report.embedded, report.skipped) == (18, 17, 0)
        found[decoder] = index.fetch([entry.id for entry in entries])
    for name in ("width", "height", "hash", "size", "source"):
        assert found["torchcodec"].columns[name] == found["pillow"].columns[name], name
    cosines = (found["torchcodec"].vectors * found["pillow"].vectors).sum(1)
    assert cosines.min() > 0.995, dict(zip(found["pillow"].ids, cosines.tolist(), strict=True))
    others = found["torchcodec"].vectors @ found["pillow"].vectors.T
    assert others.argmax(1).tolist()[:17] == list(range(17))  # each row is its own image's
    for pair in zip(found["torchcodec"].columns["thumbnail"], found["pillow"].columns["thumbnail"], strict=True):
        one, other = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int) for data in pair)
        assert one.shape == other.shape
        assert np.abs(one - other).mean() < 4


def test_a_file_that_is_cut_off_is_told_in_pillows_words():
    """The image within the EXIF ends properly, the one around it does not: a decoder may show its upper half."""
    whole = jpeg(scene(1, 300, 200))
    inner = jpeg(scene(2, 30, 20))
    start = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(inner) + 8) + b"Exif\0\0" + inner + whole[2:]
    entries = entries_of(whole=start, cut=start[: len(start) * 2 // 3], no=b"\xff\xd8\xff\xdano picture\xff\xd9")
    reasons = {}
    for decoder in ("pillow", "torchcodec"):
        report, index = indexed(entries, decoder)
        assert [name for batch in index.scan(["id"]) for name in batch["id"]] == ["whole"]
        reasons[decoder] = (report.skipped, report.reasons)
    assert reasons["torchcodec"] == reasons["pillow"]
    assert "truncated" in str(reasons["pillow"])


def test_what_torchcodec_refuses_goes_to_pillow(monkeypatch):
    """It decodes a whole batch or none, and does not say of which image it complains."""
    from torchcodec import decoders  # noqa: PLC0415

    asked = []

    def refusing(jpegs, **_):
        asked.append(len(jpegs))
        raise RuntimeError("one of them is broken")

    monkeypatch.setattr(decoders, "decode_jpeg", refusing)
    broken = bytearray(jpeg(scene(3)))
    broken[100:160] = bytes(60)  # within its tables
    entries = entries_of(**PICTURES, broken=bytes(broken))
    report, index = indexed(entries, "torchcodec")
    assert sum(asked) == len(PICTURES) - 1 + (plain_jpeg(bytes(broken)) is not None)
    expected, by_pillow = indexed(entries, "pillow")
    assert (report.added, report.skipped) == (expected.added, expected.skipped) == (len(PICTURES), 1)
    assert index.fetch(list(PICTURES)).vectors.equal(by_pillow.fetch(list(PICTURES)).vectors)


def test_equal_files_are_decoded_once(monkeypatch):
    decoded = []
    plain = JpegBatchDecoder._decode_group

    def counted(self, jpegs):
        decoded.append(len(jpegs))
        return plain(self, jpegs)

    monkeypatch.setattr(JpegBatchDecoder, "_decode_group", counted)
    entries = [data_entry(f"{n}", PICTURES[f"turned {1 + n % 3}"]) for n in range(11)]
    report, index = indexed(entries, "torchcodec", trainable("sum", "frozen"))
    assert (report.added, report.embedded, sum(decoded)) == (11, 3, 3)
    vectors = index.fetch([str(n) for n in range(11)]).vectors
    for n in range(11):
        assert vectors[n].equal(vectors[n % 3])


@given(st.lists(st.integers(0, 3 * 2**27), min_size=1, max_size=40))
def test_a_batch_is_cut_at_so_many_pixels(sizes):
    jpegs = [(pixels, torch.tensor([at], dtype=torch.uint8)) for at, pixels in enumerate(sizes)]
    groups = list(codec.split_by_pixels(jpegs))
    assert [jpeg for group in groups for jpeg in group] == jpegs
    totals = [sum(pixels for pixels, _ in group) for group in groups]
    assert all(len(group) == 1 or total <= codec.MAX_PIXELS for group, total in zip(groups, totals, strict=True))
    for total, following in zip(totals, groups[1:], strict=False):
        assert total + following[0][0] > codec.MAX_PIXELS


@given(
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(2, 40),
    st.sampled_from(["squash", "crop", "pad"]),
    st.sampled_from(["bicubic", "bilinear"]),
)
@settings(max_examples=60, deadline=None)
def test_decoded_pixels_are_brought_to_a_size_as_pictures_are(width, height, size, fit, interpolation):
    to_pixels = ImageToPixels(Preprocess(size, MEAN, STD, fit, interpolation))
    picture = scene(width * 1000 + height, width, height)
    decoded = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    one, many = to_pixels(picture), to_pixels.resize_batch(torch.stack([decoded, decoded]))
    assert many.dtype == torch.uint8
    assert many[0].equal(many[1])
    assert (many[0].int() - one.int()).abs().max() <= 2


def test_what_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(codec.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r'pip install "union-igrot\[codec\]"'):
        indexed(entries_of(one=PICTURES["grey"]), "torchcodec")


def test_plain_jpegs_are_told_from_all_else():
    assert plain_jpeg(PICTURES["large"]) == 700 * 500
    assert plain_jpeg(PICTURES["progressive"]) == 90 * 60
    assert plain_jpeg(PICTURES["large"] + b"behind its end") == 700 * 500
    file = io.BytesIO()
    scene(1).save(file, "PNG")
    for other in (PICTURES["cmyk"], file.getvalue(), b"", b"\xff\xd8", b"text", PICTURES["large"][:-100]):
        assert plain_jpeg(other) is None
    assert decode_image(io.BytesIO(PICTURES["large"]))[1] == (700, 500)
