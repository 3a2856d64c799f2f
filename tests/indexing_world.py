"""A folder of images, an index and a model that counts, for tests of indexing."""

import hashlib
import io
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from small_world import trainable
from union_igrot.gallery.engines.factory import open_index
from union_igrot.gallery.ingest.entries import Listing
from union_igrot.gallery.ingest.pipeline import ingest_images
from union_igrot.gallery.ingest.report import IngestOptions
from union_igrot.gallery.ingest.sources import list_images
from union_igrot.images.transforms import image_batch

QUIET = IngestOptions(batch_size=4, workers=0, progress=False)


def picture(seed, size=(12, 10)):
    """Bytes of an image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def fill(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(zlib.crc32(name.encode())))


class World:
    """A folder of images, an index, a model that counts, and what stands in the rows."""

    def __init__(self, folder, kind):
        self.pictures = folder / "pictures"
        self.pictures.mkdir()
        self.model = trainable("sum", "frozen")
        self.backbone = self.model.backbone
        if kind == "lance":
            pytest.importorskip("lance", reason='the extra "gallery" is not installed')
        self.uri = "memory:" if kind == "memory" else str(folder / "photos.lance")
        self.index = open_index(self.uri, dim=self.backbone.dim, create=True)

    def run(self, images=None, **changed):
        self.backbone.image_batches.clear()
        listing = images if isinstance(images, Listing) else list_images(str(images or self.pictures))
        return ingest_images(self.index, self.model, listing, replace(QUIET, **changed))

    @property
    def embedded(self):
        return sum(self.backbone.image_batches)

    def rows(self):
        columns = ["id", "hash", "size", "mtime", "width", "height", "thumbnail", "source", *self.index.columns]
        found = {}
        for batch in self.index.scan(list(dict.fromkeys(columns))):
            for at, name in enumerate(batch["id"]):
                assert name not in found, "a row stands twice"
                found[name] = {column: batch[column][at] for column in batch}
        return found

    def check(self, broken=()):
        """Hold the rows against the folder, image by image."""
        rows = self.rows()
        files = [path for path in self.pictures.rglob("*") if path.is_file() and path.name not in broken]
        assert set(rows) == {str(path) for path in files}
        vectors = self.index.fetch([str(path) for path in files]).vectors
        for path, vector in zip(files, vectors, strict=True):
            row, data = rows[str(path)], path.read_bytes()
            with Image.open(path) as opened:
                assert (row["width"], row["height"]) == opened.size
            assert row["hash"] == hashlib.sha256(data).hexdigest()[:32]
            assert (row["size"], row["mtime"]) == (len(data), path.stat().st_mtime_ns)
            with torch.inference_mode():
                alone = self.model.embed_gallery(image_batch([path], self.model.preprocess))[0]
            torch.testing.assert_close(vector, alone)
            with Image.open(io.BytesIO(row["thumbnail"])) as small:
                small.load()
                assert (small.format, max(small.size)) == ("JPEG", min(160, max(row["width"], row["height"])))


def counts(report):
    return report.added, report.updated, report.unchanged, report.removed, report.skipped, report.embedded
