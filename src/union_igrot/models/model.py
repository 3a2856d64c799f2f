"""The model: a frozen backbone, a query head, a target head and an optional vision projector."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from types import NoneType
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from union_igrot.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    check_count,
    did_you_mean,
    first_line,
    names_arguments,
    wrong_type,
)
from union_igrot.images.dataset import load_pixels
from union_igrot.images.decode import file_bytes
from union_igrot.images.transforms import model_input
from union_igrot.models.backbones.base import Backbone, Modality, PreprocessChoice, weights_hash
from union_igrot.models.checkpoint import (
    build_heads,
    load_backbone_weights,
    read_checkpoint,
    remove_backbone,
    resolve_checkpoint,
    restore_backbone,
    save_backbone,
    write_checkpoint,
)
from union_igrot.models.devices import default_workers, full_precision, resolve_device
from union_igrot.models.factory import build_backbone, build_query_head, build_target_head
from union_igrot.models.heads.query import QueryHead, VisionProjector
from union_igrot.models.heads.target import TargetHead
from union_igrot.models.hub import check_repository, fetch_model, push_folder, short_card, split_name
from union_igrot.models.registry import BACKBONES, USUAL_NAMES, names_backbone, near_name
from union_igrot.storage.files import expand_user, is_folder
from union_igrot.terminal import progress_bar
from union_igrot.types import Features, LazyImage, Preprocess

_SPANS_FOR_WORKERS = 4
BUNDLED = {"tiny": "model", "tiny-union": "union"}
"""Bundled models by name, with their folders."""


@final
class IGROTModel(nn.Module):
    """Embeds queries (image, text or both) and gallery images into one space.

    `encode_queries` and `encode_gallery` take paths, images and texts; `embed_queries` and `embed_gallery` take
    preprocessed tensors or features, with gradients.

    Args:
        backbone: The frozen vision-language model.
        fusion: The query head.
        target: The target head.
        metadata: Facts on the training: data, classes, settings ("card" in `model.json`).
        projector: Changes the image features of queries and gallery, or None.
        null: Features of the empty text, if another model of this backbone has encoded it.

    Attributes:
        training_images: Identities (`images.identity`) of the training images, or None if they are not recorded.
        calibration: Embeddings of training queries by task, for `evaluation.calibration`, or None.
        tuned: Whether the backbone's weights differ from those of its name: an encoder was tuned, or the weights
            came with a checkpoint of the reference. `save` then writes them beside the heads.
        readme: The model card that was loaded with the heads, or None.
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
        self.calibration: dict[str, Tensor] | None = None
        self.tuned = False
        self.readme: str | None = None
        self._readme_heads = ""  # hash of the heads that `readme` describes
        self._null = null

    def __repr__(self) -> str:
        heads = f"{self.fusion.kind} queries, {self.target.kind} target" + (", projector" if self.projector else "")
        trained = f", trained on {self.metadata['data']}" if self.metadata.get("data") else ""
        return f"IGROTModel({self.backbone.name}, {heads}, dim={self.backbone.dim}, device={self.device}{trained})"

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            own = [one for one in dir(type(self)) if not one.startswith("_") and not hasattr(nn.Module, one)]
            advice = "" if name.startswith("_") else did_you_mean(name, own) or f"it has {', '.join(own)}"
            raise AttributeError("; ".join(filter(None, (str(error), advice)))) from None

    @property
    def preprocess(self) -> Preprocess:
        """How an image becomes this model's input."""
        return self.backbone.preprocess

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.backbone.device

    def tune(self, encoders: Collection[Modality]) -> None:
        """Train encoders of the backbone with the heads, until `finish_training`."""
        self.backbone.tune(encoders)
        self.tuned = self.tuned or bool(encoders)
        self._null = None

    def finish_training(self) -> None:
        """Freeze the backbone and switch to evaluation mode."""
        self.backbone.freeze()
        self.eval()
        self._null = None

    def null_text(self) -> Features:
        """Return the features of the empty text, encoded once, or each time while the text encoder is tuned."""
        if "text" in self.backbone.tuned_encoders:
            return self.backbone.encode_text([""])
        if self._null is None or self._null.pooled.device != self.device:
            # Never in inference mode: later training could not use such a tensor.
            with torch.inference_mode(mode=False), torch.no_grad():
                self._null = self.backbone.encode_text([""])
        return self._null

    @names_arguments
    def embed_queries(
        self, images: Tensor | Features | None = None, texts: str | Sequence[str | None] | Features | None = None
    ) -> Float[Tensor, "batch dim"]:
        """Embed queries from preprocessed images, or features.

        Args:
            images: Float tensors [batch, 3, size, size] preprocessed by `preprocess`, or their features. None embeds
                the texts alone.
            texts: Modification texts, one per image, or their features; a `str` is one text. None and "" are the
                null text.

        Returns:
            Embeddings of unit length.

        Raises:
            ConfigError: If neither images nor texts are given, or one has a wrong type, dtype or shape.
            DataError: If the numbers of images and texts differ.
        """
        if images is None:
            if texts is None:
                raise ConfigError("embed_queries needs images, texts or both")
            # Without an image the text embedding is the query: no head was trained for it.
            return nn.functional.normalize(self._text_features(texts, 0).pooled, dim=-1)
        encoded = self._image_features(images, "encode_queries")
        count = encoded.pooled.shape[0]  # len() would be a constant of an exported model
        text_features = self._text_features(texts, count)
        if (given := text_features.pooled.shape[0]) != count:
            raise DataError(f"got {count} images and {given} texts (expected one text per image, or none)")
        fused: Tensor = self.fusion(encoded, text_features)
        return fused

    @names_arguments
    def embed_gallery(self, images: Tensor | Features) -> Float[Tensor, "batch dim"]:
        """Embed gallery images from preprocessed images, or features.

        Args:
            images: As for `embed_queries`.

        Returns:
            Embeddings of unit length, except under the reference's training sum.

        Raises:
            ConfigError: If the images have a wrong type, dtype or shape.
        """
        encoded = self._image_features(images, "encode_gallery")
        embedded: Tensor = self.target(encoded, self.null_text().expand(encoded.pooled.shape[0]), self.fusion)
        return embedded

    @names_arguments
    def encode_queries(
        self,
        images: object = None,
        texts: str | Iterable[str | None] | None = None,
        *,
        batch_size: int = 64,
        workers: int | None = None,
        progress: bool = False,
        device: str | torch.device | None = None,
    ) -> Float[Tensor, "queries dim"]:
        """Encode queries from paths, images and texts, without gradients.

        Args:
            images: One image or several: paths, PIL images, arrays, tensors, bytes, open files or `LazyImage`s, see
                `images.decode.as_image`. A single array or tensor of at most 3 dimensions is one image. A float
                tensor of 4 dimensions is a preprocessed batch, as for `embed_queries`. None encodes the texts alone.
            texts: One modification text per image, or None; a `str` is one text. Missing values of a table are None.
            batch_size: Queries per forward pass.
            workers: Processes that decode images, 0 for this one. None starts some from 4 batches on.
            progress: Whether to show a progress bar.
            device: Device of the result; None for the CPU.

        Returns:
            Embeddings of unit length, float32.

        Raises:
            ImageError: If an image cannot be read.
            ConfigError: If neither images nor texts are given, or one has a wrong type or shape.
            DataError: If the numbers of images and texts differ.
        """
        some_texts, some_images = _as_texts(texts), None if images is None else _as_images(images)
        if some_images is None and some_texts is None:
            raise ConfigError("encode_queries needs images, texts or both")
        count = len(some_texts or ()) if some_images is None else len(some_images)
        if some_texts is not None and len(some_texts) != count:
            raise DataError(
                f"got {count} images and {len(some_texts)} texts (expected one text per image, or none); repeat a "
                "text or an image that belongs to several: [text] * count"
            )

        def embed(span: slice, loaded: Tensor | None) -> Tensor:
            return self.embed_queries(loaded, None if some_texts is None else some_texts[span])

        return self._encode(embed, some_images, count, batch_size, workers, progress, device)

    @names_arguments
    def encode_gallery(
        self,
        images: object,
        *,
        batch_size: int = 64,
        workers: int | None = None,
        progress: bool = False,
        device: str | torch.device | None = None,
    ) -> Float[Tensor, "images dim"]:
        """Encode gallery images, without gradients; arguments, result and errors as for `encode_queries`."""
        some = _as_images(images)
        return self._encode(
            lambda _, loaded: self.embed_gallery(loaded), some, len(some), batch_size, workers, progress, device
        )

    def _encode(
        self,
        embed: Callable[[slice, Any], Tensor],
        images: Sequence[Any] | Tensor | None,
        count: int,
        batch_size: int,
        workers: int | None,
        progress: bool,
        device: str | torch.device | None,
    ) -> Tensor:
        """Embed items batch by batch in evaluation mode, and normalize the embeddings."""
        check_count("batch_size", batch_size)
        check_count("workers", workers or 0, 0)
        there = resolve_device("cpu" if device is None else device)
        spans = [slice(at, min(at + batch_size, count)) for at in range(0, count, batch_size)]
        embeddings, training = [torch.empty(0, self.backbone.dim, device=there)], self.training
        self.eval()
        try:
            with progress_bar(shown=progress) as bar, torch.no_grad(), full_precision(self.device):
                task = bar.add_task("encoding", total=count)
                for span, loaded in zip(spans, self._load(images, spans, workers), strict=True):
                    embeddings.append(nn.functional.normalize(embed(span, loaded).float(), dim=-1).to(there))
                    bar.advance(task, span.stop - span.start)
        finally:
            self.train(training)
        return torch.cat(embeddings)

    def _load(
        self, images: Sequence[Any] | Tensor | None, spans: Sequence[slice], workers: int | None
    ) -> Iterator[Tensor | None]:
        """Yield the preprocessed images of each span, decoded ahead by worker processes."""
        if images is None or isinstance(images, Tensor):
            yield from (None if images is None else images[span] for span in spans)
            return
        if workers is None:
            workers = default_workers(self.device) if len(spans) >= _SPANS_FOR_WORKERS else 0
        if workers:  # an open file is not passed to another process
            images = [file_bytes(image) if hasattr(image, "read") else image for image in images]
        batches = [range(span.start, span.stop) for span in spans]
        for pixels in load_pixels(images, batches, self.preprocess, workers):
            yield model_input(pixels.to(self.device), self.preprocess)

    def _image_features(self, images: Tensor | Features, instead: str) -> Features:
        if isinstance(images, Features):
            encoded = images
        else:
            check_model_input(images, self.preprocess.size, instead)
            encoded = self.backbone.encode_image(images.to(self.device))
        projected: Features = encoded if self.projector is None else self.projector(encoded)
        return projected

    def _text_features(self, texts: str | Sequence[str | None] | Features | None, batch: int) -> Features:
        if isinstance(texts, Features):
            return texts
        several = _as_texts(texts)
        if several is None or not any(several):
            return self.null_text().expand(batch if several is None else len(several))
        return self.backbone.encode_text([text or "" for text in several])

    def head_parameters(self) -> Iterator[nn.Parameter]:
        """Return every weight that is not the backbone's."""
        return (weight for name, weight in self.named_parameters() if not name.startswith("backbone."))

    def heads_state_dict(self) -> dict[str, Tensor]:
        """Return the weights of the heads and the projector by name."""
        return {name: x for name, x in self.state_dict().items() if not name.startswith("backbone.")}

    def fingerprint(self) -> str:
        """Return a hash of the backbone's weights, the preprocessing, and the heads with their kinds and options."""
        return model_fingerprint(self.describe())

    def describe(self) -> dict[str, Any]:
        """Return what identifies this model, for results and saved files."""
        return {
            "backbone": self.backbone.name,
            "backbone_fingerprint": self.backbone.fingerprint(),
            "preprocess": self.backbone.preprocess_choice,
            "tuned": self.tuned,
            "heads": weights_hash(self.heads_state_dict()),
            "fusion": {"kind": self.fusion.kind, **self.fusion.options},
            "target": {"kind": self.target.kind, **self.target.options},
            "projector": None if self.projector is None else {"kind": self.projector.kind, **self.projector.options},
        }

    def save(self, folder: str | Path, *, half: bool = False) -> Path:
        """Write the heads, their description and a model card; each file appears complete or not at all.

        Args:
            folder: The folder, created if absent. `training_images.txt` is written if the training images are
                recorded, and the backbone's weights and tokenizer if `tuned` is set.
            half: Whether to write 16-bit weights.

        Returns:
            The folder.

        Raises:
            CheckpointError: If the folder cannot be written.
        """
        folder = expand_user(folder)
        state = {name: (x.half() if half else x).cpu() for name, x in self.heads_state_dict().items()}
        described = {**self.describe(), "card": self.metadata}
        same_heads = described["heads"] == self._readme_heads
        described["heads"] = weights_hash({name: x.float() for name, x in state.items()})
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.tuned:
                fingerprint, built = save_backbone(self.backbone, folder, half=half)
                described |= {"backbone_fingerprint": fingerprint, "backbone_weights": built}
            readme = self.readme if self.readme is not None and same_heads else short_card(described)
            write_checkpoint(folder, described, state, self.training_images, readme, self.calibration)
            if not self.tuned:
                remove_backbone(folder)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write {folder} ({first_line(error)}); give another folder") from None
        return folder

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, **options: Any
    ) -> str:
        """Upload the heads, their description and the model card to the Hugging Face hub.

        The weights of a frozen backbone are not uploaded; those of a tuned one are.

        Args:
            repo_id: `owner/name`; created if it does not exist.
            private: Whether a new repository is private; None for the account's default.
            token: Access token; None for the one of `hf auth login`.
            options: Further options: `branch`, `commit_message`, `card` (text of the model card), and those of
                `huggingface_hub.HfApi.upload_folder`, such as `create_pr`.

        Returns:
            The address of the upload.

        Raises:
            CheckpointError: If the name is invalid, or the hub cannot be reached or refuses.
        """
        check_repository(repo_id)
        with TemporaryDirectory() as folder:
            return push_folder(self.save(folder), repo_id, private=private, token=token, **options)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        backbone: Backbone | None = None,
        weights: str | Path | None = None,
        **options: Any,
    ) -> "IGROTModel":
        """Load a model from a folder or the Hugging Face hub.

        Args:
            name: Folder of a saved model or of a run, or `owner/name` or `owner/name@revision` on the hub. An
                existing folder takes precedence.
            revision: A branch, tag or commit on the hub; None for the latest of `main`.
            backbone: As for `load`.
            weights: As for `load`.
            options: Further options of `huggingface_hub.snapshot_download`: `token`, `cache_dir`, `force_download`,
                `local_files_only`.

        Returns:
            The model in evaluation mode.

        Raises:
            CheckpointError: If there is no such model, or it cannot be downloaded or read.
        """
        if is_folder(expand_user(name)):
            return cls.load(name, backbone, weights)
        named = split_name(str(name))
        if named is None or named[0].lower().replace("/", "-") in USUAL_NAMES:
            known = [*BUNDLED, *BACKBONES.names()]
            raise CheckpointError(
                f"no model {str(name)!r}{near_name(str(name), known)}; give a folder with model.json"
                " and heads.safetensors, owner/name of the hub, photos, tiny, tiny-union, or a backbone such as base"
            )
        return cls.load(fetch_model(named[0], revision or named[1], **options), backbone, weights)

    @classmethod
    def load(
        cls, folder: str | Path, backbone: Backbone | None = None, weights: str | Path | None = None
    ) -> "IGROTModel":
        """Load a saved model.

        Args:
            folder: Folder that `save` wrote, or of a run with `model/` inside.
            backbone: The backbone of the heads; None builds it by its saved name. Weights that were saved with the
                heads are loaded into it.
            weights: Weights of the backbone that is built; None for its default ones. Ignored if the folder holds
                the backbone's weights.

        Returns:
            The model in evaluation mode.

        Raises:
            CheckpointError: If files are missing or damaged, or the backbone is not the one that the heads were
                trained on.
        """
        folder = resolve_checkpoint(folder)
        saved = read_checkpoint(folder)
        described, built = saved.description, saved.description.get("backbone_weights")
        name, fingerprint = described["backbone"], described["backbone_fingerprint"]
        if built is None:
            backbone = backbone or build_backbone(name, weights, described.get("preprocess"))
        elif backbone is None:
            backbone = restore_backbone(name, built, folder, described.get("preprocess"))
        else:
            load_backbone_weights(backbone, folder)
        if not backbone.matches(fingerprint):
            raise CheckpointError(
                f"{folder} was trained on backbone {name} {fingerprint}, "
                f"but this is {backbone.name} {backbone.fingerprint()}; give the weights it was trained on"
                if built is None
                else f"{folder}: backbone.safetensors does not match model.json; copy both again"
            )
        query_head, target_head, projector = build_heads(saved, backbone.dim, folder)
        model = cls(backbone, query_head, target_head, described["card"], projector)
        model.tuned, model.training_images = built is not None, saved.images
        model.readme, model._readme_heads = saved.readme, described["heads"]
        if any(x.shape[1] != backbone.dim for x in (saved.calibration or {}).values()):
            raise CheckpointError(f"{folder}: calibration.safetensors is not of width {backbone.dim}; copy both again")
        model.calibration = saved.calibration
        return model.eval()


