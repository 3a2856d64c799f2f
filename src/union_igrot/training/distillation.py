"""Distillation of the query head's view of an image into the target head, after training.

A gallery of `normalize(g + weight * f)`, with `g` from the target head and `f` from the query head's fusion of an image
with the null text, is better for sketches, but needs the tokens of every gallery image and a pass of the query head.
The residual target head, which reads the pooled embedding alone, learns this mixture within seconds on training images.
"""

import random
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from union_igrot.features.extractor import FeatureExtractor
from union_igrot.images.decode import image_key
from union_igrot.models.heads.target import ResidualTarget
from union_igrot.models.model import IGROTModel
from union_igrot.training.learner import warmup_cosine
from union_igrot.types import Features, ImageSource, TrainingSet

MAX_IMAGES: Final = 20_000
STEPS: Final = 200
BATCH: Final = 512
RATE: Final = 1e-3


def can_distill(model: IGROTModel) -> bool:
    """Return whether the target head can learn the mixture, and the query head has anything to teach."""
    return isinstance(model.target, ResidualTarget) and model.fusion.needs_tokens


def distill_target(
    model: IGROTModel, samples: TrainingSet, extractor: FeatureExtractor, weight: float, seed: int
) -> None:
    """Train the target head to predict its present embedding mixed with the query head's; nothing else changes.

    Args:
        model: The trained model, in evaluation mode, for which `can_distill` is true.
        samples: Its training samples: their references and the targets of sketches are used, at most `MAX_IMAGES`.
        extractor: Extractor with its backbone.
        weight: Weight of the query head's embedding.
        seed: Seed of the choice of images and of their order.
    """
    chosen = _photos(samples, seed)
    keys = extractor.extract_images(chosen, tokens=True, label="images of the distillation")
    blocks = [keys[at : at + extractor.batch_size] for at in range(0, len(keys), extractor.batch_size)]
    pooled, wanted = zip(
        *(_mixture(model, extractor.lookup(block, tokens=True), weight) for block in blocks), strict=True
    )
    inputs, targets = torch.cat(pooled), torch.cat(wanted)
    weights = list(model.target.parameters())
    optimizer, order = torch.optim.AdamW(weights, weight_decay=0.0), torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for step in range(STEPS):
            for group in optimizer.param_groups:
                group["lr"] = RATE * warmup_cosine(step, STEPS, 0.05, 0.01)
            rows = torch.randint(len(inputs), (min(BATCH, len(inputs)),), generator=order).to(inputs.device)
            found = model.embed_gallery(Features(inputs[rows]))
            optimizer.zero_grad()
            (1 - (found * targets[rows]).sum(1)).mean().backward()
            optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def _mixture(
    model: IGROTModel, images: Features, weight: float
) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
    """Return the pooled embeddings of images and the unit embeddings that the target head is to give them."""
    plain = Features(images.pooled)
    return images.pooled, F.normalize(model.embed_gallery(plain) + weight * model.embed_queries(images), dim=-1)


def _photos(samples: TrainingSet, seed: int) -> list[ImageSource]:
    """Return distinct photos, of those whose tokens training has encoded: references, and targets of sketches."""
    shown = (one.target if one.task == "sbir" else one.image for one in samples.triplets)
    distinct = list({image_key(image): image for image in shown}.values())
    return random.Random(f"distillation {seed}").sample(distinct, min(len(distinct), MAX_IMAGES))
