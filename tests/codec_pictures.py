"""JPEGs of all kinds that cameras and programs write, and how they are indexed by either decoder."""

import io
from dataclasses import replace

import numpy as np
from PIL import ExifTags, Image

from union_igrot.gallery.engines.memory import MemoryIndex
from union_igrot.gallery.ingest.entries import Listing, data_entry
from union_igrot.gallery.ingest.pipeline import ingest_images
from union_igrot.gallery.ingest.report import IngestOptions
from union_igrot.models.model import load

QUIET = IngestOptions(batch_size=4, workers=0, progress=False)


def scene(seed, width=90, height=60):
    """Something smooth, as photos are: noise at all scales."""
    draw, layers = np.random.default_rng(seed), []
    for side in (2, 5, 11, 23):
        small = Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8))
        layers.append(np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float32))
    return Image.fromarray(np.mean(layers, axis=0).astype(np.uint8))


def jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 92, **options})
    return file.getvalue()


def indexed(entries, decoder, model=None, **changed):
    model = model or load("tiny")
    index = MemoryIndex(model.backbone.dim)
    report = ingest_images(index, model, Listing("here", entries), replace(QUIET, decoder=decoder, **changed))
    return report, index


def entries_of(**images):
    return [data_entry(name, data) for name, data in images.items()]


def exif(orientation):
    marks = Image.Exif()
    marks[ExifTags.Base.Orientation] = orientation
    return marks


PICTURES = {
    **{f"turned {n}": jpeg(scene(n), exif=exif(n)) for n in range(1, 9)},
    "progressive": jpeg(scene(20), progressive=True),
    "grey": jpeg(scene(21).convert("L")),
    "full chroma": jpeg(scene(22), subsampling=0),
    "one pixel": jpeg(scene(23, 1, 1)),
    "strip": jpeg(scene(24, 1500, 3)),
    "large": jpeg(scene(25, 700, 500)),
    "as large as the model's": jpeg(scene(26, 48, 48)),
    "cmyk": jpeg(scene(27).convert("CMYK")),
}
