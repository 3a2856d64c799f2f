"""Time and memory of evaluating at the size of the large benchmarks, on random features.

    python benchmarks/evaluation_scale.py
    python benchmarks/evaluation_scale.py --sizes quickdraw --width 512

For each size the full evaluation (ranking of the whole gallery in chunks, every figure of
the protocol, mAP@all included) stands beside the bare score matrix product in the same
chunks on the same machine. Memory is the peak above what the features take. Knows
`evaluate.score`; does not know real data.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from union_igrot.evaluate import score
from union_igrot.types import Benchmark, GalleryItem, Protocol, Query

SIZES = {
    # name: queries, gallery, classes (0: a handful of targets each)
    "sketchy21": (12_694, 12_553, 21),
    "tuberlin": (2_400, 27_989, 30),
    "quickdraw": (92_291, 54_151, 30),
    "circo": (800, 123_403, 0),
}
SBIR = Protocol(metrics=("mAP", "mAP@200", "P@100", "P@200"), primary="mAP")
CIRCO = Protocol(metrics=("mAP@5", "mAP@10", "mAP@25", "mAP@50", "R@10"), primary="mAP@10")


def random_benchmark(name: str, seed: int = 0) -> Benchmark:
    """Give a benchmark of the right counts without pictures."""
    queries, gallery, classes = SIZES[name]
    draw = torch.Generator().manual_seed(seed)
    nowhere = Path("none")
    items = tuple(GalleryItem(str(i), nowhere) for i in range(gallery))
    if classes:
        by_class = [tuple(str(i) for i in range(c, gallery, classes)) for c in range(classes)]
        asked = tuple(
            Query(str(i), nowhere, targets=by_class[i % classes], label=str(i % classes)) for i in range(queries)
        )
        return Benchmark(name, "random", "sbir", asked, items, SBIR)
    picks = torch.randint(gallery, (queries, 4), generator=draw).tolist()
    asked = tuple(Query(str(i), nowhere, "", tuple(sorted({str(t) for t in picks[i]}))) for i in range(queries))
    return Benchmark(name, "random", "cir", asked, items, CIRCO)


def bare_product(queries: torch.Tensor, gallery: torch.Tensor, rows: int) -> float:
    """Time the score matrix product alone, `rows` queries at a time."""
    start = time.perf_counter()
    for at in range(0, len(queries), rows):
        torch.mm(queries[at : at + rows], gallery.T)
    return time.perf_counter() - start


def peak_mib() -> float:
    """Give this process's largest memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure the chosen sizes and print a table and a JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--width", type=int, default=512)
    args = parser.parse_args()
    table = Table(title=f"evaluation at full size, width {args.width}, {torch.get_num_threads()} threads")
    for column in ("size", "queries x gallery", "product s", "evaluation s", "ratio", "MiB above features"):
        table.add_column(column, justify="right")
    for name in args.sizes:
        benchmark = random_benchmark(name)
        draw = torch.Generator().manual_seed(1)
        queries, gallery = (
            torch.nn.functional.normalize(torch.randn(n, args.width, generator=draw), dim=-1) for n in SIZES[name][:2]
        )
        before = peak_mib()
        rows = max(1, 128 * 2**20 // (8 * len(gallery)))
        product = bare_product(queries, gallery, rows)
        start = time.perf_counter()
        score(benchmark, queries, gallery)
        spent = time.perf_counter() - start
        row = {
            "size": name,
            "queries": len(queries),
            "gallery": len(gallery),
            "product_s": round(product, 2),
            "evaluation_s": round(spent, 2),
            "ratio": round(spent / product, 2),
            "mib_above_features": round(peak_mib() - before),
        }
        print(json.dumps(row), flush=True)
        table.add_row(name, f"{len(queries):,} x {len(gallery):,}", *(str(row[k]) for k in list(row)[3:]))
    Console().print(table)


if __name__ == "__main__":
    main()
