"""Kill union-index at random moments, again and again, and compare its rows with the folder.

    python benchmarks/kill_indexing.py                      # 100 kills
    python benchmarks/kill_indexing.py --kills 20 --seed 1

The work is that of the slow test in tests/cli, whose `index_kills` says what is done. Ends with a traceback at the
first difference.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from index_kills import kill_many


def main() -> None:
    """Kill as often as asked; print what happened."""
    parser = argparse.ArgumentParser(description="Kill union-index at random moments and check its rows.")
    parser.add_argument("--kills", default=100, type=int)
    parser.add_argument("--images", default=300, type=int)
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--workers", default=1, type=int)
    given = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        options = {"images": given.images, "seed": given.seed, "workers": given.workers}
        seen, starts = kill_many(Path(place), given.kills, **options)
    spent = time.perf_counter() - start
    print(
        f"{given.kills} kills ({dict(seen)}), {starts} starts, {spent:.0f} s; all rows right, none lost, none doubled"
    )


if __name__ == "__main__":
    main()
