"""BLIP, SigLIP (1 and 2) and CLIP through transformers, from a hub or a local folder.

Knows where each model keeps its tokens and how they reach the joint space. Does not know
heads, images' files or configurations. A model's class is imported when it is used.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from union_igrot.errors import CheckpointError, ConfigError, first_line
from union_igrot.models.backbones.base import Backbone
from union_igrot.models.backbones.weights import LIBRARY_ERRORS, WEIGHTS, summarize_names
from union_igrot.types import Features, Preprocess

NAMES = {"blip": "Salesforce/blip-itm-base-coco", "siglip2": "google/siglip2-base-patch16-224"}
"""Short names of repositories on the Hugging Face hub."""
BLIP_CONTEXT = 35
"""Text positions of BLIP's retrieval models, padding included (Li et al., and the reference)."""
_BILINEAR, _BICUBIC = 2, 3


class _Transformers(Backbone):
    """What the models of transformers have in common: how they are built again.

    Attributes:
        kind: Name of the architecture, as configurations of transformers have it.
    """

    kind: str
    network: Any
    tokenizer: Any

    def architecture(self) -> dict[str, Any]:
        """Return the network's configuration."""
        return {"kind": self.kind, "config": json.loads(self.network.config.to_json_string(use_diff=False))}

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)


@final
class BlipBackbone(_Transformers):
    """BLIP's two towers for retrieval, frozen, without cross-attention and matching head.

    All image tokens pass `vision_proj`, all 35 text positions `text_proj`; `pooled` is
    the first of each. Source: the reference's `blip_retrieval.py`, `return_local=True`.

    Args:
        network: A `BlipForImageTextRetrieval`; its unused parts are taken off.
        tokenizer: BERT's, as transformers gives it.
        preprocess: How an image becomes this model's input.
        name: What the model is called in configurations and saved models.
    """

    kind = "blip"

    def __init__(self, network: Any, tokenizer: Any, preprocess: Preprocess, name: str) -> None:
        super().__init__()
        del network.itm_head
        for layer in network.text_encoder.encoder.layer:
            if hasattr(layer, "crossattention"):
                del layer.crossattention
        self.network, self.tokenizer, self.preprocess, self.name = network, tokenizer, preprocess, name
        self.dim = network.vision_proj.out_features
        self.context = min(BLIP_CONTEXT, network.config.text_config.max_position_embeddings)
        self.freeze()

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> Features:
        """Encode preprocessed images."""
        seen = self.network.vision_model(pixel_values=images).last_hidden_state
        return _led_by_first(self.network.vision_proj(seen), None)

    def encode_text(self, texts: Sequence[str]) -> Features:
        """Encode texts; what is longer than the context is cut."""
        ids, mask = _tokenize(self.tokenizer, texts, self.context, self.device)
        said = self.network.text_encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return _led_by_first(self.network.text_proj(said), mask)


@final
class SiglipBackbone(_Transformers):
    """SigLIP or SigLIP 2 of a fixed image size, frozen.

    Its pooled embeddings are no tokens, so they stand in front of the tokens on both
    sides. An image's is an attention head's; a token passes that head as if the head
    saw it alone, which brings it into the joint space. A text's is the last of all
    positions, padding or not, through a linear head that every position then passes.

    Args:
        network: A `SiglipModel`.
        tokenizer: The model's, as transformers gives it.
        preprocess: How an image becomes this model's input.
        name: What the model is called in configurations and saved models.
    """

    kind = "siglip"

    def __init__(self, network: Any, tokenizer: Any, preprocess: Preprocess, name: str) -> None:
        super().__init__()
        self.network, self.tokenizer, self.preprocess, self.name = network, tokenizer, preprocess, name
        self.dim = network.config.vision_config.hidden_size
        self.context = network.config.text_config.max_position_embeddings
        self.freeze()

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> Features:
        """Encode preprocessed images."""
        seen = self.network.vision_model(pixel_values=images)
        head = self.network.vision_model.head
        # Attention over one token gives that token's value, whatever the question is.
        values = F.linear(
            seen.last_hidden_state,
            head.attention.in_proj_weight[2 * self.dim :],
            head.attention.in_proj_bias[2 * self.dim :],
        )
        alone = head.attention.out_proj(values)
        alone = alone + head.mlp(head.layernorm(alone))
        return _led_by_first(torch.cat([seen.pooler_output[:, None], alone], dim=1), None)

    def encode_text(self, texts: Sequence[str]) -> Features:
        """Encode texts, padded to the context as the model was trained; what is longer is cut."""
        ids, mask = _tokenize(self.tokenizer, texts, self.context, self.device)
        # Without an attention mask: the model learned to read its padding.
        said = self.network.text_model(input_ids=ids)
        tokens = self.network.text_model.head(said.last_hidden_state)
        real = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
        return _led_by_first(torch.cat([said.pooler_output[:, None], tokens], dim=1), real)


