"""Kill writers of a Lance index at random moments and check each time what they left.

    python benchmarks/kill_index.py
    python benchmarks/kill_index.py --kills 20 --seed 7

Each writer adds, replaces and removes rows and optimizes, and is stopped by kill -9. Then the
index is opened: no row whose write had returned may be lost, none be there twice, none broken.
The work is that of the slow test in tests/index.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gallery" / "engines"))

from killing import kill_many


def main() -> None:
    """Kill as often as asked and print a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tally = kill_many(f"{folder}/photos.lance", Path(folder) / "log.jsonl", args.kills, args.seed)
    print(json.dumps({**asdict(tally), "seconds": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    main()
