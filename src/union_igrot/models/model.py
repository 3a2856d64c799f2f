"""The model: a frozen backbone, a vision projector where wanted, a query head and a target head.

`embed_queries` and `embed_gallery` are written here once and used by training, evaluation,
command lines and demo alike. Saves and loads the heads. Does not know benchmarks, losses,
caches or devices' strategies.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn

from union_igrot.errors import CheckpointError, first_line
from union_igrot.models.backbones.base import Backbone, Modality, weights_hash
from union_igrot.models.backbones.factory import build_backbone, is_backbone
from union_igrot.models.backbones.portable import build_again, put_weights, remove_weights, write_weights
from union_igrot.models.checkpoint import read_saved, write_saved
from union_igrot.models.heads.factory import build_query_head, build_target_head
from union_igrot.models.heads.projector import VisionProjector, build_projector
from union_igrot.models.heads.query import QueryHead
from union_igrot.models.heads.target import TargetHead
from union_igrot.models.hub import HubModel
from union_igrot.types import Features, Preprocess


@final
class IGROTModel(nn.Module, HubModel):
    """Embeds queries (image, text or both) and gallery images into one space.

    Args:
        backbone: The frozen vision-language model.
        fusion: The query head.
        target: The target head.
        metadata: Facts on the training: data, classes, settings ("card" in `model.json`).
        projector: Changes image features on the query and the target side, or None.
        null: Features of the empty text, where another model of this backbone has encoded it.

    Attributes:
        training_images: Identities (`data.identity`) of the images the heads were trained on; None where
            they are not recorded.
        tuned: Whether the backbone's weights are not those its name stands for: an encoder was tuned, or
            came inside another's file. `save` then writes them beside the heads.
    """

    def __init__(
        self,
        backbone: Backbone,
        fusion: QueryHead,
        target: TargetHead,
        metadata: dict[str, Any] | None = None,
        projector: VisionProjector | None = None,
        null: Features | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.fusion, self.target, self.projector = backbone, fusion, target, projector
        self.metadata: dict[str, Any] = metadata or {}
        self.training_images: frozenset[str] | None = None
        self.tuned = False
        self._hub_mixin_config = None  # model.json says all; the mixin writes no file of its own then
        self._null = null

    @property
    def preprocess(self) -> Preprocess:
        """How an image becomes this model's input."""
        return self.backbone.preprocess

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.backbone.device

    def tune(self, sides: Collection[Modality]) -> None:
        """Let encoders of the backbone be trained with the heads, until `finish_training`."""
        self.backbone.tune(sides)
        self.tuned = self.tuned or bool(sides)
        self._null = None

    def finish_training(self) -> None:
        """End a training: evaluation mode, the backbone frozen as it now is."""
        self.backbone.freeze()
        self.eval()
        self._null = None

    def null_text(self) -> Features:
        """Return the features of the empty text, encoded once and kept; while texts are tuned, encoded each time."""
        if "text" in self.backbone.tuned_encoders:
            return self.backbone.encode_text([""])
        if self._null is None or self._null.pooled.device != self.device:
            # Not in inference mode, even where the caller is: nothing could be trained with it later.
            with torch.inference_mode(mode=False), torch.no_grad():
                self._null = self.backbone.encode_text([""])
        return self._null

    def embed_queries(
        self,
        images: Float[Tensor, "batch 3 height width"] | Features | None = None,
        texts: Sequence[str | None] | Features | None = None,
    ) -> Float[Tensor, "batch dim"]:
        """Embed queries.

        Args:
            images: Preprocessed images, or their features.
            texts: What to change in each, or the texts' features; None and "" are the null
                text, one by one or all together.

        Returns:
            Embeddings of unit length.

        Raises:
            ValueError: Where neither side is given, or their numbers differ.
        """
        if images is None:
            return self._embed_texts_alone(texts)
        encoded = self._encode_images(images)
        spoken = self._encode_texts(texts, len(encoded))
        if len(spoken) != len(encoded):
            raise ValueError(f"{len(encoded)} images and {len(spoken)} texts; give one text an image, or none at all")
        return self._fuse(encoded, spoken)

    def embed_gallery(self, images: Float[Tensor, "batch 3 height width"] | Features) -> Float[Tensor, "batch dim"]:
        """Embed gallery images.

        Args:
            images: Preprocessed images, or their features.

        Returns:
            Embeddings, of unit length but for the reference's training sum.
        """
        encoded = self._encode_images(images)
        embedded: Tensor = self.target(encoded, self.null_text().expand(len(encoded)), self._fuse)
        return embedded

    def _fuse(self, images: Features, texts: Features) -> Tensor:
        fused: Tensor = self.fusion(images, texts)
        return fused

    def _encode_images(self, images: Float[Tensor, "batch 3 height width"] | Features) -> Features:
        encoded = images if isinstance(images, Features) else self.backbone.encode_image(images.to(self.device))
        if self.projector is None:
            return encoded
        projected: Features = self.projector(encoded)
        return projected

    def _encode_texts(self, texts: Sequence[str | None] | Features | None, batch: int) -> Features:
        if isinstance(texts, Features):
            return texts
        if texts is None or not any(texts):
            return self.null_text().expand(batch if texts is None else len(texts))
        return self.backbone.encode_text([text or "" for text in texts])

    def _embed_texts_alone(self, texts: Sequence[str | None] | Features | None) -> Float[Tensor, "batch dim"]:
        if texts is None:
            raise ValueError("embed_queries needs images, texts or both")
        spoken = self._encode_texts(texts, 0)
        # Without an image the text's own embedding is the query: no head was trained for it.
        return nn.functional.normalize(spoken.pooled, dim=-1)

    def heads(self) -> Iterator[nn.Parameter]:
        """Return every weight that is not the backbone's."""
        return (weight for name, weight in self.named_parameters() if not name.startswith("backbone."))

    def heads_state_dict(self) -> dict[str, Tensor]:
        """Return the heads' weights by name; the backbone is never among them."""
        return {name: x for name, x in self.state_dict().items() if not name.startswith("backbone.")}

    def fingerprint(self) -> str:
        """Return a hash of the backbone's weights, the preprocessing, and the heads with their kinds and options."""
        return model_fingerprint(self.describe())

    def describe(self) -> dict[str, Any]:
        """Say which model this is, for results and saved files."""
        return {
            "backbone": self.backbone.name,
            "backbone_fingerprint": self.backbone.fingerprint(),
            "tuned": self.tuned,
            "heads": weights_hash(self.heads_state_dict()),
            "fusion": {"kind": self.fusion.kind, **self.fusion.options},
            "target": {"kind": self.target.kind, **self.target.options},
            "projector": None if self.projector is None else {"kind": self.projector.kind, **self.projector.options},
        }

    def save(self, folder: str | Path, *, half: bool = False) -> Path:
        """Write the heads and their description; nothing half-written is ever left under the final names.

        Args:
            folder: Where to write `heads.safetensors`, `model.json`, where they are recorded the identities of
                the images trained on (`training_images.txt`), and where `tuned` is set the backbone's weights
                (`backbone.safetensors`) and tokenizer; made if absent.
            half: Whether to write 16-bit weights.

        Returns:
            The folder.

        Raises:
            CheckpointError: Where the folder cannot be written.
        """
        folder = Path(folder)
        state = {name: (x.half() if half else x).cpu() for name, x in self.heads_state_dict().items()}
        notes = {**self.describe(), "card": self.metadata}
        notes["heads"] = weights_hash({name: x.float() for name, x in state.items()})
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.tuned:
                own = write_weights(self.backbone, folder, half=half)
                notes["backbone_fingerprint"], notes["backbone_weights"] = own
            write_saved(folder, notes, state, self.training_images)
            if not self.tuned:
                remove_weights(folder)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder} cannot be written ({first_line(error)}); give another folder") from None
        return folder

    @classmethod
    def load(
        cls, folder: str | Path, backbone: Backbone | None = None, weights: str | Path | None = None
    ) -> "IGROTModel":
        """Read a saved model.

        Args:
            folder: What `save` wrote.
            backbone: The backbone to put the heads on; built by its saved name where None. Where the folder
                holds the backbone's own weights, they are put into it.
            weights: Weights of the backbone that is built; its default ones where None. Not looked at where
                the folder holds the backbone's own.

        Returns:
            The model in evaluation mode.

        Raises:
            CheckpointError: Where files are missing or damaged, or the backbone is not the
                one the heads were trained on.
        """
        folder = Path(folder)
        saved = read_saved(folder)
        if saved.own is not None:
            backbone = put_weights(backbone, folder) if backbone else build_again(saved.backbone, saved.own, folder)
        else:
            backbone = backbone or build_backbone(saved.backbone, weights)
        if backbone.fingerprint() != saved.fingerprint:
            given = "is not what model.json describes; copy both again"
            raise CheckpointError(
                f"{folder} was trained on backbone {saved.backbone} {saved.fingerprint}, "
                f"but this is {backbone.name} {backbone.fingerprint()}; give the weights it was trained on"
                if saved.own is None
                else f"{folder}: backbone.safetensors {given}"
            )
        if weights_hash(saved.state) != saved.heads:
            raise CheckpointError(f"{folder}: heads.safetensors does not belong to model.json; copy both again")
        fusion = build_query_head(saved.kinds["fusion"], backbone.dim, **saved.options["fusion"])
        target = build_target_head(saved.kinds["target"], backbone.dim, **saved.options["target"])
        projector = build_projector(saved.kinds["projector"], backbone.dim, **saved.options["projector"])
        model = cls(backbone, fusion, target, saved.card, projector)
        model.tuned, model.training_images = saved.own is not None, saved.images
        model.readme, model.readme_for = saved.readme, saved.heads
        model._take_heads(saved.state, folder)
        return model.eval()

    def _take_heads(self, state: dict[str, Tensor], folder: Path) -> None:
        known = self.heads_state_dict()
        wrong = [key for key in state.keys() & known.keys() if state[key].shape != known[key].shape]
        if wrong:
            raise CheckpointError(f"{folder}: weights of another shape than model.json describes: {sorted(wrong)[:3]}")
        missing, unexpected = self.load_state_dict(state, strict=False)
        missing = [name for name in missing if not name.startswith("backbone.")]
        if missing or unexpected:
            raise CheckpointError(f"{folder}: weights missing {missing}, not known {unexpected}")


