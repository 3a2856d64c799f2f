"""Build time, latency, recall, memory and disk of each engine, beside brute force in torch and FAISS.

    python benchmarks/index_engines.py
    python benchmarks/index_engines.py --sizes 10000 100000 1000000 --engines torch lance
    python benchmarks/index_engines.py --milvus milvus://127.0.0.1:19530 --milvus-data FOLDER --milvus-pid PID

The vectors are clustered, of width 512: a center for every fifty of them, the centers in
clusters of their own, and a spectrum that falls off as that of real embeddings does. The
queries are further draws. Each engine works in a process of its own on the same vectors, one
query at a time; recall@10 is held against float32 brute force, over all rows and over the
tenth that passes a filter. Memory is what the process holds above its start, mapped files
included, and for Milvus what its server holds. A JSON line each, then a table.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from union_igrot.gallery.engines.base import Rows
from union_igrot.gallery.engines.factory import open_index

WIDTH = 512
K = 10
GROUPS = 10
BATCH = 10_000
WHERE = "tenth = 3"
PLAIN = ("torch", "faiss")
ENGINES = (*PLAIN, "memory", "lance", "milvus")


def clustered(count: int, centres: int, seed: int, draw: int) -> Iterator[np.ndarray]:
    """Draw unit vectors around centers, in blocks."""
    shape = np.random.default_rng(seed)
    spectrum = (1 / np.sqrt(np.arange(1, WIDTH + 1))).astype(np.float32)
    spectrum /= np.linalg.norm(spectrum)

    def noise(generator: np.random.Generator, rows: int) -> np.ndarray:
        return generator.standard_normal((rows, WIDTH), dtype=np.float32) * spectrum

    coarse = noise(shape, 50)
    middle = 0.8 * coarse[shape.integers(0, len(coarse), centres)] + 0.6 * noise(shape, centres)
    each = np.random.default_rng([seed, draw])
    for at in range(0, count, BATCH):
        rows = min(BATCH, count - at)
        block = middle[each.integers(0, centres, rows)] + 0.7 * noise(each, rows)
        yield block / np.linalg.norm(block, axis=1, keepdims=True)


def prepare(folder: Path, size: int, queries: int) -> None:
    """Write vectors, queries, groups and the true answers."""
    centres = max(10, size // 50)
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, (size, WIDTH))
    for i, block in enumerate(clustered(size, centres, 0, 1)):
        vectors[i * BATCH : i * BATCH + len(block)] = block
    vectors.flush()
    asked = np.concatenate(list(clustered(queries, centres, 0, 2)))
    groups = np.random.default_rng(3).integers(0, GROUPS, size)
    np.save(folder / "queries.npy", asked)
    np.save(folder / "groups.npy", groups)
    truth = np.empty((2, queries, K), dtype=np.int64)
    all_vectors, kept = torch.from_numpy(vectors), torch.from_numpy(np.flatnonzero(groups == 3))
    some = all_vectors[kept]
    for i, query in enumerate(torch.from_numpy(asked)):
        truth[0, i] = (all_vectors @ query).topk(K).indices
        truth[1, i] = kept[(some @ query).topk(K).indices]
    np.save(folder / "truth.npy", truth)


def timed(ask: Callable[[int], Sequence[int]], truth: np.ndarray) -> dict[str, float]:
    """Ask every query once, after a few that are not counted."""
    for i in range(min(5, len(truth))):
        ask(i)
    spent, hits = [], 0
    for i, expected in enumerate(truth):
        start = time.perf_counter()
        found = ask(i)
        spent.append(1000 * (time.perf_counter() - start))
        hits += len(set(found) & set(expected.tolist()))
    return {
        "p50_ms": round(float(np.percentile(spent, 50)), 2),
        "p95_ms": round(float(np.percentile(spent, 95)), 2),
        "recall": round(hits / truth.size, 4),
    }


def with_torch(vectors: np.ndarray, groups: np.ndarray, queries: np.ndarray) -> Iterator[dict[str, Any]]:
    """Return brute force: one product and the largest scores."""
    start = time.perf_counter()
    matrix, asked = torch.from_numpy(np.array(vectors)), torch.from_numpy(queries)
    kept = torch.from_numpy(np.flatnonzero(groups == 3))

    def ask(i: int) -> Sequence[int]:
        return (matrix @ asked[i]).topk(K).indices.tolist()

    def ask_filtered(i: int) -> Sequence[int]:
        return kept[(matrix[kept] @ asked[i]).topk(K).indices].tolist()

    yield {"engine": "torch", "how": "exact", "build_s": time.perf_counter() - start, "ask": (ask, ask_filtered)}


def with_faiss(vectors: np.ndarray, groups: np.ndarray, queries: np.ndarray, folder: Path) -> Iterator[dict[str, Any]]:
    """Return FAISS: flat, and an inverted file of as many partitions and probes as the Lance engine takes."""
    import faiss  # noqa: PLC0415 - after torch: each brings its own OpenMP

    faiss.omp_set_num_threads(torch.get_num_threads())
    chosen = faiss.IDSelectorBatch(np.flatnonzero(groups == 3))
    for how, partitions in (("exact", 0), ("ann", max(1, int(len(vectors) ** 0.5)))):
        start = time.perf_counter()
        index = faiss.IndexFlatIP(WIDTH)
        if partitions:
            index = faiss.IndexIVFFlat(index, WIDTH, partitions, faiss.METRIC_INNER_PRODUCT)
            index.train(np.array(vectors[:: max(1, len(vectors) // (partitions * 64))]))
            index.nprobe = min(partitions, max(32, partitions // 16))
        for at in range(0, len(vectors), BATCH):
            index.add(np.array(vectors[at : at + BATCH]))
        built = time.perf_counter() - start
        faiss.write_index(index, str(folder / f"{how}.faiss"))
        kind = faiss.SearchParametersIVF if partitions else faiss.SearchParameters
        options = {"nprobe": min(partitions, 2 * index.nprobe)} if partitions else {}
        filtered = kind(sel=chosen, **options)

        def ask(i: int, index: Any = index, filtered: Any = None) -> Sequence[int]:
            return index.search(queries[i : i + 1], K, params=filtered)[1][0].tolist()

        def ask_filtered(i: int, ask: Any = ask, filtered: Any = filtered) -> Sequence[int]:
            return ask(i, filtered=filtered)

        disk = (folder / f"{how}.faiss").stat().st_size
        yield {"engine": "faiss", "how": how, "build_s": built, "ask": (ask, ask_filtered), "disk": disk}


def with_index(
    uri: str, vectors: np.ndarray, groups: np.ndarray, queries: np.ndarray, hows: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Return one of our engines."""
    start = time.perf_counter()
    index = open_index(uri, dim=WIDTH, create=True)
    for at in range(0, len(vectors), BATCH):
        block = torch.from_numpy(np.array(vectors[at : at + BATCH]))
        ids = [str(i) for i in range(at, at + len(block))]
        index.upsert(Rows(ids, block, {"tenth": groups[at : at + BATCH].tolist()}))
    written = time.perf_counter() - start
    if "ann" in hows:
        index.optimize()
    built = time.perf_counter() - start
    asked = torch.from_numpy(queries)
    for how in hows:

        def ask(i: int, how: str = how, where: str | None = None) -> Sequence[int]:
            return [int(one) for one in index.search(asked[i : i + 1], K, where=where, mode=how)[0].ids]

        def ask_filtered(i: int, ask: Any = ask) -> Sequence[int]:
            return ask(i, where=WHERE)

        yield {
            "engine": uri.split(":", maxsplit=1)[0] if ":" in uri else "lance",
            "how": how,
            "build_s": built if how == "ann" else written,
            "ask": (ask, ask_filtered),
        }
    if uri.startswith("milvus:"):
        index._client.drop_collection(index._name)
    index.close()


