"""CLIP models through OpenCLIP: OpenAI's, OpenCLIP's own and those in a local folder.

One rule brings the tokens of every architecture into the joint space: a token is what the tower's own head returns for
it alone. If the head reads one token, the pooled embedding is one of the tokens; if it averages or attends (ResNets,
SigLIP, CoCa, text towers of Hugging Face), the pooled embedding is put in front of them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path
from typing import Any, final

import open_clip
import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from jaxtyping import Bool, Float, Int
from open_clip.convert import convert_state_dict
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.timm_model import TimmModel
from open_clip.tokenizer import HFTokenizer
from open_clip.transformer import VisionTransformer
from timm.layers.attention_pool2d import AttentionPool2d, RotAttentionPool2d
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn import functional as F

from union_igrot.errors import CheckpointError, ConfigError, first_line
from union_igrot.models.backbones.base import Backbone, first_pooled, warn_truncated
from union_igrot.models.backbones.weights import (
    LIBRARY_ERRORS,
    WEIGHTS_OPTION,
    load_strict,
    read_state_dict,
    remove_prefixes,
    summarize_names,
)
from union_igrot.types import Features, Preprocess

Tokenizer = Callable[[list[str]], Int[Tensor, "batch length"]]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
NAMES = {
    "base": ("ViT-B-32", "openai"),
    "large": ("ViT-L-14", "openai"),
    "openclip_h": ("ViT-H-14", "laion2b_s32b_b79k"),
}
"""Short names, with architecture and tag."""
_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
_SIZES = (
    *("input_resolution", "context_length", "vocab_size", "attn_mask", "visual.attn_mask"),
    "text.transformer.embeddings.position_ids",
)
_CONTEXT = 77
_FIRST_POOLERS = ("ClsPooler", "ClsLastHiddenStatePooler")


@final
class OpenClipBackbone(Backbone):
    """A frozen CLIP built by OpenCLIP from a configuration.

    Pooled embeddings are OpenCLIP's own. OpenAI's image tokens are the class token and all patches after the final
    norm, times the projection, `pooled` the class token's; text tokens likewise at every position, `pooled` read at the
    end mark, and the mask True up to and including it, by position: CLIP pads with 0, which is also the id of "!". See
    the module for other architectures.

    Args:
        config: An OpenCLIP configuration: `embed_dim`, `vision_cfg`, `text_cfg`, `quick_gelu`.
        preprocess: How an image becomes this model's input.
        name: Name of the backbone in configurations and saved models.
        state: Weights by OpenCLIP's names; None for random ones (torch's seed).
        tokenizer: Texts to token ids, padded to the context; None for CLIP's byte pairs.
        source: What to call `state` in an error.

    Raises:
        ConfigError: If the configuration is invalid, or a tower's head cannot be applied to one token.
        CheckpointError: If `state` does not fit.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        preprocess: Preprocess,
        name: str,
        state: Mapping[str, Tensor] | None = None,
        tokenizer: Tokenizer | None = None,
        source: str = "the state dict",
    ) -> None:
        super().__init__()
        self.network = _build_network(config, name)
        self.config = deepcopy(dict(config))
        self.name, self.dim, self.preprocess = name, int(config["embed_dim"]), preprocess
        text = config["text_cfg"]
        self.context: int = text.get("context_length", _CONTEXT)
        self.tokenize: Tokenizer = tokenizer or open_clip.SimpleTokenizer(context_length=self.context)
        hf_tokenizer = getattr(self.tokenize, "tokenizer", None)
        self._padding = padding = int(getattr(hf_tokenizer, "pad_token_id", None) or 0)
        end = text.get("eos_id", 2) if text.get("pool_type") == "eos" else None
        padding_is_end = hf_tokenizer is not None and padding == hf_tokenizer.eos_token_id
        try:
            self._image_tokens = image_tower(self.network.visual)
            self._text_features = text_tower(self.network, end, padding, padding_is_end=padding_is_end)
        except UnsupportedTowerError as error:
            raise ConfigError(f"backbone {name!r} {error}; choose another architecture") from None
        if state is not None:
            hint = f"{name!r} may be another architecture"
            load_strict(self.network, _network_names(self.network, state, source), source, hint)
        self.freeze()

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> Features:
        """Encode preprocessed images."""
        return first_pooled(self._image_tokens(images))

    def encode_text(self, texts: Sequence[str]) -> Features:
        """Encode texts; longer ones are cut to the context, their end mark kept."""
        ids = self.tokenize(list(texts))
        full = [text for text, last in zip(texts, ids[:, -1].tolist(), strict=True) if last != self._padding]
        warn_truncated(self.name, full, self.context, self._token_count)
        return self._text_features(ids.to(self.device))

    def _token_count(self, text: str) -> int:
        hf_tokenizer = getattr(self.tokenize, "tokenizer", None)
        if hf_tokenizer is not None:
            return len(hf_tokenizer(text, verbose=False)["input_ids"])
        encode = getattr(self.tokenize, "encode", None)  # CLIP's byte pairs, without the two marks
        return 0 if encode is None else len(encode(text)) + 2

    def architecture(self) -> dict[str, Any]:
        """Return the network's configuration."""
        return {"kind": "open_clip", "config": self.config}

    def save_tokenizer(self, folder: Path) -> None:
        """Write the files of a tokenizer and a text tower of transformers; CLIP's byte pairs are part of OpenCLIP."""
        if isinstance(self.tokenize, HFTokenizer):
            self.tokenize.save_pretrained(folder)
        if self.config["text_cfg"].get("hf_model_name"):
            self.network.text.config.save_pretrained(folder)


