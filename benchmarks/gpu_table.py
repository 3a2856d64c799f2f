"""The results of `gpu.sh` as one Markdown table."""

import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch


def status(out: Path, part: str) -> str:
    """Return why a part has no results; empty if it has."""
    code = (out / f"{part}.status").read_text().strip() if (out / f"{part}.status").is_file() else "not run"
    if code == "0":
        return ""
    lines = (out / f"{part}.log").read_text().strip().splitlines() if (out / f"{part}.log").is_file() else []
    last = lines[-1] if lines else ""
    return last if code == "skipped" else f"exceeded its time limit; {last}" if code == "124" else f"failed: {last}"


def rows(out: Path) -> Iterator[tuple[str, str]]:
    """Yield what was measured and the result."""
    for part in ("steps-1", "steps-2", "index", "evaluation", "fsdp"):
        if problem := status(out, part):
            yield part, problem
        elif part == "evaluation":
            found = json.loads((out / "evaluation.log").read_text().splitlines()[-1])
            name = f"evaluation, {found['queries']:,} queries, {found['gallery']:,} images"
            time = f"{found['evaluation_s']} s ({found['ratio']} x the bare product)"
            yield name, f"{time}, {found['mib_above_features']} MiB"
        elif part == "fsdp":
            results = json.loads((out / "fsdp" / "results.json").read_text())
            found = next(row for row in results if row["method"] == "trained")
            name = found["protocol"]["primary"]
            yield "training, FSDP on one device", f"{found['benchmark']} {name} {found['metrics'][name]:.1f}"
        else:
            found = json.loads((out / f"{part}.json").read_text())
            chosen = found["settings"]
            for row in found["rows"]:
                rate = row.get("samples_per_second") or row["images_per_second"]
                time = f"{row['ms']:.1f} ms, " if "ms" in row else ""
                name = f"{chosen['arch']}, {chosen['precision']}, batch {chosen['batch']}: {row['step']}"
                yield name, f"{time}{rate:,.1f} per second ({row['of_bare_forward']:.2f} x bare)"


def main() -> None:
    """Print the table."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    print(f"{where}, torch {torch.__version__}\n\n| measurement | result |\n| --- | --- |")
    for name, result in rows(Path(sys.argv[1])):
        print(f"| {name} | {result.replace('|', '/')} |")


if __name__ == "__main__":
    main()
