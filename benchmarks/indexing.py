"""Images a second from files to rows, beside the bare forward of the backbone on the same images.

    python benchmarks/indexing.py                                     # CLIP ViT-B/32, random weights, CPU
    python benchmarks/indexing.py --arch ViT-L-14 --device cuda --precision bf16-mixed
    python benchmarks/indexing.py --arch tiny --images 5000 --side 4000

Rows: the backbone's bare forward on batches that are on its device, the whole model on them,
decoding alone, in as many worker processes, and indexing from the first file to the last row (Lance if it is installed,
else in memory), new and unchanged; with --ray also on one Ray actor. A line splits Pillow's time into steps. Images are
generated JPEGs with detail at all scales, so that they decode as photos do. Weights are random: time does not depend on
them.
"""

import argparse
import hashlib
import importlib.util
import io
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from step_time import build_model

from union_igrot.gallery.engines.factory import open_index
from union_igrot.gallery.ingest.embedding import decode_entries, make_thumbnail
from union_igrot.gallery.ingest.pipeline import ingest_images
from union_igrot.gallery.ingest.report import IngestOptions, IngestReport
from union_igrot.gallery.ingest.sources import list_images
from union_igrot.images.decode import decode_image
from union_igrot.images.transforms import ImageToPixels, model_input
from union_igrot.models.model import IGROTModel, load

DISTINCT = 128
"""Distinct images; more are copies with other trailing bytes."""
CAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time indexing against the bare forward.")
    parser.add_argument("--arch", default="ViT-B-32", help="an open_clip architecture, or tiny")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument("--precision", default="32-true", choices=CAST)
    parser.add_argument("--batch", default=32, type=int)
    parser.add_argument("--images", default=256, type=int)
    parser.add_argument("--side", default=1280, type=int, help="longer side of the images in pixels; 4:3")
    parser.add_argument("--workers", default=max(1, (os.cpu_count() or 2) - 1), type=int)
    parser.add_argument("--sample", default=None, type=int, help="images of the rows without indexing; default all")
    parser.add_argument("--ray", action="store_true", help="also index on one Ray actor")
    parser.add_argument("--repeats", default=3, type=int, help="the fastest of these counts")
    parser.add_argument("--json", default=None, help="also write the metrics to this file")
    return parser.parse_args()


def write_images(folder: Path, count: int, side: int) -> int:
    """Write JPEGs of noise at all scales; return their mean size in bytes."""
    rng = np.random.default_rng(0)
    high, wide = side * 3 // 4, side
    layers = []
    for scale in range(9):
        small = rng.integers(0, 256, (max(1, high >> scale), max(1, wide >> scale), 3), dtype=np.uint8)
        layers.append(np.asarray(Image.fromarray(small).resize((wide, high), Image.Resampling.BICUBIC), np.float32))
    weights = [1.2**at for at in range(len(layers))]  # about as many bytes per pixel as photos
    texture = sum(layer * weight for layer, weight in zip(layers, weights, strict=True)) / sum(weights)
    made = []
    for number in range(min(count, DISTINCT)):
        shifted = np.roll(texture, (37 * number % high, 53 * number % wide), axis=(0, 1)).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(shifted).save(file, "JPEG", quality=88)
        made.append(file.getvalue())
    for number in range(count):  # trailing bytes make it another file and are not decoded
        (folder / f"{number:06d}.jpg").write_bytes(made[number % len(made)] + number.to_bytes(4, "big"))
    return sum(map(len, made)) // len(made)


def fastest(repeats: int, work: Callable[[], object], device: str) -> float:
    """Return the seconds of the fastest of some repeats."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def decoded(model: IGROTModel, folder: Path, arguments: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Decode the sample as indexing does."""
    options = IngestOptions(arguments.batch, arguments.workers)
    entries = list_images(str(folder)).entries[: arguments.sample]
    batches = decode_entries(model, entries, options, np.empty(0, dtype=np.uint64))
    return (pixels for _, _, pixels, _ in batches)


def decoder_steps(model: IGROTModel, folder: Path, most: int = 100) -> dict[str, float]:
    """Time the steps of decoding an image, in this process, in milliseconds per image."""
    spent = dict.fromkeys(("read and hash", "decode", "resize", "thumbnail"), 0.0)
    to_pixels, files = ImageToPixels(model.preprocess), sorted(folder.iterdir())[:most]
    for file in files:
        marks = [time.perf_counter()]
        data = file.read_bytes()
        hashlib.sha256(data).hexdigest()
        marks.append(time.perf_counter())
        image, _ = decode_image(io.BytesIO(data), model.preprocess.size)
        marks.append(time.perf_counter())
        to_pixels(image)
        marks.append(time.perf_counter())
        make_thumbnail(image)
        marks.append(time.perf_counter())
        for step, begin, end in zip(spent, marks, marks[1:], strict=False):
            spent[step] += 1000 * (end - begin) / len(files)
    return spent


