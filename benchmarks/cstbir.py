"""Time and memory of reading CSTBIR at its full size, from generated files of 1,989,873 rows.

    python benchmarks/cstbir.py
    python benchmarks/cstbir.py --splits test train --shape csv

Each split is read in its own process, from annotations alone; memory is the peak of that process, torch's import
included.
"""

import argparse
import csv
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SPLITS = {"train": 1_887_884, "val": 1_000, "test": 4_001, "val_large": 96_988}
WORDS = ["sitting", "standing", "in front of", "behind", "the", "red", "old", "tree", "house", "woman", "table", "on"]


def write(folder: Path, shape: str) -> Path:
    """Write the queries as a JSON list or as CSV, as many and about as long as the official ones."""
    draw = random.Random(0)
    labels = [f"class{number}" for number in range(258)]
    texts = [f"[sketch] {' '.join(draw.choices(WORDS, k=8))} {number}" for number in range(200_000)]
    file = folder / f"CSTBIR_dataset.{shape}"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        if shape == "csv":
            writer.writerow(["split", "text", "object_category", "image_filename", "sketch_filename"])
        number = 0
        for split, count in SPLITS.items():
            for _ in range(count):
                label, text = draw.choice(labels), draw.choice(texts)
                photo, sketch = f"{draw.randrange(97_000)}.jpg", f"{label}_{draw.randrange(1900)}.jpg"
                if shape == "csv":
                    writer.writerow([split, text, label, photo, sketch])
                else:
                    row = {"sample_num": number, "text": text, "image": photo, "label": label, "sketch": sketch}
                    out.write(("," if number else "[") + json.dumps(row | {"split": split}))
                number += 1
        out.write("]" if shape == "json" else "")
    return file


def main() -> None:
    """Write the files, and print a line for each split."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--splits", nargs="+", default=["test", "train"], choices=list(SPLITS))
    parser.add_argument("--shape", nargs="+", default=["json", "csv"], choices=["json", "csv"])
    parser.add_argument("--folder", help="read this folder instead of measuring all")
    args = parser.parse_args()
    if args.folder:
        from union_igrot.datasets import load_benchmark  # noqa: PLC0415 - in the process that is measured

        start, used = time.perf_counter(), time.process_time()
        found = load_benchmark("cstbir", args.folder, args.splits[0], check_images=False)
        seconds, used = time.perf_counter() - start, time.process_time() - used
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{args.splits[0]}: {found!r} in {seconds:.1f} s ({used:.1f} s of CPU), peak {peak:.2f} GiB", flush=True)
        return
    for shape in args.shape:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{shape}: {write(Path(folder), shape).stat().st_size / 2**20:.0f} MiB", flush=True)
            for split in args.splits:
                subprocess.run([sys.executable, __file__, "--folder", folder, "--splits", split], check=True)


if __name__ == "__main__":
    main()
