"""Pretrain the bundled tiny vision-language model on captions of the generated world.

    python scripts/pretrain_tiny.py

Contrastive training of images against captions; each scene is in the batch together with an edit of it, which is a
hard negative. A second loss classifies images of one thing by the prompts "a <shape>" (photos) and "a sketch of a
<shape>" (sketches); without it, shape is learned long after color and position. Only training scenes are used; sketches
and prompts show the fourteen seen shapes alone.
"""

import argparse
import json
import random
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from union_igrot.errors import ConfigError
from union_igrot.models.backbones.base import weights_hash
from union_igrot.models.backbones.tiny import TinyVLM, tokenize
from union_igrot.storage.files import write_atomic
from union_igrot.synthetic.rendering import render_photo, render_sketch
from union_igrot.synthetic.scenes import (
    HELD_OUT_SHAPES,
    SEEN_SHAPES,
    SHAPES,
    caption,
    edit_scene,
    pick,
    random_scene,
    with_article,
)

SKETCHES = 96
"""Sketches per batch, in addition to the captioned photos."""
_COMMAND = "python scripts/pretrain_tiny.py"
_PHOTO_PROMPTS = [with_article(shape) for shape in SHAPES]
_SKETCH_PROMPTS = [f"a sketch of {with_article(shape)}" for shape in SHAPES]


@dataclass(frozen=True)
class CaptionBatch:
    """Photos with captions, and sketches; a label is an index into `SHAPES`, -1 for several things."""

    photos: Float[Tensor, "photos 3 48 48"]
    captions: list[str]
    photo_labels: Tensor
    sketches: Float[Tensor, "sketches 3 48 48"]
    sketch_labels: Tensor


def _stack(images: list[Image.Image]) -> Float[Tensor, "batch 3 48 48"]:
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


def caption_batch(
    seed: str, split: str, pairs: int = 128, sketches: int = SKETCHES, shapes: tuple[str, ...] = SEEN_SHAPES
) -> CaptionBatch:
    """Draw scenes and an edit of each, with captions, and sketches of the given shapes."""
    rng = random.Random(seed)
    scenes = []
    for _ in range(pairs):
        scene = random_scene(rng, split)
        scenes += [scene, edit_scene(rng, scene, double=0.15).targets[0]]
    drawn = [random_scene(rng, split, 1, pick(rng, shapes)) for _ in range(sketches)]
    labels = [SHAPES.index(s.things[0].shape) if len(s.things) == 1 else -1 for s in scenes]
    return CaptionBatch(
        _stack([render_photo(scene, rng.getrandbits(40)) for scene in scenes]),
        [caption(rng, scene, forget=0.08) for scene in scenes],
        torch.tensor(labels),
        _stack([render_sketch(scene, rng.getrandbits(40)) for scene in drawn]),
        torch.tensor([SHAPES.index(scene.things[0].shape) for scene in drawn]),
    )


def _training_batch(seed: int, step: int) -> CaptionBatch:
    return caption_batch(f"pretrain {seed} {step}", "train")


def _embed_images(network: TinyVLM, images: Tensor) -> Tensor:
    return F.normalize(network.image(images)[:, 0], dim=-1)


def _embed_texts(network: TinyVLM, texts: list[str]) -> Tensor:
    ids = tokenize(texts)
    return F.normalize(network.text(ids)[torch.arange(len(ids)), (ids != 0).sum(1) - 1], dim=-1)


def pretraining_loss(network: TinyVLM, batch: CaptionBatch) -> tuple[Tensor, Tensor]:
    """Return the caption loss (symmetric InfoNCE) and the prompt loss (cross-entropy over seen shapes)."""
    scale = network.log_scale.exp().clamp(max=60)
    seen = len(SEEN_SHAPES)
    images = _embed_images(network, torch.cat([batch.photos, batch.sketches]))
    texts = _embed_texts(network, [*batch.captions, *_PHOTO_PROMPTS[:seen], *_SKETCH_PROMPTS[:seen]])
    photos, sketches = images.split([len(batch.photos), len(batch.sketches)])
    captions, photo_prompts, sketch_prompts = texts.split([len(photos), seen, seen])
    logits = scale * photos @ captions.T
    labels = torch.arange(len(logits))
    match = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    single = (batch.photo_labels >= 0) & (batch.photo_labels < seen)
    prompt = F.cross_entropy(scale * photos[single] @ photo_prompts.T, batch.photo_labels[single])
    prompt = prompt + F.cross_entropy(scale * sketches @ sketch_prompts.T, batch.sketch_labels)
    return match, prompt