def load_open_clip(name: str, weights: str | Path | None = None) -> OpenClipBackbone:
    """Build an OpenCLIP model with its trained weights.

    `base` and `large` are OpenAI's ViT-B/32 and ViT-L/14. Weights of OpenAI, recognized by the sizes in their files
    under any name, come with QuickGELU and with the reference's preprocessing: an image longer than 1.25 to 1 is padded
    to that ratio, then resized and cropped (TransAgg's TargetPad). All others keep the preprocessing of their tag in
    OpenCLIP, those in a folder the activation and the preprocessing of its configuration.

    Args:
        name: `base`, `large`, `openclip_h`, `open_clip:<architecture>/<tag>`, or `hf-hub:<repository>` for a model of
            OpenCLIP on the Hugging Face hub, which brings its own configuration; the tag is optional if `weights` is
            given, and the architecture may be any word if `weights` is a folder.
        weights: None to download on first use (kept by huggingface_hub); else OpenAI's .pt, a state dict, a safetensors
            file, or a folder with `open_clip_config.json` and weights.

    Raises:
        ConfigError: If the architecture or the tag is unknown or not supported.
        CheckpointError: If the weights cannot be downloaded or read, or do not fit.
    """
    if weights is None and name.startswith("hf-hub:"):
        weights = _download_repository(name.removeprefix("hf-hub:"))
    if weights is not None and Path(weights).is_dir():
        return _load_folder(name, Path(weights))
    arch, tag = parse_name(name)
    config = model_config(name)
    known = dict(get_pretrained_cfg(arch, tag)) if tag else {}
    if weights is None and not known:
        tags = summarize_names(list_pretrained_tags_by_model(arch))
        raise ConfigError(f"backbone {name!r}: {arch} has no tag {tag!r}; choose one of {tags} or give model.weights")
    path = Path(weights) if weights is not None else _download(name, known)
    state = read_state_dict(path)
    is_openai = tag == "openai" or "input_resolution" in state
    config["quick_gelu"] |= is_openai
    preprocess = _tag_preprocess(config, known or _common_preprocess(arch), is_openai=is_openai)
    return OpenClipBackbone(config, preprocess, name, state, _load_tokenizer(config), str(path))


