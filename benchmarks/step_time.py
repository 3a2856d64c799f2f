"""Time a training step and a gallery batch against the bare forward of the backbone.

    python benchmarks/step_time.py                                   # CLIP ViT-B/32, random weights, CPU, fp32
    python benchmarks/step_time.py --arch ViT-L-14 --device cuda --precision bf16 --batch 32

Rows: the backbone's bare forward (images and texts of a batch), a training step that encodes
everything, one on features encoded before, forward and backward of its heads alone, the same with
the residual target head without and with a bank of 10,000 images, a gallery batch, and each target
head on the features of a gallery batch. Weights are random and images are noise: time does not
depend on them. Widths: 128 with `--arch tiny`, 512 with the default. `--clock cpu` counts the
seconds of this process, on a machine that does other work too.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from union_igrot.models.backbones.open_clip import OPENAI_MEAN, OPENAI_STD, OpenClipBackbone, model_config
from union_igrot.models.factory import build_query_head, build_target_head
from union_igrot.models.model import IGROTModel, load
from union_igrot.training.losses import InfoNCE, info_nce
from union_igrot.types import Features, Preprocess

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BANK = 10_000
TARGETS = ("frozen", "sum", "residual", "union", "shared")
TEXT = "is a small dog with a hat, and it sits on the left of the sofa"


def read_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time a training step and a gallery batch.")
    parser.add_argument("--arch", default="ViT-B-32", help="an open_clip architecture, or tiny")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument("--precision", default="fp32", choices=DTYPES)
    parser.add_argument("--batch", default=16, type=int, help="samples per step, images per gallery batch")
    parser.add_argument("--steps", default=5, type=int, help="timed repeats; the fastest counts")
    parser.add_argument("--warmup", default=2, type=int, help="repeats that are not timed")
    parser.add_argument(
        "--clock", default="wall", choices=("wall", "cpu"), help="time that passes, or that the CPU works"
    )
    parser.add_argument("--json", default=None, help="also write the metrics to this file")
    return parser.parse_args()


def build_model(arch: str) -> IGROTModel:
    """Build the paper's model (TransAgg and UNION) on a CLIP with random weights, or load the bundled model."""
    if arch == "tiny":
        return load("tiny")
    torch.manual_seed(0)
    config = model_config(f"open_clip:{arch}/openai")
    size = config["vision_cfg"]["image_size"]
    backbone = OpenClipBackbone(config, Preprocess(size, OPENAI_MEAN, OPENAI_STD, fit="pad"), f"open_clip:{arch}")
    heads = 12 if backbone.dim == 768 else 8
    fusion, target = build_query_head("transagg", backbone.dim), build_target_head("union", backbone.dim, heads=heads)
    return IGROTModel(backbone, fusion, target)


