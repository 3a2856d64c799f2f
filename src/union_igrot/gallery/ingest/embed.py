"""Images through the model, under Lightning's Trainer.

Knows a model, a Trainer and batches of images. Does not know an index, nor what is done with the vectors.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import lightning
import torch
from jaxtyping import Float
from torch import Tensor

from union_igrot.gallery.ingest.batches import Batches
from union_igrot.gallery.ingest.decode import Batch, Seen
from union_igrot.images.transforms import model_input
from union_igrot.models.devices import TrainerConfig
from union_igrot.models.model import IGROTModel
from union_igrot.models.precision import full_precision
from union_igrot.training.trainer import make_trainer, manners

Take = Callable[[Sequence[Seen], Float[Tensor, "embedded dim"]], None]
"""Takes a batch, what was seen, and the vectors of those that hold a thumbnail, in order."""


@final
class _Embedder(lightning.LightningModule):
    """The model as Lightning wants it."""

    def __init__(self, model: IGROTModel) -> None:
        super().__init__()
        self.model = model

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move the images, into one tensor."""
        del dataloader_idx
        return replace(batch, images=[torch.cat([part.to(device, non_blocking=True) for part in batch.images])])

    def on_predict_start(self) -> None:
        """Encode the empty text, outside the half precision that the images may be encoded in."""
        self.model.null_text()

    def predict_step(self, batch: Batch) -> Tensor:
        """Embed a batch, which may hold none that has to be."""
        (pixels,) = batch.images
        if not len(pixels):
            return torch.empty(0, self.model.backbone.dim)
        device, whole = pixels.device, self.trainer.precision == "32-true"
        with full_precision(device) if whole else nullcontext():
            features = self.model.backbone.encode_image(model_input(pixels, self.model.preprocess))
        # The heads are small, and what they give is kept in 32 bits: they work so too.
        with full_precision(device):
            tokens = None if features.tokens is None else features.tokens.float()
            return self.model.embed_gallery(replace(features, pooled=features.pooled.float(), tokens=tokens))


@final
class _Hand(lightning.Callback):
    """Hands on a batch when the next one is on its way, so that the device need not wait for what is done with it."""

    def __init__(self, take: Take) -> None:
        self._take = take
        self._held: tuple[Sequence[Seen], Tensor] | None = None

    def on_predict_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        del trainer, pl_module, batch_idx, dataloader_idx
        held, self._held = self._held, (batch.seen, outputs)
        self._give(held)

    def on_predict_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        del trainer, pl_module
        held, self._held = self._held, None
        self._give(held)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        del trainer, pl_module, exception
        held, self._held = self._held, None
        with suppress(Exception):  # the first error is the one to tell
            self._give(held)

    def _give(self, held: tuple[Sequence[Seen], Tensor] | None) -> None:
        if held is not None:
            self._take(held[0], held[1].to("cpu"))


def embed(model: IGROTModel, batches: Batches, take: Take, machine: TrainerConfig, folder: Path) -> None:
    """Embed images and hand on the vectors.

    Args:
        model: The model; it stays on its device and in evaluation mode.
        batches: The images.
        take: What takes each batch.
        machine: Devices and precision.
        folder: Where Lightning may write.

    Raises:
        KeyboardInterrupt: After Ctrl-C.
    """
    device = model.device
    try:
        with manners():
            options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
            trainer = make_trainer(machine, folder, [_Hand(take)], **options)
            trainer.predict(_Embedder(model), batches, return_predictions=False)
    finally:
        model.to(device).eval()


def machine_of(device: torch.device, precision: Any = "32-true") -> TrainerConfig:
    """Say where a model already lies."""
    if device.type == "cpu":
        return TrainerConfig("cpu", 1, precision=precision)
    return TrainerConfig(device.type, [device.index or 0] if device.type == "cuda" else 1, precision=precision)
