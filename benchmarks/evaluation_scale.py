"""Time and memory of evaluating at the size of the large benchmarks, on random features.

    python benchmarks/evaluation_scale.py
    python benchmarks/evaluation_scale.py --sizes quickdraw --width 512 --queries 6000

For each size the full evaluation (exact ranking of the whole gallery in chunks, every metric of the protocol, mAP@all
included) is compared with the bare score matrix product in the same chunks, timed before and after it. Memory is the
peak above that before the evaluation, each size in its own process; on a GPU it is the device's memory. In `icir` each
query is scored with the 3,700 images of its own instance alone, so that the ratio is below 1.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from union_igrot.evaluation.ranking import blocks
from union_igrot.evaluation.scoring import score
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query

SIZES = {
    # name: queries, gallery, classes (0: a handful of targets each)
    "sketchy21": (12_694, 12_553, 21),
    "tuberlin": (2_400, 27_989, 30),
    "quickdraw": (92_291, 54_151, 30),
    "circo": (800, 123_403, 0),
    "icir": (1_883, 750_000, 202),
    "tiny": (60, 200, 4),
}
SBIR = Protocol(metrics=("mAP", "mAP@200", "P@100", "P@200"), primary="mAP")
ICIR = Protocol(
    metrics=("mAP", "mmAP", "minmAP"), primary="mAP", ap_norm="all", ap_rule="trapezoid", candidates="subset"
)
CIRCO = Protocol(metrics=("mAP@5", "mAP@10", "mAP@25", "mAP@50", "R@10"), primary="mAP@10", recall_targets="first")


def random_benchmark(name: str, most: int, seed: int = 0) -> Benchmark:
    """Return a benchmark of the right counts without images."""
    queries, gallery, classes = SIZES[name]
    queries = min(queries, most)
    draw = torch.Generator().manual_seed(seed)
    nowhere = Path("none")
    items = tuple(GalleryItem(str(i), nowhere) for i in range(gallery))
    if name == "icir":  # each query ranks the images of its own instance alone
        own = [tuple(str(i) for i in range(c, gallery, classes)) for c in range(classes)]
        asked = tuple(
            Query(str(i), nowhere, "", own[i % classes][:12], subset=own[i % classes], label=str(i % classes))
            for i in range(queries)
        )
        return Benchmark(name, "random", "cir", asked, items, ICIR)
    if classes:
        by_class = [tuple(str(i) for i in range(c, gallery, classes)) for c in range(classes)]
        asked = tuple(
            Query(str(i), nowhere, targets=by_class[i % classes], label=str(i % classes)) for i in range(queries)
        )
        return Benchmark(name, "random", "sbir", asked, items, SBIR)
    picks = torch.randint(gallery, (queries, 4), generator=draw).tolist()
    asked = tuple(Query(str(i), nowhere, "", tuple(sorted({str(t) for t in picks[i]}))) for i in range(queries))
    return Benchmark(name, "random", "cir", asked, items, CIRCO)


def bare_product(queries: torch.Tensor, gallery: torch.Tensor) -> float:
    """Time the score matrix product alone, in the evaluation's chunks."""
    start = time.perf_counter()
    for rows in blocks(len(queries), len(gallery)):
        torch.mm(queries[rows], gallery.T)
    settle(queries.device)
    return time.perf_counter() - start


def settle(device: torch.device) -> None:
    """Wait until a device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_mib(device: torch.device) -> float:
    """Return the largest memory so far, of this process or on the device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def now_mib(device: torch.device) -> float:
    """Return the memory now, of this process (on Linux) or on the device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure(name: str, width: int, most: int, device: torch.device) -> dict[str, float | int | str]:
    """Evaluate one size."""
    benchmark = random_benchmark(name, most)
    draw = torch.Generator().manual_seed(1)
    counts = len(benchmark.queries), len(benchmark.gallery)
    queries, gallery = (
        torch.nn.functional.normalize(torch.randn(n, width, generator=draw), dim=-1, out=torch.empty(n, width))
        for n in counts
    )
    queries, gallery = queries.to(device), gallery.to(device)
    # The full product runs after the evaluation, so that the peak is the evaluation's.
    some = queries[: max(1, len(queries) // 8)]
    before = now_mib(device)
    bare_product(some[:1], gallery)  # loads the kernels of a GPU
    warm = bare_product(some, gallery) * len(queries) / len(some)
    start = time.perf_counter()
    score(benchmark, queries, gallery)
    settle(device)
    spent = time.perf_counter() - start
    above = peak_mib(device) - before
    product = (warm + bare_product(queries, gallery)) / 2
    return {
        "size": name,
        "queries": counts[0],
        "gallery": counts[1],
        "product_s": round(product, 2),
        "evaluation_s": round(spent, 2),
        "ratio": round(spent / product, 2),
        "mib_above_features": round(above),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} threads",
    }


def main() -> None:
    """Measure the chosen sizes and print a JSON line each and a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=[size for size in SIZES if size != "tiny"], choices=list(SIZES))
    parser.add_argument("--width", type=int, default=512, help="of the embeddings")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--queries", type=int, default=10**9, help="largest number of queries per size")
    parser.add_argument(
        "--alone", action="store_true", help="measure one size in this process and print its JSON line only"
    )
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measure(args.sizes[0], args.width, args.queries, torch.device(args.device))), flush=True)
        return
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    table = Table(title=f"evaluation at full size, width {args.width}, {where}")
    for column in ("size", "queries x gallery", "product s", "evaluation s", "ratio", "MiB above features"):
        table.add_column(column, justify="right")
    for name in args.sizes:
        options = ["--alone", "--sizes", name, "--width", str(args.width), "--queries", str(args.queries)]
        options += ["--device", args.device]
        done = subprocess.run([sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True)
        print(done.stdout, end="", flush=True)
        row = json.loads(done.stdout)
        shown = ("product_s", "evaluation_s", "ratio", "mib_above_features")
        table.add_row(name, f"{row['queries']:,} x {row['gallery']:,}", *(str(row[key]) for key in shown))
    Console().print(table)


if __name__ == "__main__":
    main()
