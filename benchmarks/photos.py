"""Measure a model on photos and sketches of the same classes: what text, photos and sketches find.

    python benchmarks/photos.py --data FOLDER [--checkpoint photos]

The folder holds `manifest.csv` (domain, path, class, split). Mean average precision over whole rankings: the mean over
classes for texts ("a photo of a CLASS", names as they are), over queries for images; a photo is not its own hit. The
95 % intervals resample classes, then their queries (seed 0).
"""

import argparse
import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from union_igrot.metrics.functional import average_precision
from union_igrot.metrics.statistics import Interval, bootstrap_interval
from union_igrot.models.model import load


class Row(NamedTuple):
    """A row of the table; all but the counts in percent."""

    value: float
    interval: Interval
    chance: float
    queries: int
    gallery: int


def mean_ap(scores: Tensor, queries: Sequence[str], gallery: Sequence[str], itself: bool = False) -> Row:
    """Return the mean average precision; `itself`: query i is gallery image i."""
    if itself:
        scores = scores.clone().fill_diagonal_(float("-inf"))
    names = {name: i for i, name in enumerate(sorted({*queries, *gallery}))}
    asked, shown = (torch.tensor([names[name] for name in some]) for some in (queries, gallery))
    order = scores.argsort(dim=1, descending=True)[:, : len(gallery) - itself]
    hits = shown[order] == asked[:, None]
    found = 100 * average_precision(hits, hits.sum(1), norm="all")
    interval = bootstrap_interval(found, classes=asked)
    return Row(found.mean().item(), interval, 100 * hits.float().mean().item(), *scores.shape)


def main() -> None:
    """Encode everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with manifest.csv")
    parser.add_argument("--checkpoint", default="photos", help="model to load")
    parser.add_argument("--split", default="test", help="split whose classes are the first rows")
    args = parser.parse_args()
    model = load(args.checkpoint)
    with (args.data / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    photos = [row for row in rows if row["domain"] == "photo"]
    sketches = [row for row in rows if row["domain"] == "sketch" and row["split"] == args.split]
    start = time.monotonic()
    gallery = model.encode_gallery([args.data / row["path"] for row in photos], progress=True)
    rate = len(photos) / (time.monotonic() - start)
    drawn = model.encode_queries([args.data / row["path"] for row in sketches], progress=True)
    asked = model.encode_queries(
        [args.data / row["path"] for row in photos if row["split"] == args.split], progress=True
    )
    classes = sorted({row["class"] for row in photos})
    texts = torch.nn.functional.normalize(
        model.backbone.encode_text([f"a photo of a {name.replace('_', ' ')}" for name in classes]).pooled, dim=1
    )

    labels = [row["class"] for row in photos]
    inside = [i for i, row in enumerate(photos) if row["split"] == args.split]
    few = [labels[i] for i in inside]
    held = [i for i, name in enumerate(classes) if name in few]
    sketched = [row["class"] for row in sketches]
    values = {
        f"text -> photo, classes of {args.split}, all photos": mean_ap(
            texts[held] @ gallery.T, [classes[i] for i in held], labels
        ),
        "text -> photo, all classes, all photos": mean_ap(texts @ gallery.T, classes, labels),
        f"photo -> photo, {args.split}": mean_ap(asked @ gallery[inside].T, few, few, itself=True),
        f"sketch -> photo, {args.split}": mean_ap(drawn @ gallery[inside].T, sketched, few),
        f"sketch -> photo, {args.split}, all photos": mean_ap(drawn @ gallery.T, sketched, labels),
    }
    table = Table("mAP", "%", "95 %", "chance", "queries", "gallery")
    for name, row in values.items():
        low, high = row.interval
        sizes = (f"{row.queries:,}", f"{row.gallery:,}")
        table.add_row(name, f"{row.value:.1f}", f"{low:.1f} to {high:.1f}", f"{row.chance:.1f}", *sizes)
    console = Console()
    console.print(table)
    each = {name: mean_ap(texts[[i]] @ gallery.T, [name], labels).value for i, name in enumerate(classes)}
    console.print(
        "text -> photo by class:", ", ".join(f"{n} {v:.0f}" for n, v in sorted(each.items(), key=lambda x: x[1]))
    )
    console.print(f"{model.fingerprint()}; {rate:.0f} images/s with {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
