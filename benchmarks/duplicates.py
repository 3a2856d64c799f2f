"""Measure near duplicates: precision and recall on photos saved again in several ways, and the cost for many rows.

    python benchmarks/duplicates.py --data FOLDER [--checkpoint photos]
    python benchmarks/duplicates.py --rows 100000 [--dim 512]

The folder holds `manifest.csv` (domain, path, class, split). Some photos are copied, saved again, resized and cropped;
the others are merely similar. An image is found if it is in a group with another version of its photo; a pair of a
group's first image with another counts as wrong if they are versions of two photos.
"""

import argparse
import csv
import io
import random
import resource
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from union_igrot.gallery.duplicates import find_duplicates
from union_igrot.gallery.engines.base import Rows
from union_igrot.gallery.engines.factory import MemoryIndex
from union_igrot.gallery.gallery import Gallery

SIDES = {"cropped to 95 % of its sides": 0.95, "cropped to 85 %": 0.85}


def encode(image: Image.Image, quality: int = 90) -> bytes:
    """Return an image as a JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def versions(data: bytes, rng: random.Random) -> dict[str, bytes]:
    """Return a photo saved again in several ways."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    made = {
        "copied": data,
        "saved with quality 40": encode(image, 40),
        "half as large": encode(image.resize((width // 2, height // 2), Image.Resampling.LANCZOS)),
    }
    for name, side in SIDES.items():
        left, top = rng.uniform(0, 1 - side) * width, rng.uniform(0, 1 - side) * height
        made[name] = encode(image.crop(tuple(map(round, (left, top, left + side * width, top + side * height)))))
    return made


def measure_quality(folder: Path, checkpoint: str, photos: int, others: int) -> None:
    """Print what is found of each kind, and how many pairs are right, by threshold."""
    rng = random.Random(0)
    with (folder / "manifest.csv").open() as file:
        paths = [row["path"] for row in csv.DictReader(file) if row["domain"] == "photo"]
    rng.shuffle(paths)
    files = {}
    for number, path in enumerate(paths[: photos + others]):
        files[f"{number}/original"] = (folder / path).read_bytes()
        if number < photos:
            files |= {f"{number}/{kind}": data for kind, data in versions(files[f"{number}/original"], rng).items()}
    gallery = Gallery.open("memory:", checkpoint)
    gallery.add(list(files.values()), list(files))
    for threshold in (0.9, 0.95, 0.98):
        found, right, wrong = Counter(), Counter(), []
        for group in gallery.duplicates(threshold):
            origins = Counter(hit.id.split("/")[0] for hit in group)
            for hit in group:
                found[hit.id.split("/")[1]] += origins[hit.id.split("/")[0]] > 1
            for hit in group[1:]:
                same = hit.id.split("/")[0] == group[0].id.split("/")[0]
                right[hit.columns["duplicate"]] += same
                wrong += [] if same else [(hit.columns["duplicate"], group[0].id, hit.id)]
        print(f"\nthreshold {threshold}")
        for kind in versions(files["0/original"], rng):
            print(f"  {kind}: {100 * found[kind] / photos:.1f} % found")
        for reason in dict.fromkeys([*right, *(reason for reason, *_ in wrong)]):
            bad = [pair for why, *pair in wrong if why == reason]
            print(f"  {reason}: {right[reason]} pairs right, {len(bad)} wrong {bad[:40]}")


def measure_cost(rows: int, dim: int) -> None:
    """Print time and memory for random unit vectors, each tenth of them a near copy, with thumbnails of noise."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(rows, dim, generator=generator), dim=1)
    vectors[9::10] = vectors[: len(vectors[9::10])]
    rng = np.random.default_rng(0)
    spots = [Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)) for _ in range(500)]
    thumbnails = [encode(spot.resize((160, 120), Image.Resampling.BICUBIC)) for spot in spots]
    index = MemoryIndex(dim)
    shown = [thumbnails[i % len(thumbnails)] if i < 5 * len(thumbnails) else encode_noise(rng) for i in range(rows)]
    index.upsert(Rows([str(i) for i in range(rows)], vectors, {"thumbnail": shown}))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    cpu = time.process_time()
    groups = find_duplicates(index)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{rows:,} rows of width {dim}: {len(groups):,} groups, {time.monotonic() - start:.0f} s, "
        f"{time.process_time() - cpu:.0f} s of CPU, {(after - before) / 1024:.0f} MB more at the peak"
    )


def encode_noise(rng: np.random.Generator) -> bytes:
    """Return a thumbnail of a few random spots."""
    spots = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return encode(spots.resize((160, 120), Image.Resampling.BILINEAR))


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with manifest.csv")
    parser.add_argument("--checkpoint", default="photos", help="model to load")
    parser.add_argument("--photos", type=int, default=250, help="photos that are saved again")
    parser.add_argument("--others", type=int, default=900, help="other photos")
    parser.add_argument("--rows", type=int, help="rows of a random index")
    parser.add_argument("--dim", type=int, default=512, help="width of its vectors")
    arguments = parser.parse_args()
    if arguments.data is not None:
        measure_quality(arguments.data, arguments.checkpoint, arguments.photos, arguments.others)
    if arguments.rows is not None:
        measure_cost(arguments.rows, arguments.dim)


if __name__ == "__main__":
    main()