def restore_open_clip(
    name: str,
    config: Mapping[str, Any],
    preprocess: Preprocess,
    folder: Path,
    state: Mapping[str, Tensor] | None = None,
    source: str = "",
) -> OpenClipBackbone:
    """Build an OpenCLIP model from its configuration and a folder.

    Args:
        name: Name of the backbone.
        config: Its configuration, from `architecture`.
        preprocess: How an image becomes its input.
        folder: The folder of its tokenizer, and of the configuration of a text tower of transformers, if it has them.
        state: Its weights; None for random ones.
        source: What to call `state` in an error.

    Raises:
        ConfigError: If the configuration is invalid.
        CheckpointError: If the tokenizer cannot be read.
    """
    local = {**config, "text_cfg": dict(config["text_cfg"])}
    text = local["text_cfg"]
    if text.get("hf_model_name") and (folder / "config.json").is_file():
        text["hf_model_name"] = str(folder)
    if text.get("hf_tokenizer_name"):
        text["hf_tokenizer_name"] = str(folder)
    backbone = OpenClipBackbone(local, preprocess, name, state, _load_tokenizer(local), source)
    backbone.config = deepcopy(dict(config))  # without the folder's path
    return backbone


def parse_name(name: str) -> tuple[str, str]:
    """Split a backbone's name into OpenCLIP's architecture and tag.

    Raises:
        ConfigError: If the name has another form, or the architecture is unknown.
    """
    arch, tag = _arch_and_tag(name)
    if arch not in open_clip.list_models():
        near = get_close_matches(arch, open_clip.list_models(), n=3, cutoff=0.0)
        raise ConfigError(
            f"backbone {name!r}: OpenCLIP has no architecture {arch!r}; the nearest are {', '.join(near)} "
            "(all: open_clip.list_models())"
        )
    return arch, tag


def _arch_and_tag(name: str) -> tuple[str, str]:
    arch, tag = NAMES.get(name, ("", ""))
    if name.startswith("open_clip:"):
        arch, _, tag = name.removeprefix("open_clip:").partition("/")
    if name.startswith("hf-hub:"):
        arch = name
    if not arch:
        raise ConfigError(f"backbone {name!r} is not OpenCLIP's; use open_clip:<architecture>/<tag>")
    return arch, tag


def model_config(name: str) -> dict[str, Any]:
    """Return a copy of the OpenCLIP configuration of a name, QuickGELU set as its tag needs.

    Raises:
        ConfigError: As `parse_name`.
    """
    arch, tag = parse_name(name)
    config: dict[str, Any] = deepcopy(open_clip.get_model_config(arch))
    known = get_pretrained_cfg(arch, tag) if tag else {}
    config["quick_gelu"] = bool(config.get("quick_gelu") or known.get("quick_gelu") or tag == "openai")
    return config


def _build_network(config: Mapping[str, Any], name: str) -> Any:
    """Build the network of a configuration with random weights."""
    vision, text = config.get("vision_cfg"), config.get("text_cfg")
    if not isinstance(vision, Mapping) or not isinstance(text, Mapping) or "embed_dim" not in config:
        raise ConfigError(f"backbone {name!r} has no embed_dim, vision_cfg or text_cfg; give an OpenCLIP configuration")
    options = {key: deepcopy(value) for key, value in config.items() if key not in ("custom_text", "multimodal_cfg")}
    # Nothing is downloaded, no further outputs are returned, and CoCa's decoder is left out.
    options["vision_cfg"] = {**options["vision_cfg"], "timm_model_pretrained": False, "output_tokens": False}
    options["text_cfg"] = {**options["text_cfg"], "hf_model_pretrained": False, "output_tokens": False}
    custom = config.get("custom_text") or config.get("multimodal_cfg") or text.get("hf_model_name")
    try:
        if text.get("hf_model_name"):
            _refuse_code(text["hf_model_name"])
        return (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**options)
    except (OSError, HTTPException) as error:
        raise CheckpointError(
            f"backbone {name!r}: cannot load the configuration of its text tower {text.get('hf_model_name')} "
            f"({first_line(error)}); connect once, or give {WEIGHTS_OPTION} of a folder with its config.json"
        ) from None
    except LIBRARY_ERRORS as error:
        raise ConfigError(f"backbone {name!r} is not a CLIP configuration: {first_line(error)}") from None