def model_fingerprint(described: Mapping[str, Any]) -> str:
    """Return a model's fingerprint from its description, without hashing its weights again.

    Args:
        described: What `IGROTModel.describe` gave.
    """
    # Heads without weights differ by kind alone.
    heads = json.dumps([described[part] for part in ("heads", "fusion", "target", "projector")], sort_keys=True)
    return f"{described['backbone_fingerprint']}-{hashlib.sha256(heads.encode()).hexdigest()[:16]}"


def baseline(backbone: Backbone, kind: str, null: Features | None = None) -> IGROTModel:
    """Return a method without training: the image, the text or their sum against plain image embeddings.

    Args:
        backbone: The frozen model.
        kind: `image`, `text` or `sum`.
        null: The null text's features, where they are known.
    """
    heads = build_query_head(kind, backbone.dim), build_target_head("frozen", backbone.dim)
    return IGROTModel(backbone, *heads, null=null).eval()


def load(name: str | Path = "tiny", weights: str | Path | None = None, revision: str | None = None) -> IGROTModel:
    """Load a model.

    Args:
        name: `tiny` for the embedded default, a folder written by `IGROTModel.save`, or `owner/name` of a
            model on the Hugging Face hub, also `owner/name@revision`. Or a backbone alone, without trained heads:
            `base`, `large`, `openclip_h`, `blip`, `siglip2`, `open_clip:<architecture>/<tag>` or `hf:<repository>`;
            queries are then the sum of image and text, as in `baseline`. A folder of that name goes first.
        weights: Weights of the backbone; its default ones where None.
        revision: A branch, tag or commit on the hub; the latest of `main` where None.

    Returns:
        The model in evaluation mode, ready to embed.

    Raises:
        CheckpointError: Where there is no such model; the line says where it was looked for.
    """
    if str(name) == "tiny":
        return IGROTModel.load(str(files("union_igrot") / "weights" / "tiny" / "model"), weights=weights)
    if is_backbone(str(name)) and not Path(name).is_dir():
        return baseline(build_backbone(str(name), weights), "sum")
    return IGROTModel.from_pretrained(name, weights=weights, revision=revision)
