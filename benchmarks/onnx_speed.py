"""Indexing in torch and in ONNX Runtime, from JPEG files to rows, and what 8 bits change.

    python benchmarks/onnx_speed.py FOLDER --models photos base tinyclip --images 512

Each model indexes the same images in each precision, one after the other, `--repeats` times; the fastest counts. CPU
time is that of all processes and threads. Recall@10: how many of the ten nearest images by float32 embeddings are among
the ten nearest in 8 bits, each image being a query in float32. `TinyCLIP`, `ViT-B-32` and other architectures of
OpenCLIP have seeded weights.
"""

import argparse
import os
import time
from pathlib import Path

import open_clip
import torch
from rich.console import Console
from rich.table import Table
from step_time import build_model

from union_igrot.gallery.engines.factory import MemoryIndex
from union_igrot.gallery.ingest.entries import Listing
from union_igrot.gallery.ingest.pipeline import ingest_images
from union_igrot.gallery.ingest.report import IngestOptions
from union_igrot.gallery.ingest.sources import list_images
from union_igrot.models.model import IGROTModel, baseline, load
from union_igrot.models.onnx import open_gallery_session

TINYCLIP = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 10, "width": 256, "head_width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 3},
}
"""Sizes of TinyCLIP-ViT-8M-16-Text-3M."""
PRECISIONS = {"torch float32": "32-true", "ONNX float32": "onnx", "ONNX int8": "int8"}


def cpu_seconds() -> float:
    """Return the CPU time of this process and of its ended children."""
    return sum(os.times()[:4])


def index(model: IGROTModel, listing: Listing, precision: str) -> tuple[torch.Tensor, float, float]:
    """Index images; return their embeddings, images per second, and milliseconds of CPU time per image."""
    rows = MemoryIndex(model.backbone.dim, {"precision": "int8"} if precision == "int8" else {})
    start, cpu = time.perf_counter(), cpu_seconds()
    ingest_images(rows, model, listing, IngestOptions(progress=False, precision=precision, file_columns="none"))
    spent, used, count = time.perf_counter() - start, cpu_seconds() - cpu, len(listing.entries)
    return rows.fetch([entry.id for entry in listing.entries]).vectors, count / spent, 1000 * used / count


def recall_at_10(exact: torch.Tensor, rounded: torch.Tensor) -> float:
    """Return the mean share of the ten nearest rows that stay among the ten nearest; an image is not its own."""
    own = torch.eye(len(exact), dtype=torch.bool)
    nearest, found = ((exact @ rows.T).masked_fill(own, -2).topk(10).indices for rows in (exact, rounded))
    return (nearest[:, :, None] == found[:, None, :]).any(2).float().mean().item()


def main() -> None:
    """Index with each model in each precision and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", default=["photos"])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    listing = list_images(str(args.folder))
    step = max(1, len(listing.entries) // args.images)
    listing = Listing(listing.source, listing.entries[::step][: args.images])
    table = Table(title=f"{len(listing.entries):,} images, {torch.get_num_threads()} threads of {os.cpu_count()} cores")
    for column in ("model", "", "images/s", "CPU ms per image", "least cosine", "recall@10"):
        table.add_column(column)
    open_clip.factory._MODEL_CONFIGS["TinyCLIP"] = TINYCLIP
    for name in args.models:
        seeded = name in open_clip.list_models()
        model = baseline(build_model(name).backbone, "sum") if seeded else load(name)
        for precision in ("fp32", "int8"):
            open_gallery_session(model, precision)  # exported before the clock starts
        runs = [{kind: index(model, listing, how) for kind, how in PRECISIONS.items()} for _ in range(args.repeats)]
        exact = runs[0]["torch float32"][0]
        for kind in PRECISIONS:
            rows, rate, cpu = runs[0][kind][0], max(run[kind][1] for run in runs), min(run[kind][2] for run in runs)
            cosine = (rows * exact).sum(1).min().item()
            table.add_row(name, kind, f"{rate:.1f}", f"{cpu:.1f}", f"{cosine:.5f}", f"{recall_at_10(exact, rows):.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
