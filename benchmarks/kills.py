"""Kill writers at random moments and check each time what they left, as the slow tests do with fewer kills.

    python benchmarks/kills.py index                        # 100 kills of union-index
    python benchmarks/kills.py engine --kills 20 --seed 7   # of a process that writes to a Lance index

No row whose write had returned may be lost, none be there twice, none broken. Ends with a traceback at the first
difference.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "gallery" / "engines"))

import killing

import index_kills


def main() -> None:
    """Kill as often as asked; print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["index", "engine"])
    parser.add_argument("--kills", default=100, type=int)
    parser.add_argument("--seed", default=0, type=int)
    given = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        if given.what == "index":
            found: object = index_kills.kill_many(Path(place), given.kills, seed=given.seed)
        else:
            found = killing.kill_many(f"{place}/photos.lance", Path(place) / "log.jsonl", given.kills, given.seed)
    print(f"{given.kills} kills: {found}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