def with_target(model: IGROTModel, kind: str) -> IGROTModel:
    """Return a model with another target head."""
    width = model.backbone.dim
    head = (
        build_target_head(kind, width, heads=max(1, width // 64)) if kind == "union" else build_target_head(kind, width)
    )
    return IGROTModel(model.backbone, model.fusion, head)


def measure(planned: dict[str, Callable[[], object]], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Time each step in milliseconds, in turn, so that other load slows all of them alike."""
    on_gpu = arguments.device.startswith("cuda")
    now = time.process_time if arguments.clock == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in planned}
    for repeat in range(arguments.warmup + arguments.steps):
        for name, work in planned.items():
            start = now()
            work()
            if on_gpu:
                torch.cuda.synchronize()
            if repeat >= arguments.warmup:
                times[name].append(1000 * (now() - start))
    return times


def works(model: IGROTModel, arguments: argparse.Namespace) -> dict[str, tuple[Callable[[], object], int, int]]:
    """Return the steps, each with the number of images and texts that it encodes."""
    batch, device = arguments.batch, arguments.device
    size = model.preprocess.size
    images, targets = torch.randn(2, batch, 3, size, size, device=device)
    texts, groups = [TEXT] * batch, torch.arange(batch, device=device)
    fused = device.split(":")[0] in ("cpu", "cuda")
    residual = build_target_head("residual", model.backbone.dim).to(device)
    other = IGROTModel(model.backbone, model.fusion, residual).to(device).train()
    trained = [x for x in {*model.parameters(), *other.parameters()} if x.requires_grad]
    optimizer, loss = torch.optim.AdamW(trained, lr=1e-4, fused=fused), InfoNCE()
    bank = Features(torch.randn(BANK, model.backbone.dim, device=device))
    bank_groups = torch.arange(BANK, device=device)
    cast = torch.autocast(device.split(":")[0], DTYPES[arguments.precision], enabled=arguments.precision != "fp32")
    scaler = torch.amp.GradScaler(device.split(":")[0], enabled=arguments.precision == "fp16")

    def encode() -> tuple[Features, Features, Features]:
        with torch.no_grad(), cast:
            seen = model.backbone.encode_image(images), model.backbone.encode_image(targets)
            return seen[0], model.backbone.encode_text(texts), seen[1]

    def encode_gallery() -> None:
        with torch.no_grad(), cast:
            model.backbone.encode_image(targets)

    def step(reference: torch.Tensor | Features, text: list[str] | Features, target: torch.Tensor | Features) -> None:
        with cast:
            value = loss(model.embed_queries(reference, text), model.embed_gallery(target), groups)
        update(value)

    def heads_alone(reference: Features, text: Features, target: Features) -> None:
        optimizer.zero_grad()
        with cast:
            value = loss(model.embed_queries(reference, text), model.embed_gallery(target), groups)
        value.backward()

    def residual_step(reference: Features, text: Features, target: Features, *, with_bank: bool) -> None:
        with cast:
            queries = other.embed_queries(reference, text)
            if with_bank:
                value = info_nce(queries, other.embed_gallery(bank), groups, groups, bank_groups, loss.scale)
            else:
                value = loss(queries, other.embed_gallery(target), groups)
        update(value)

    def update(value: torch.Tensor) -> None:
        optimizer.zero_grad()
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()

    def gallery() -> None:
        with torch.no_grad(), cast:
            model.embed_gallery(targets)

    kept = encode()
    heads = {kind: with_target(model, kind).to(device) for kind in TARGETS}

    def embed_cached(kind: str) -> None:
        with torch.no_grad(), cast:
            heads[kind].embed_gallery(kept[2])

    return {
        "backbone forward of a step": (encode, 2 * batch, batch),
        "training step, uncached": (lambda: step(images, texts, targets), 2 * batch, batch),
        "training step, cached": (lambda: step(*kept), 0, 0),
        "heads' forward and backward, cached": (lambda: heads_alone(*kept), 0, 0),
        "residual target, cached": (lambda: residual_step(*kept, with_bank=False), 0, 0),
        f"residual target, cached, bank of {BANK:,}": (lambda: residual_step(*kept, with_bank=True), 0, 0),
        "backbone forward of a gallery batch": (encode_gallery, batch, 0),
        "gallery batch": (gallery, batch, 0),
        **{f"gallery batch, cached, target {kind}": (partial(embed_cached, kind), 0, 0) for kind in TARGETS},
    }


def main() -> None:
    """Time everything and print a table and JSON."""
    arguments = read_arguments()
    model = build_model(arguments.arch).to(arguments.device).train()
    planned = works(model, arguments)
    measured = measure({name: work for name, (work, _, _) in planned.items()}, arguments)
    # The fastest repeat is the least disturbed one; the median shows how disturbed the others were.
    times = {name: min(repeats) for name, repeats in measured.items()}
    bare = {
        name: times["backbone forward of a " + ("gallery batch" if "gallery" in name else "step")] for name in times
    }
    where = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.processor() or "cpu"
    table = Table(title=f"{arguments.arch}, {arguments.precision}, batch {arguments.batch}, {where}")
    for column in ("step", "images / texts encoded", "ms", "median ms", "of bare forward", "samples / s"):
        table.add_column(column, justify="left" if column == "step" else "right")
    rows = []
    for name, milliseconds in times.items():
        share, rate = milliseconds / bare[name], 1000 * arguments.batch / milliseconds
        _, images, texts = planned[name]
        median = statistics.median(measured[name])
        table.add_row(
            name, f"{images} / {texts}", f"{milliseconds:.1f}", f"{median:.1f}", f"{share:.2f}", f"{rate:.1f}"
        )
        rows.append(
            {
                "step": name,
                "ms": milliseconds,
                "median_ms": median,
                "of_bare_forward": share,
                "samples_per_second": rate,
            }
        )
    Console().print(table)
    settings = vars(arguments) | {"threads": torch.get_num_threads(), "torch": torch.__version__, "processor": where}
    text = json.dumps({"settings": settings, "rows": rows}, indent=2)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")


if __name__ == "__main__":
    main()
