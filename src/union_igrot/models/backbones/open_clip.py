"""CLIP models through OpenCLIP: OpenAI's, OpenCLIP's own, those of the hub and those in a local folder."""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields, replace
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, final

import open_clip
from jaxtyping import Float, Int
from open_clip.convert import convert_state_dict
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn

from union_igrot.errors import CheckpointError, ConfigError, first_line
from union_igrot.models.backbones.base import (
    PROBE_TEXTS,
    Backbone,
    first_pooled,
    json_hash,
    vocabulary_hash,
)
from union_igrot.models.backbones.hf import reading_files, tower_settings
from union_igrot.models.backbones.towers import UnsupportedTowerError, image_tower, text_tower
from union_igrot.models.backbones.weights import (
    LIBRARY_ERRORS,
    WEIGHTS_OPTION,
    load_strict,
    read_state_dict,
    remove_prefixes,
    summarize_names,
)
from union_igrot.models.hub import fetch_files
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
_TOKENIZERS = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_SIZES = (
    *("input_resolution", "context_length", "vocab_size", "attn_mask", "visual.attn_mask"),
    "text.transformer.embeddings.position_ids",
)
_WITHOUT_EFFECT = (
    *("timm_model_pretrained", "hf_model_pretrained", "output_tokens"),
    *("hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs"),  # its words and settings count
)
_CONTEXT = 77


@final
class OpenClipBackbone(Backbone):
    """A frozen CLIP built by OpenCLIP from a configuration.

    Pooled embeddings are OpenCLIP's own. OpenAI's image tokens are the class token and all patches after the final
    norm, times the projection, `pooled` the class token's; text tokens likewise at every position, `pooled` read at the
    end mark, and the mask True up to and including it, by position: CLIP pads with 0, which is also the id of "!". See
    `towers` for other architectures.

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
        padding = int(getattr(hf_tokenizer, "pad_token_id", None) or 0)
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

    def text_inputs(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Return token ids; longer texts are cut to the context, their end mark kept."""
        return (self.tokenize(list(texts)).to(self.device),)

    def text_features(self, *inputs: Tensor) -> Features:
        """See `Backbone`."""
        return self._text_features(*inputs)

    def token_count(self, text: str) -> int:
        """See `Backbone`; 0 if the tokenizer is a plain function."""
        if isinstance(self.tokenize, HFTokenizer):
            return len(self.tokenize.tokenizer(self.tokenize.clean_fn(text), verbose=False)["input_ids"])
        encode = getattr(self.tokenize, "encode", None)  # CLIP's byte pairs, without the two marks
        return 0 if encode is None else len(encode(text)) + 2

    def architecture(self) -> dict[str, Any]:
        """Return the network's configuration."""
        return {"kind": "open_clip", "config": self.config}

    def settings(self) -> dict[str, Any]:
        """Return what differs from OpenCLIP's defaults, and the tokenizer's words and ids of a few texts."""
        words = getattr(self.tokenize, "tokenizer", None)
        vocabulary = getattr(self.tokenize, "encoder", {}) if words is None else words.get_vocab()
        found = {
            "kind": "open_clip",
            "quick_gelu": bool(self.config.get("quick_gelu")),
            "image": _changed_settings(self.config["vision_cfg"], open_clip.CLIPVisionCfg),
            "text": _changed_settings(self.config["text_cfg"], open_clip.CLIPTextCfg),
            "tokens": json_hash(self.tokenize(list(PROBE_TEXTS)).tolist()),
            "vocabulary": vocabulary_hash(vocabulary),
        }
        if self.config["text_cfg"].get("hf_model_name"):
            found["text_tower"] = tower_settings(self.network.text.config)
        return found

    def save_tokenizer(self, folder: Path) -> None:
        """Write the files of a tokenizer and a text tower of transformers; CLIP's byte pairs are part of OpenCLIP."""
        if isinstance(self.tokenize, HFTokenizer):
            self.tokenize.save_pretrained(folder)
        if self.config["text_cfg"].get("hf_model_name"):
            self.network.text.config.save_pretrained(folder)