def index(
    model: IGROTModel, folder: Path, uri: str, arguments: argparse.Namespace, executor: str = "local"
) -> IngestReport:
    """Index the images."""
    options = IngestOptions(
        arguments.batch,
        arguments.workers,
        progress=False,
        cache=folder.parent / "cache",
        precision=arguments.precision,
        executor=executor,
        actors=1,
    )
    with open_index(uri, dim=model.backbone.dim, create=True) as rows:
        return ingest_images(rows, model, list_images(str(folder)), options)


def main() -> None:
    """Time everything and print a table and JSON."""
    arguments = read_arguments()
    model = load("tiny") if arguments.arch == "tiny" else build_model(arguments.arch)
    model = model.to(arguments.device).eval()
    cast = CAST[arguments.precision]
    engine = "lance" if importlib.util.find_spec("lance") else "memory:"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "images"
        folder.mkdir()
        size = write_images(folder, arguments.images, arguments.side)
        sample = decoded(model, folder, arguments)
        batches = [model_input(pixels.to(arguments.device), model.preprocess) for pixels in sample]

        def forward(whole: bool) -> None:
            kind = arguments.device.split(":")[0]
            with torch.inference_mode(), nullcontext() if cast is None else torch.autocast(kind, cast):
                for batch in batches:
                    (model.embed_gallery if whole else model.backbone.encode_image)(batch)

        forward(whole=True)
        repeats, device = arguments.repeats, arguments.device
        seconds = {"backbone forward, bare": fastest(repeats, lambda: forward(whole=False), device)}
        seconds["whole model"] = fastest(repeats, lambda: forward(whole=True), device)
        del batches[1:]
        steps = decoder_steps(model, folder)
        seconds["decoding alone"] = fastest(repeats, lambda: list(decoded(model, folder, arguments)), device)
        uris = [engine if engine == "memory:" else f"{place}/{number}.lance" for number in range(repeats)]
        made = [index(model, folder, uri, arguments) for uri in uris]
        reports = {"indexing": min(made, key=lambda report: report.working)}
        seconds["reading and embedding"] = reports["indexing"].working
        seconds["indexing"] = min(report.seconds for report in made)
        again = None if engine == "memory:" else index(model, folder, uris[0], arguments)
        if arguments.ray:
            uri = engine if engine == "memory:" else f"{place}/ray.lance"
            reports["Ray"] = index(model, folder, uri, arguments, "ray")
            seconds["indexing, one Ray actor"] = reports["Ray"].seconds
    print_results(arguments, seconds, steps, reports, again, size)


def print_results(
    arguments: argparse.Namespace,
    seconds: dict[str, float],
    steps: dict[str, float],
    reports: dict[str, IngestReport],
    again: IngestReport | None,
    size: int,
) -> None:
    """Print the metrics."""
    where = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.processor() or "cpu"
    table = Table(
        title=f"{arguments.arch}, {arguments.precision}, batch {arguments.batch}, {where}, {torch.get_num_threads()} "
        f"threads, {arguments.workers} workers; {arguments.images:,} JPEGs of {arguments.side} pixels, "
        f"{size // 1000} kB"
    )
    for column in ("step", "images/s", "time relative to bare forward"):
        table.add_column(column, justify="left" if column == "step" else "right")
    sample = min(arguments.images, arguments.sample or arguments.images)
    counts = {name: arguments.images if name.startswith(("indexing", "reading")) else sample for name in seconds}
    bare = sample / seconds["backbone forward, bare"]
    rows = []
    for name, spent in seconds.items():
        rate = counts[name] / spent
        table.add_row(name, f"{rate:,.1f}", f"{bare / rate:.2f}")
        rows.append({"step": name, "images_per_second": rate, "of_bare_forward": bare / rate})
    Console().print(table)
    print("decoding, ms per image: " + ", ".join(f"{step} {spent:.2f}" for step, spent in steps.items()))
    for name, best in reports.items():
        print(f"{name}: model idle for {best.decoding_wait:.2f} s (decoding) and {best.writing_wait:.2f} s (writing)")
    if again is not None:
        print(f"second run: {again.unchanged:,} unchanged images took {again.seconds:.2f} s")
    text = json.dumps(
        {"settings": vars(arguments) | {"processor": where, "bytes": size}, "rows": rows, "decoder_ms": steps}, indent=2
    )
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