def check_model_input(images: object, size: int, instead: str) -> None:
    """Raise ConfigError unless images are a float tensor [batch, 3, size, size]; `instead` takes other images."""
    if isinstance(images, Tensor):
        if images.is_floating_point() and images.ndim == 4 and images.shape[1:] == (3, size, size):
            return
        given = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
    else:
        given = type(images).__name__
    raise ConfigError(
        f"images must be float tensors [batch, 3, {size}, {size}] preprocessed by model.preprocess (got {given}); "
        f"use {instead} for paths, PIL images and arrays"
    )


def _as_texts(texts: object) -> list[str | None] | None:
    """Return texts as a list; a single text becomes a list of one."""
    if texts is None:
        return None
    if isinstance(texts, str):
        return [texts]
    several = [] if isinstance(texts, bytes | Mapping) or not isinstance(texts, Iterable) else list(texts)
    # A missing value of a table is a nan, which differs from itself.
    several = [None if isinstance(text, float) and text != text else text for text in several]  # noqa: PLR0124
    odd = [text for text in several if not isinstance(text, str | None)]
    if odd or not (several or isinstance(texts, list | tuple)):
        raise wrong_type("texts", [*odd, texts][0], "a str, or several str and None")
    return several


def _as_images(images: object) -> Sequence[object] | Tensor:
    """Return images as a sequence, or as the batch they are; a single image becomes a list of one."""
    if isinstance(images, np.ndarray) and images.dtype.kind in "OU":  # paths, images
        return list(images.flat)
    if isinstance(images, Tensor | np.ndarray) and images.ndim == 4:
        batch = isinstance(images, Tensor) and images.is_floating_point()
        return images if isinstance(images, Tensor) and batch else list(images)
    single = (str, Path, Image.Image, np.ndarray, Tensor, bytes, bytearray, memoryview, LazyImage)
    if isinstance(images, single) or hasattr(images, "read"):
        return [images]
    expected = "paths, PIL images, arrays or tensors, one or several"
    if isinstance(images, Mapping) or hasattr(images, "columns"):
        raise wrong_type("images", images, f"{expected}; pass the values, or a column")
    if not isinstance(images, Iterable):
        raise wrong_type("images", images, expected)
    several = list(images)
    if odd := [one for one in several if isinstance(one, list | tuple | NoneType)]:
        raise wrong_type("an image", odd[0], f"{expected}; texts are passed as texts=, one per image")
    return several