def held(pid: int | None = None) -> float:
    """Return what a process holds, in MiB; of this one, the most it ever held."""
    if pid is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def on_disk(folder: Path) -> int:
    """Add up the files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0


def measure(engine: str, folder: Path, args: argparse.Namespace) -> None:
    """Measure one engine and append a JSON line for each way to search."""
    os.environ["UNION_CACHE"] = str(folder / "cache")
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    groups, queries, truth = (np.load(folder / f"{name}.npy") for name in ("groups", "queries", "truth"))
    before = held(args.milvus_pid if engine == "milvus" else None)
    before_disk = on_disk(args.milvus_data) if engine == "milvus" and args.milvus_data else 0
    if engine == "torch":
        found = with_torch(vectors, groups, queries)
    elif engine == "faiss":
        found = with_faiss(vectors, groups, queries, folder)
    else:
        uris = {"memory": "memory:", "lance": str(folder / "photos.lance"), "milvus": f"{args.milvus}/b{os.getpid()}"}
        hows = ("exact",) if engine == "memory" else ("exact", "ann")
        found = with_index(uris[engine], vectors, groups, queries, hows)
    for one in found:
        plain, filtered = (timed(ask, expected) for ask, expected in zip(one["ask"], truth, strict=True))
        places = {"lance": [folder / "photos.lance", folder / "cache"], "milvus": [args.milvus_data]}.get(engine, [])
        disk = one.get("disk", sum(on_disk(place) for place in places if place) - before_disk)
        memory = held(args.milvus_pid if engine == "milvus" else None) - before
        known = engine != "milvus" or args.milvus_pid
        row = {
            "size": len(vectors),
            "engine": one["engine"],
            "how": one["how"],
            "build_s": round(one["build_s"], 1),
            **plain,
            **{f"filtered_{name}": value for name, value in filtered.items()},
            "memory_mib": round(memory) if known else None,
            "disk_mib": round(disk / 2**20),
        }
        with (folder / "rows.jsonl").open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def main() -> None:
    """Measure the chosen sizes and engines and print a table and a JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[10_000, 100_000])
    parser.add_argument("--engines", nargs="+", default=None, choices=ENGINES)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--milvus", help="a server, such as milvus://127.0.0.1:19530")
    parser.add_argument("--milvus-data", type=Path, help="its folder, to measure the disk")
    parser.add_argument("--milvus-pid", type=int, help="its process, to measure the memory")
    args = parser.parse_args()
    engines = args.engines or [one for one in ENGINES if one != "milvus" or args.milvus]
    table = Table(title=f"width {WIDTH}, {args.queries} queries one at a time, {torch.get_num_threads()} threads")
    names = ("size", "engine", "how", "build s", "p50 ms", "p95 ms", "recall@10")
    for name in (*names, "p50 filtered", "p95 filtered", "recall filtered", "MiB held", "MiB on disk"):
        table.add_column(name, justify="right")
    for size in args.sizes:
        folder = Path(tempfile.mkdtemp(prefix="union-engines-"))
        try:
            prepare(folder, size, args.queries)
            for engine in engines:
                process = multiprocessing.get_context("spawn").Process(target=measure, args=(engine, folder, args))
                process.start()
                process.join()
            for line in (folder / "rows.jsonl").read_text().splitlines():
                table.add_row(*(str(value) for value in json.loads(line).values()))
        finally:
            shutil.rmtree(folder)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