def _refuse_code(hf_model: str) -> None:
    """Raise ConfigError if the configuration of a text tower of transformers asks for code of its repository."""
    from transformers import AutoConfig  # noqa: PLC0415 - heavy

    try:
        has_code = bool(getattr(AutoConfig.from_pretrained(hf_model, trust_remote_code=False), "auto_map", None))
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        has_code = True
    if has_code:
        raise ConfigError(f"the text tower {hf_model} has code of its own, which is not run; use another architecture")


def _network_names(network: nn.Module, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Convert older layouts to the network's: sizes dropped, the text tower's prefix, shapes of scalars."""
    own = network.state_dict()
    named = remove_prefixes(state, own)
    if any(name.startswith(("vision_model.", "text_model.")) for name in named):
        raise CheckpointError(f"{source} is a model of transformers; use the backbone hf:<repository> with its folder")
    named = {name: x for name, x in named.items() if name not in _SIZES and not name.startswith("text_decoder.")}
    named = convert_state_dict(network, named)  # Apple's own names
    if "logit_bias" not in own:  # of a loss, not of features
        named.pop("logit_bias", None)
    if "text.positional_embedding" in own and "positional_embedding" in named:
        named = {(name if name.startswith(("visual.", "logit_")) else f"text.{name}"): x for name, x in named.items()}
    for name in ("logit_scale", "logit_bias"):
        if name in named and name in own and named[name].numel() == 1:
            named[name] = named[name].reshape(own[name].shape)
    # Counts of batches, which older files lack and frozen statistics do not use.
    return {name: x for name, x in own.items() if name.endswith(".num_batches_tracked")} | named


def _tag_preprocess(config: Mapping[str, Any], known: Mapping[str, Any], *, is_openai: bool) -> Preprocess:
    """Return the preprocessing from OpenCLIP's settings of a tag."""
    size = known.get("size") or config["vision_cfg"].get("image_size", 224)
    height, width = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if height != width:
        raise ConfigError(f"images of {height} x {width} are not supported; choose a model of square images")
    fits = {"shortest": "crop", "squash": "squash"}
    mode = known.get("resize_mode") or "shortest"
    if mode not in fits:
        raise ConfigError(f"resize_mode {mode!r} is not supported; choose a model with one of {', '.join(fits)}")
    r, g, b = known.get("mean") or OPENAI_MEAN
    s, t, u = known.get("std") or OPENAI_STD
    return Preprocess(
        size=int(height),
        mean=(r, g, b),
        std=(s, t, u),
        fit="pad" if is_openai else fits[mode],  # type: ignore[arg-type]
        interpolation="bilinear" if known.get("interpolation") == "bilinear" else "bicubic",
    )


def _common_preprocess(arch: str) -> dict[str, Any]:
    """Return the settings that all tags of an architecture share, for weights without a tag."""
    tags = [dict(get_pretrained_cfg(arch, tag)) for tag in list_pretrained_tags_by_model(arch)]
    keys = ("mean", "std", "interpolation", "resize_mode", "size")
    return {key: tags[0].get(key) for key in keys if tags and all(tag.get(key) == tags[0].get(key) for tag in tags)}


def _load_tokenizer(config: Mapping[str, Any]) -> Tokenizer | None:
    """Return the tokenizer of a configuration; None for CLIP's own."""
    text = config["text_cfg"]
    name, options = text.get("hf_tokenizer_name"), dict(text.get("tokenizer_kwargs") or {})
    length = text.get("context_length", _CONTEXT)
    if not name:
        return open_clip.SimpleTokenizer(context_length=length, **options) if options else None
    mode = text.get("tokenizer_mode")
    try:
        options["trust_remote_code"] = False
        tokenizer: Tokenizer = HFTokenizer(name, context_length=length, tokenizer_mode=mode, **options)
    except Exception as error:
        # The tokenizers library raises the plain base class for a damaged file.
        if type(error) is not Exception and not isinstance(error, LIBRARY_ERRORS):
            raise
        raise CheckpointError(
            f"cannot load the tokenizer {name} ({first_line(error)}); connect once, or give {WEIGHTS_OPTION} of a "
            "folder with its tokenizer files"
        ) from None
    return tokenizer


def _download(name: str, known: Mapping[str, Any]) -> Path:
    """Download a tag's weights, or find them in the library's cache."""
    try:
        return Path(download_pretrained(dict(known)))
    except (OSError, RuntimeError, HTTPException) as error:
        raise CheckpointError(
            f"the weights of {name!r} ({known.get('hf_hub') or known.get('url')}) are not in the cache and cannot be "
            f"downloaded ({first_line(error)}); connect once, or put {_FILES[0]} anywhere and give {WEIGHTS_OPTION}"
        ) from None


def _download_repository(repository: str) -> Path:
    """Download a model of OpenCLIP from the hub, or find it in the cache."""
    from union_igrot.models.hub import hub_errors  # noqa: PLC0415 - would import in a circle

    with hub_errors(repository):
        folder = Path(snapshot_download(repository, allow_patterns=["*.json", "*.txt", "*.model"]))
        for file in _FILES:
            with suppress(EntryNotFoundError):
                hf_hub_download(repository, file)
                break
    return folder


def _load_folder(name: str, folder: Path) -> OpenClipBackbone:
    arch, tag = _arch_and_tag(name)
    path = next((folder / file for file in _FILES if (folder / file).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} holds no weights; put one of {', '.join(_FILES)} there")
    try:
        saved = json.loads((folder / "open_clip_config.json").read_text())
        config, known = dict(saved["model_cfg"]), dict(saved.get("preprocess_cfg") or {})
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {folder / 'open_clip_config.json'} ({first_line(error)}); put OpenCLIP's file with "
            f"model_cfg there, or set model.weights to {path} itself"
        ) from None
    if arch in open_clip.list_models():
        _check_sizes(name, config, folder)
    config["quick_gelu"] = bool(config.get("quick_gelu"))
    # The names of OpenAI's models stand for the reference's preprocessing; other weights keep their own.
    preprocess = _tag_preprocess(config, known, is_openai=tag == "openai" and config["quick_gelu"])
    return restore_open_clip(name, config, preprocess, folder, read_state_dict(path), str(path))


def _check_sizes(name: str, config: Mapping[str, Any], folder: Path) -> None:
    """Raise CheckpointError if a folder's configuration has other sizes than a backbone's name stands for."""
    named = model_config(name)
    for key in ("embed_dim", "vision_cfg.image_size", "vision_cfg.width", "vision_cfg.layers", "text_cfg.width"):
        part, _, inner = key.rpartition(".")
        given, expected = ((values[part] if part else values).get(inner) for values in (config, named))
        if given != expected:
            raise CheckpointError(
                f"{folder} is not {name!r}: its {key} is {given}, not {expected}; use open_clip:ANY_OTHER_NAME"
            )


ImageTokens = Callable[[Float[Tensor, "batch 3 height width"]], Float[Tensor, "batch length dim"]]
"""Images to their tokens in the joint space, the pooled embedding first."""
TextFeatures = Callable[[Int[Tensor, "batch length"]], Features]
"""Token ids to features in the joint space."""


class UnsupportedTowerError(Exception):
    """A tower whose tokens cannot be brought into the joint space."""


def image_tower(visual: Any) -> ImageTokens:
    """Return how an image tower's tokens reach the joint space.

    Args:
        visual: OpenCLIP's `VisionTransformer`, `ModifiedResNet` or `TimmModel`.

    Raises:
        UnsupportedTowerError: If its head is of another kind.
    """
    if isinstance(visual, VisionTransformer):
        return _vision_transformer(visual)
    if isinstance(visual, ModifiedResNet):
        return _resnet(visual)
    if isinstance(visual, TimmModel):
        return _timm(visual)
    raise UnsupportedTowerError(f"has an image tower of {type(visual).__name__}")


def _vision_transformer(visual: Any) -> ImageTokens:
    if getattr(visual, "attn_pool_contrastive", None) is not None or visual.pool_type not in ("tok", "avg"):
        raise UnsupportedTowerError("pools its image tokens in a way that has no single embedding")

    def head(tokens: Tensor) -> Tensor:
        if visual.attn_pool is not None:
            tokens = _attention_of_one(visual.attn_pool, visual.attn_pool.ln_k(tokens))
        projected: Tensor = visual.ln_post(tokens) @ visual.proj
        return projected

    def encode(images: Tensor) -> Tensor:
        outputs = visual.forward_intermediates(images, indices=1, output_fmt="NLC", output_extra_tokens=True)
        patches, first = outputs["image_intermediates"][-1], outputs["image_intermediates_prefix"][-1]
        if visual.attn_pool is None and visual.pool_type == "tok":
            return head(torch.cat([first, patches], dim=1))
        # An average is one over patches; attention reads the class token, too.
        tokens = patches if visual.attn_pool is None else torch.cat([first, patches], dim=1)
        return torch.cat([outputs["image_features"][:, None], head(tokens)], dim=1)

    return encode


def _attention_of_one(pool: Any, tokens: Tensor) -> Tensor:
    """Return attention's output for one token: that token's value, whatever the query is."""
    attention, width = pool.attn, pool.attn.embed_dim
    weight = attention.in_proj_weight[2 * width :] if attention.v_proj_weight is None else attention.v_proj_weight
    output: Tensor = attention.out_proj(F.linear(tokens, weight, attention.in_proj_bias[2 * width :]))
    return output


def _resnet(visual: Any) -> ImageTokens:
    def encode(images: Tensor) -> Tensor:
        grid = visual.stem(images)
        for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            grid = layer(grid)
        pool = visual.attnpool
        # The pool's first position is that of the mean, its query.
        cells = grid.flatten(2).transpose(1, 2) + pool.positional_embedding[1:]
        tokens = pool.c_proj(pool.v_proj(cells))
        return torch.cat([pool(grid)[:, None], tokens], dim=1)

    return encode


def _timm(visual: Any) -> ImageTokens:
    trunk = visual.trunk
    positional = any(isinstance(module, AttentionPool2d | RotAttentionPool2d) for module in visual.modules())
    if positional or getattr(getattr(trunk, "attn_pool", None), "pos_embed", None) is not None:
        raise UnsupportedTowerError("pools its image tokens by an attention over positions, so not one by one")
    prefix = _unread_prefix(trunk)

    def head(features: Tensor) -> Tensor:
        output: Tensor = visual.head(trunk.forward_head(features))
        return output

    def encode(images: Tensor) -> Tensor:
        features = trunk.forward_features(images)
        if features.ndim == 4:
            if getattr(trunk, "output_fmt", "NCHW") == "NHWC":
                cells = features.flatten(1, 2)
                single = cells.flatten(0, 1)[:, None, None, :]
            else:
                cells = features.flatten(2).transpose(1, 2)
                single = cells.flatten(0, 1)[:, :, None, None]
        else:
            cells = features[:, prefix:]
            # A head that leaves out the prefix gets it as well, before the token.
            before = features[:, None, :prefix].expand(-1, cells.shape[1], -1, -1)
            single = torch.cat([before, cells[:, :, None]], dim=2).flatten(0, 1)
        tokens: Tensor = head(single).unflatten(0, cells.shape[:2])
        if getattr(trunk, "global_pool", "") == "token" and features.ndim == 3:
            return tokens
        return torch.cat([head(features)[:, None], tokens], dim=1)

    return encode


def _unread_prefix(trunk: Any) -> int:
    """Count the tokens at the front that a timm transformer's head does not read."""
    if getattr(trunk, "global_pool", "") == "token" or getattr(trunk, "pool_include_prefix", False):
        return 0
    if isinstance(trunk, Eva) and trunk.attn_pool is not None:
        return 0
    return int(getattr(trunk, "num_prefix_tokens", 0))


def text_tower(network: Any, end: int | None, padding: int, *, padding_is_end: bool) -> TextFeatures:
    """Return how a text tower's tokens reach the joint space.

    Args:
        network: OpenCLIP's `CLIP` or `CustomTextCLIP`.
        end: Id of the end mark; None for the largest id of each text.
        padding: Id of the padding.
        padding_is_end: Whether padding and end mark share an id, as in SigLIP.

    Raises:
        UnsupportedTowerError: If it pools in another way.
    """
    text = getattr(network, "text", network)
    pooled_at = _text_pooling(network, text)
    if isinstance(text, HFTextEncoder):
        padding = int(text.config.pad_token_id)
    encode = _text_encoder(network, text, pooled_at)

    def features(ids: Tensor) -> Features:
        pooled, tokens = encode(ids)
        if pooled_at == "end":
            at = ids.argmax(1) if end is None else (ids == end).int().argmax(1)
            mask = torch.arange(ids.shape[1], device=ids.device) <= at[:, None]
            return Features(tokens[torch.arange(len(ids), device=ids.device), at], tokens, mask, at)
        mask = before_padding(ids, padding, padding_is_end=padding_is_end)
        if pooled_at == "apart":
            tokens = torch.cat([pooled[:, None], tokens], dim=1)
            mask = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
        return first_pooled(tokens, mask)

    return features


def _text_pooling(network: Any, text: Any) -> str:
    """Return where the pooled embedding is read: at the `end` mark, the `first` token, or `apart` from the tokens."""
    if not isinstance(text, HFTextEncoder):
        pool = getattr(text, "pool_type", None) or getattr(network, "text_pool_type", None)
        if getattr(text, "cls_emb", None) is not None or pool == "last":
            return "apart"
        if pool in ("argmax", "eos"):
            return "end"
        if pool == "first":
            return "first"
        raise UnsupportedTowerError(f"pools its texts by {pool!r}, which has no single embedding")
    pooler = type(text.pooler).__name__
    if pooler == "MeanPooler":
        return "apart"
    if pooler in _FIRST_POOLERS and getattr(text.transformer, "pooler", None) is None:
        return "first"
    raise UnsupportedTowerError(f"pools its texts by {pooler} of {type(text.transformer).__name__}")


def _text_encoder(network: Any, text: Any, pooled_at: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return a function from token ids to the pooled embedding and all tokens, both in the joint space."""
    if not isinstance(text, HFTextEncoder):
        projection = text.text_projection

        def encode(ids: Tensor) -> tuple[Tensor, Tensor]:
            outputs = network.forward_intermediates(
                text=ids, text_indices=1, normalize=False, normalize_intermediates=True
            )
            tokens = outputs["text_intermediates"][-1]
            if projection is not None:
                tokens = projection(tokens) if isinstance(projection, nn.Linear) else tokens @ projection
            return outputs["text_features"], tokens

        return encode

    def encode_hf(ids: Tensor) -> tuple[Tensor, Tensor]:
        attended = (ids != text.config.pad_token_id).long()
        outputs = text.transformer(input_ids=ids, attention_mask=attended)
        tokens = text.proj(outputs.last_hidden_state)
        return (tokens[:, 0] if pooled_at == "first" else text.proj(text.pooler(outputs, attended))), tokens

    return encode_hf


def before_padding(
    ids: Int[Tensor, "batch length"], padding: int, *, padding_is_end: bool
) -> Bool[Tensor, "batch length"]:
    """Mark the words before the padding at the end, by position: its id may occur among the words, too."""
    words = ids != padding
    length = ids.shape[1] - words.flip(1).int().argmax(1)
    length = torch.where(words.any(1), length, torch.zeros_like(length)) + int(padding_is_end)
    mask: Tensor = torch.arange(ids.shape[1], device=ids.device) < length[:, None]
    return mask