def model_fingerprint(description: Mapping[str, Any]) -> str:
    """Return a model's fingerprint from the result of `IGROTModel.describe`, without hashing its weights again."""
    # Heads without weights differ by kind alone.
    heads = json.dumps([description[key] for key in ("heads", "fusion", "target", "projector")], sort_keys=True)
    return f"{description['backbone_fingerprint']}-{hashlib.sha256(heads.encode()).hexdigest()[:16]}"


def baseline(backbone: Backbone, kind: str, null: Features | None = None) -> IGROTModel:
    """Return an untrained model: image, text or their sum as queries, plain image embeddings as targets.

    Args:
        backbone: The frozen model.
        kind: `image`, `text` or `sum`.
        null: Features of the empty text, if they are known.
    """
    heads = build_query_head(kind, backbone.dim), build_target_head("frozen", backbone.dim)
    return IGROTModel(backbone, *heads, null=null).eval()


@names_arguments
def load(
    name: str | Path = "tiny",
    device: str | torch.device | None = None,
    *,
    weights: str | Path | None = None,
    revision: str | None = None,
    preprocess: PreprocessChoice | None = None,
) -> IGROTModel:
    """Load a model.

    Args:
        name: `tiny` for the bundled model, `tiny-union` for UNION's target head on its backbone; the folder of a run,
            or one that `IGROTModel.save` wrote; or `owner/name` of a model on the Hugging Face hub, also
            `owner/name@revision`. Or a backbone without trained heads: `base`, `large`, `openclip_h`, `blip`,
            `siglip2`, `tinyclip`, `open_clip:<architecture>/<tag>`, `hf-hub:<repository>` (OpenCLIP),
            `hf:<repository>` (transformers) or a registered name; queries are then the sum of image and text, as in
            `baseline`. A folder that holds a saved model takes precedence over the hub and backbones.
        device: `cpu`, `cuda`, `cuda:1`, `mps` or `auto`; None for the CPU.
        weights: Weights of the backbone; None for its default ones.
        revision: A branch, tag or commit on the hub; None for the latest of `main`.
        preprocess: Preprocessing of a backbone without trained heads: `model` or `pad`, see `build_backbone`. Trained
            heads keep the preprocessing that they were trained with.

    Returns:
        The model in evaluation mode, ready to encode.

    Raises:
        CheckpointError: If there is no such model; the error says what was tried.
        ConfigError: If the device is not available, or trained heads have another preprocessing.
    """
    for argument, value in (("name", name), ("weights", weights), ("revision", revision)):
        if not isinstance(value, str | Path) and (value is not None or argument == "name"):
            raise wrong_type(argument, value, "a name or a path")
    there = None if device is None else resolve_device(device)
    if str(name) in BUNDLED:
        model = IGROTModel.load(str(files("union_igrot") / "weights" / "tiny" / BUNDLED[str(name)]), weights=weights)
    elif names_backbone(str(name)):
        model = baseline(build_backbone(str(name), weights, preprocess), "sum")
    else:
        model = IGROTModel.from_pretrained(name, weights=weights, revision=revision)
    if preprocess not in (None, model.backbone.preprocess_choice):
        raise ConfigError(
            f"invalid value for preprocess: {preprocess} (the heads of {name} were trained with "
            f"{model.backbone.preprocess_choice}); leave it out"
        )
    return model if there is None else model.to(there)