@final
class HFClipBackbone(_Transformers):
    """A CLIP of transformers, frozen; tokens as in `open_clip.OpenClipBackbone`.

    Args:
        network: A `CLIPModel`.
        tokenizer: CLIP's, as transformers gives it.
        preprocess: How an image becomes this model's input.
        name: What the model is called in configurations and saved models.
    """

    kind = "clip"

    def __init__(self, network: Any, tokenizer: Any, preprocess: Preprocess, name: str) -> None:
        super().__init__()
        self.network, self.tokenizer, self.preprocess, self.name = network, tokenizer, preprocess, name
        self.dim = network.config.projection_dim
        self.context = network.config.text_config.max_position_embeddings
        self.freeze()

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> Features:
        """Encode preprocessed images."""
        vision = self.network.vision_model
        seen = vision.post_layernorm(vision(pixel_values=images).last_hidden_state)
        return _led_by_first(self.network.visual_projection(seen), None)

    def encode_text(self, texts: Sequence[str]) -> Features:
        """Encode texts; what is longer than the context is cut, its end mark kept."""
        ids, _ = _tokenize(self.tokenizer, texts, self.context, self.device)
        said = self.network.text_model(input_ids=ids).last_hidden_state
        tokens = self.network.text_projection(said)
        # The padding may share the end mark's number: the first one counts.
        end = (ids == self.tokenizer.eos_token_id).int().argmax(1)
        mask = torch.arange(ids.shape[1], device=ids.device) <= end[:, None]
        return Features(tokens[torch.arange(len(ids), device=ids.device), end], tokens, mask, end)


HFBackbone = BlipBackbone | SiglipBackbone | HFClipBackbone
_KINDS: dict[str, tuple[str, type[HFBackbone]]] = {
    BlipBackbone.kind: ("BlipForImageTextRetrieval", BlipBackbone),
    SiglipBackbone.kind: ("SiglipModel", SiglipBackbone),
    HFClipBackbone.kind: ("CLIPModel", HFClipBackbone),
}


def load_hf(name: str, weights: str | Path | None = None) -> HFBackbone:
    """Build a model of transformers with its trained weights.

    The preprocessing is the repository's own, but for `blip`: that name stands for the
    reference's recipe, which pads images longer than 1.25 to 1 to that ratio, then
    resizes and cuts; `hf:Salesforce/blip-itm-base-coco` squashes, as its authors do.

    Args:
        name: `blip`, `siglip2` or `hf:<repository>`.
        weights: None to download on first use (kept by huggingface_hub), or a local folder
            with `config.json`, weights, tokenizer and `preprocessor_config.json`.

    Raises:
        ConfigError: Where the name or the kind of model is not supported.
        CheckpointError: Where a file cannot be had, read or fitted.
    """
    source = NAMES.get(name) or (name.removeprefix("hf:") if name.startswith("hf:") else "")
    if not source:
        raise ConfigError(f"backbone {name!r} is not one of transformers; choose {', '.join(NAMES)} or hf:<repository>")
    if weights is not None:
        source = str(weights)
        if not Path(source).is_dir():
            raise CheckpointError(
                f"backbone {name!r}: {source} is not a folder; set model.weights to a folder with config.json, "
                "model.safetensors, tokenizer files and preprocessor_config.json"
            )
    model_class, kind = _kind(name, source)
    network = _network(name, source, model_class)
    preprocess = _preprocess(name, source, network.config.vision_config.image_size)
    return kind(network, load_tokenizer(source, name), preprocess, name)


def restore_hf(name: str, kind: str, config: Mapping[str, Any], preprocess: Preprocess, words: Path) -> HFBackbone:
    """Build a model of transformers from its configuration, with weights drawn at random.

    Args:
        name: What the model is called.
        kind: Its architecture, as `architecture` gave it.
        config: Its configuration, as `architecture` gave it.
        preprocess: How an image becomes its input.
        words: A folder with its tokenizer's files.

    Raises:
        KeyError: Where the architecture is not known.
        CheckpointError: Where the tokenizer cannot be read.
    """
    import transformers  # noqa: PLC0415 - heavy, only what is used

    class_name, backbone = _KINDS[kind]
    model_class = getattr(transformers, class_name)
    network = model_class(model_class.config_class.from_dict(dict(config)))
    return backbone(network, load_tokenizer(words, name), preprocess, name)