def _changed_settings(given: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Return the settings of a tower that change its features and are not the defaults, by name."""
    defaults = {field.name: field.default for field in fields(kind)}
    return {name: x for name, x in given.items() if name not in _WITHOUT_EFFECT and x != defaults.get(name)}


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
        weights = fetch_files(name.removeprefix("hf-hub:"), [("open_clip_config.json",), _FILES]).parent
    if weights is not None and Path(weights).is_dir():
        return _load_folder(name, Path(weights))
    arch, tag = parse_name(name)
    config = model_config(name)
    known = dict(get_pretrained_cfg(arch, tag)) if tag else {}
    if weights is None and not known:
        tags = summarize_names(list_pretrained_tags_by_model(arch))
        raise ConfigError(f"backbone {name!r}: {arch} has no tag {tag!r}; choose one of {tags} or give model.weights")
    path = Path(weights) if weights is not None else _download(known["hf_hub"])
    state = read_state_dict(path)
    is_openai = tag == "openai" or "input_resolution" in state
    config["quick_gelu"] |= is_openai
    preprocess = _tag_preprocess(config, known or _common_preprocess(arch))
    local = _local_config(config)
    backbone = OpenClipBackbone(local, preprocess, name, state, _load_tokenizer(name, local), str(path))
    backbone.config = config  # without the paths of this machine
    return _padded(backbone) if is_openai else backbone


def _padded(backbone: OpenClipBackbone) -> OpenClipBackbone:
    """Set the preprocessing of a backbone to that of the published code."""
    backbone.model_preprocess = backbone.preprocess
    backbone.preprocess = replace(backbone.preprocess, fit="pad")
    return backbone


def _local_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration whose tokenizer and text tower of the hub are folders of its cache."""
    text = dict(config["text_cfg"])
    needed = {"hf_model_name": ("config.json",), "hf_tokenizer_name": _TOKENIZERS}
    for key, files in needed.items():
        if text.get(key) and not Path(text[key]).is_dir():
            text[key] = str(fetch_files(text[key], [files], texts=files is _TOKENIZERS).parent)
    return {**config, "text_cfg": text}


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
    if text.get("hf_tokenizer_name") and any((folder / file).is_file() for file in _TOKENIZERS):
        text["hf_tokenizer_name"] = str(folder)
    local = _local_config(local)
    backbone = OpenClipBackbone(local, preprocess, name, state, _load_tokenizer(name, local), source)
    backbone.config = deepcopy(dict(config))  # without the folder's path
    return backbone


def parse_name(name: str, *, known: bool = True) -> tuple[str, str]:
    """Split a backbone's name into OpenCLIP's architecture and tag.

    Raises:
        ConfigError: If the name has another form, or the architecture is unknown and `known` is set.
    """
    arch, tag = NAMES.get(name, ("", ""))
    if name.startswith("open_clip:"):
        arch, _, tag = name.removeprefix("open_clip:").partition("/")
    if name.startswith("hf-hub:"):
        arch = name
    if not arch:
        raise ConfigError(f"backbone {name!r} is not OpenCLIP's; use open_clip:<architecture>/<tag>")
    if known and arch not in open_clip.list_models():
        near = get_close_matches(arch, open_clip.list_models(), n=3, cutoff=0.0)
        raise ConfigError(
            f"backbone {name!r}: OpenCLIP has no architecture {arch!r}; the nearest are {', '.join(near)} "
            "(all: open_clip.list_models())"
        )
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
        raise CheckpointError(f"{source} is a model of transformers; use the backbone hf:<any name> with its folder")
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


def _tag_preprocess(config: Mapping[str, Any], known: Mapping[str, Any]) -> Preprocess:
    """Return the preprocessing from OpenCLIP's settings of a tag."""
    size = known.get("size") or config["vision_cfg"].get("image_size", 224)
    height, width = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if height != width:
        raise ConfigError(f"images of {height} x {width} are not supported; choose a model of square images")
    fits: dict[str, Literal["crop", "squash"]] = {"shortest": "crop", "squash": "squash"}
    mode = known.get("resize_mode") or "shortest"
    if mode not in fits:
        raise ConfigError(f"resize_mode {mode!r} is not supported; choose a model with one of {', '.join(fits)}")
    r, g, b = known.get("mean") or OPENAI_MEAN
    s, t, u = known.get("std") or OPENAI_STD
    return Preprocess(
        size=int(height),
        mean=(r, g, b),
        std=(s, t, u),
        fit=fits[mode],
        interpolation="bilinear" if known.get("interpolation") == "bilinear" else "bicubic",
    )


def _common_preprocess(arch: str) -> dict[str, Any]:
    """Return the settings that all tags of an architecture share, for weights without a tag."""
    tags = [dict(get_pretrained_cfg(arch, tag)) for tag in list_pretrained_tags_by_model(arch)]
    keys = ("mean", "std", "interpolation", "resize_mode", "size")
    return {key: tags[0].get(key) for key in keys if tags and all(tag.get(key) == tags[0].get(key) for tag in tags)}


def _load_tokenizer(name: str, config: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer of a configuration."""
    text = config["text_cfg"]
    folder, options = text.get("hf_tokenizer_name"), dict(text.get("tokenizer_kwargs") or {})
    options["context_length"] = text.get("context_length", _CONTEXT)
    tokenizer: Tokenizer
    if not folder:
        tokenizer = open_clip.SimpleTokenizer(**options)
        return tokenizer
    options |= {"tokenizer_mode": text.get("tokenizer_mode"), "trust_remote_code": False, "local_files_only": True}
    with reading_files(name, Path(folder), "tokenizer files"):
        tokenizer = HFTokenizer(folder, **options)
    return tokenizer


def _download(source: str) -> Path:
    """Download the weights of a tag, or find them in the cache; without a file, `owner/name/` means the usual ones."""
    repository, _, file = source.rpartition("/")
    files = (f"{Path(file).stem}.safetensors", file) if file else _FILES[:2]
    return fetch_files(repository, [files], texts=False)


def _load_folder(name: str, folder: Path) -> OpenClipBackbone:
    arch, tag = parse_name(name, known=False)
    path = next((folder / file for file in _FILES if (folder / file).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} holds no weights; put one of {', '.join(_FILES)} there")
    try:
        saved = json.loads((folder / "open_clip_config.json").read_text())
        config, known = dict(saved["model_cfg"]), dict(saved.get("preprocess_cfg") or {})
    except (OSError, KeyError, TypeError, ValueError) as error:
        if (folder / "config.json").is_file() and not (folder / "open_clip_config.json").exists():
            raise CheckpointError(
                f"{folder} is a model of transformers; use the backbone hf:<any name> with it"
            ) from None
        raise CheckpointError(
            f"cannot read {folder / 'open_clip_config.json'} ({first_line(error)}); put OpenCLIP's file with "
            f"model_cfg there, or set model.weights to {path} itself"
        ) from None
    if arch in open_clip.list_models():
        _check_sizes(name, config, folder)
    config["quick_gelu"] = bool(config.get("quick_gelu"))
    preprocess = _tag_preprocess(config, known)
    backbone = restore_open_clip(name, config, preprocess, folder, read_state_dict(path), str(path))
    # The names of OpenAI's models stand for the reference's preprocessing; other weights keep their own.
    return _padded(backbone) if tag == "openai" and config["quick_gelu"] else backbone


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