@torch.no_grad()
def held_out_metrics(network: TinyVLM, seed: str, split: str = "val", batches: int = 4) -> dict[str, float]:
    """Measure caption retrieval among 256 and shape recognition over all twenty shapes, in percent."""
    network.eval()
    sums: dict[str, list[float]] = {}
    photo_prompts, sketch_prompts = _embed_texts(network, _PHOTO_PROMPTS), _embed_texts(network, _SKETCH_PROMPTS)
    for number in range(batches):
        batch = caption_batch(f"{seed} {number}", split, 128, 256, SHAPES)
        photos = _embed_images(network, batch.photos)
        right = (photos @ _embed_texts(network, batch.captions).T).argmax(1) == torch.arange(len(photos))
        single = batch.photo_labels >= 0
        by_photo = (photos[single] @ photo_prompts.T).argmax(1) == batch.photo_labels[single]
        by_sketch = (_embed_images(network, batch.sketches) @ sketch_prompts.T).argmax(1) == batch.sketch_labels
        new = batch.sketch_labels >= len(SEEN_SHAPES)
        for name, hits in {
            "caption_retrieval_in_256": right,
            "shape_of_photo": by_photo,
            "shape_of_sketch_seen": by_sketch[~new],
            "shape_of_sketch_held_out": by_sketch[new],
        }.items():
            sums.setdefault(name, []).append(hits.float().mean().item() * 100)
    network.train()
    return {name: round(sum(values) / len(values), 1) for name, values in sums.items()}


def pretrain(steps: int, seed: int, rate: float, every: int = 200) -> TinyVLM:
    """Train the network from a seed and print its metrics on validation scenes regularly.

    The rate is the highest one, warmed up over a tenth of the steps (2 to 100), then a cosine to zero.

    Raises:
        ConfigError: If `steps` is below 3: the warm-up alone takes 2.
    """
    if steps < 3:
        raise ConfigError(f"invalid value for steps: {steps} (expected an integer >= 3)")
    torch.manual_seed(seed)
    network = TinyVLM().to(memory_format=torch.channels_last)
    decay = [p for p in network.parameters() if p.ndim > 1]
    rest = [p for p in network.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], rate
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=min(100, max(2, steps / 10)) / steps, cycle_momentum=False
    )
    steps_drawn: Any = range(steps)  # a worker process draws the batch of each
    draw = partial(_training_batch, seed)
    loader = DataLoader(steps_drawn, batch_size=None, collate_fn=draw, num_workers=1, prefetch_factor=4)
    for step, batch in enumerate(loader, 1):
        match, prompt = pretraining_loss(network, batch)
        optimizer.zero_grad()
        torch.autograd.backward(match + 0.5 * prompt)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % every == 0:
            metrics = held_out_metrics(network, "look", batches=1)
            Console().print(f"step {step} of {steps}, loss {match.item():.3f} + {prompt.item():.3f}", metrics)
    return network


def main() -> None:
    """Pretrain and write `backbone.safetensors` (fp16) and `backbone.json`."""
    parser = argparse.ArgumentParser(prog=_COMMAND, description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1400, help="batches of 256 photos and 96 sketches")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and images")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    bundled = Path(__file__).parents[1] / "src" / "union_igrot" / "weights" / "tiny"
    parser.add_argument("--out", type=Path, default=bundled, help="folder to write to")
    args = parser.parse_args()
    start = time.monotonic()
    try:
        network = pretrain(args.steps, args.seed, args.rate)
    except ConfigError as error:
        parser.error(str(error))
    minutes = (time.monotonic() - start) / 60
    state = {n: t.contiguous().half() if t.is_floating_point() else t for n, t in network.state_dict().items()}
    network.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in state.items()})
    note = {
        "command": f"{_COMMAND} --steps {args.steps} --seed {args.seed} --rate {args.rate}",
        "minutes": round(minutes, 1),
        "weights": weights_hash({n: t.float() if t.is_floating_point() else t for n, t in state.items()}),
        "parameters": sum(p.numel() for p in network.parameters()),
        "held_out_percent": held_out_metrics(network, "note", "test", batches=8),
        "shapes_without_sketches": list(HELD_OUT_SHAPES),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(note, indent=2) + "\n"
    write_atomic(args.out / "backbone.safetensors", lambda temporary: save_file(state, temporary))
    write_atomic(args.out / "backbone.json", text)
    Console().print(note)


if __name__ == "__main__":
    main()