def load_tokenizer(source: str | Path, name: str) -> Any:
    """Load a tokenizer from a repository, a folder or a BERT `vocab.txt`.

    Raises:
        CheckpointError: Where it cannot be had or read.
    """
    from transformers import AutoTokenizer, BertTokenizer  # noqa: PLC0415 - heavy, only what is used

    try:
        if Path(source).is_file():
            return BertTokenizer(vocab=str(source))
        return AutoTokenizer.from_pretrained(str(source))
    except Exception as error:
        # The tokenizers library raises the plain base class where a file is damaged.
        if type(error) is not Exception and not isinstance(error, LIBRARY_ERRORS):
            raise
        raise _unavailable(name, str(source), "tokenizer files", error) from None


def _kind(name: str, source: str) -> tuple[Any, type[HFBackbone]]:
    import transformers  # noqa: PLC0415 - heavy, only what is used

    try:
        model_type = transformers.AutoConfig.from_pretrained(source).model_type
    except LIBRARY_ERRORS as error:
        raise _unavailable(name, source, "config.json", error) from None
    if model_type not in _KINDS:
        hint = " (its images vary in size; take a repository of a fixed one)" if model_type == "siglip2" else ""
        raise ConfigError(f"backbone {name!r} is a {model_type} model{hint}; supported are {', '.join(_KINDS)}")
    class_name, kind = _KINDS[model_type]
    return getattr(transformers, class_name), kind


def _network(name: str, source: str, model_class: Any) -> Any:
    try:
        network, told = model_class.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    except LIBRARY_ERRORS as error:
        raise _unavailable(name, source, "model.safetensors", error) from None
    # transformers draws what a file lacks at random; that is never what is meant here.
    missing = [*told["missing_keys"], *(str(key) for key in told["mismatched_keys"])]
    if missing := [key for key in missing if not key.endswith("position_ids")]:
        raise CheckpointError(
            f"the weights of {source} miss {summarize_names(missing)} or hold another shape; copy them again"
        )
    return network


def _preprocess(name: str, source: str, size: int) -> Preprocess:
    from transformers.image_processing_base import ImageProcessingMixin  # noqa: PLC0415 - heavy, only what is used

    try:
        notes, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except LIBRARY_ERRORS as error:
        raise _unavailable(name, source, "preprocessor_config.json", error) from None
    if not isinstance(notes, Mapping):
        raise CheckpointError(
            f"backbone {name!r}: preprocessor_config.json in {source} holds no settings; copy it again"
        )
    return _read_notes(notes, size, "pad" if name == "blip" else None, name)


def _read_notes(notes: Mapping[str, Any], size: int, fit: Literal["pad"] | None, name: str) -> Preprocess:
    given = notes.get("size", size)
    short = given.get("shortest_edge") if isinstance(given, Mapping) else None
    crop = bool(notes.get("do_center_crop", False))
    resample = notes.get("resample", _BICUBIC)
    missing = [key for key in ("image_mean", "image_std") if len(notes.get(key) or ()) != 3]
    if missing or resample not in (_BILINEAR, _BICUBIC):
        problem = f"lacks {', '.join(missing)}" if missing else f"resamples by {resample}"
        raise CheckpointError(
            f"the preprocessor_config.json of {name!r} {problem}; give means, stds and resample 2 or 3"
        )
    (r, g, b), (s, t, u) = notes["image_mean"], notes["image_std"]
    return Preprocess(
        size=size,
        mean=(r, g, b),
        std=(s, t, u),
        fit=fit or ("crop" if crop or short else "squash"),
        interpolation="bicubic" if resample == _BICUBIC else "bilinear",
    )


def _unavailable(name: str, source: str, file: str, error: Exception) -> CheckpointError:
    if Path(source).exists():
        return CheckpointError(
            f"backbone {name!r}: {file} in {source} cannot be read ({first_line(error)}); copy it there"
        )
    return CheckpointError(
        f"backbone {name!r}: {file} of {source} is not on this machine and cannot be fetched ({first_line(error)}); "
        f"connect once, or copy the repository into a folder and give {WEIGHTS}"
    )


def _tokenize(
    tokenizer: Any, texts: Sequence[str], context: int, device: torch.device
) -> tuple[Int[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
    said = tokenizer(
        list(texts),
        padding="max_length",
        truncation=True,
        max_length=context,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return said["input_ids"].to(device), said["attention_mask"].to(device).bool()


def _led_by_first(tokens: Tensor, mask: Tensor | None) -> Features:
    """Return features whose pooled embedding is the first token."""
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return Features(tokens[:, 0], tokens, mask, torch.zeros(len(tokens), dtype=torch.long, device=tokens.device))
