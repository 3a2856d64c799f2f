"""CLIP models through OpenCLIP: OpenAI's, OpenCLIP's own and those in a local folder.

Knows OpenCLIP's architectures, tags, words and files; how a tower's tokens reach the joint
space is in `towers`. Does not know heads, images' files or configurations.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path
from typing import Any, final

import open_clip
import torch
from jaxtyping import Float, Int
from open_clip.convert import convert_state_dict
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.tokenizer import HFTokenizer
from torch import Tensor, nn

from union_igrot.errors import CheckpointError, ConfigError, first_line
from union_igrot.models.backbones.base import Backbone
from union_igrot.models.backbones.towers import NotSupportedError, image_tower, text_tower
from union_igrot.models.backbones.weights import LIBRARY_ERRORS, WEIGHTS, load_strict, read_state_dict, summarize_names
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
_FILES = ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")
_SIZES = (
    *("input_resolution", "context_length", "vocab_size", "attn_mask", "visual.attn_mask"),
    "text.transformer.embeddings.position_ids",
)
_CONTEXT = 77


@final
class OpenClipBackbone(Backbone):
    """A frozen CLIP built by OpenCLIP from a configuration.

    Pooled embeddings are OpenCLIP's own. A token is what the tower's own head says of it
    alone. OpenAI's image tokens are the class token and all patches after the final norm,
    times the projection, `pooled` the class token's; text tokens likewise at every
    position, `pooled` read at the end mark, and the mask True up to and with it, by
    position: CLIP's padding shares its number 0 with "!", so numbers cannot tell. Where a
    head averages or attends (ResNets, SigLIP, CoCa, texts of Hugging Face), its answer is
    no token and stands in front of them.

    Args:
        config: An OpenCLIP configuration: `embed_dim`, `vision_cfg`, `text_cfg`, `quick_gelu`.
        preprocess: How an image becomes this model's input.
        name: What the model is called in configurations and saved models.
        state: Weights by OpenCLIP's names; drawn at random (torch's seed) where None.
        tokenizer: Texts to numbers, padded to the context; CLIP's byte pairs where None.
        where: What to call `state` in an error.

    Raises:
        ConfigError: Where the configuration is not one, or a tower has no head that could
            be asked of one token.
        CheckpointError: Where `state` does not fit.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        preprocess: Preprocess,
        name: str,
        state: Mapping[str, Tensor] | None = None,
        tokenizer: Tokenizer | None = None,
        where: str = "the state dict",
    ) -> None:
        super().__init__()
        self.network = _build(config, name)
        self.config = deepcopy(dict(config))
        self.name, self.dim, self.preprocess = name, int(config["embed_dim"]), preprocess
        text = config["text_cfg"]
        self.context: int = text.get("context_length", _CONTEXT)
        self.tokenize: Tokenizer = tokenizer or open_clip.SimpleTokenizer(context_length=self.context)
        words = getattr(self.tokenize, "tokenizer", None)  # that of transformers, where there is one
        padding = int(getattr(words, "pad_token_id", None) or 0)
        end = text.get("eos_id", 2) if text.get("pool_type") == "eos" else None
        try:
            self._see = image_tower(self.network.visual)
            same = words is not None and padding == words.eos_token_id
            self._read = text_tower(self.network, end, padding, padding_ends=same)
        except NotSupportedError as error:
            raise ConfigError(f"backbone {name!r} {error}; choose another architecture") from None
        if state is not None:
            load_strict(self.network, _own_names(self.network, state), where, f"{name!r} may be another architecture")
        self.freeze()

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> Features:
        """Encode preprocessed images."""
        tokens = self._see(images)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Features(tokens[:, 0], tokens, mask, torch.zeros(len(tokens), dtype=torch.long, device=tokens.device))

    def encode_text(self, texts: Sequence[str]) -> Features:
        """Encode texts; what is longer than the context is cut, its end mark kept."""
        return self._read(self.tokenize(list(texts)).to(self.device))

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

    `base` and `large` are OpenAI's ViT-B/32 and ViT-L/14. Weights of OpenAI come with
    QuickGELU and with the reference's preprocessing: an image longer than 1.25 to 1 is
    padded to that ratio, then resized and cut (TransAgg's TargetPad). All others keep the
    preprocessing that OpenCLIP notes for the tag.

    Args:
        name: `base`, `large`, `openclip_h` or `open_clip:<architecture>/<tag>`; the tag may
            be left out where `weights` is given.
        weights: None to download on first use (kept by huggingface_hub); else OpenAI's .pt, a
            state dict, a safetensors file, or a folder with `open_clip_config.json` and weights.

    Raises:
        ConfigError: Where the architecture or the tag is not known, or not supported.
        CheckpointError: Where the weights cannot be had, read or fitted.
    """
    arch, tag = parse_name(name)
    if weights is not None and Path(weights).is_dir():
        return _load_folder(name, tag, Path(weights))
    config = configuration(name)
    known = dict(get_pretrained_cfg(arch, tag)) if tag else {}
    if weights is None and not known:
        tags = summarize_names(list_pretrained_tags_by_model(arch))
        raise ConfigError(f"backbone {name!r}: {arch} has no tag {tag!r}; choose one of {tags} or give model.weights")
    path = Path(weights) if weights is not None else _download(name, known)
    preprocess = _preprocess(config, known or _agreed(arch), tag)
    return OpenClipBackbone(config, preprocess, name, read_state_dict(path), _tokens(config), str(path))


def restore_open_clip(name: str, config: Mapping[str, Any], preprocess: Preprocess, words: Path) -> OpenClipBackbone:
    """Build an OpenCLIP model from its configuration, with weights drawn at random.

    Args:
        name: What the model is called.
        config: Its configuration, as `architecture` gave it.
        preprocess: How an image becomes its input.
        words: A folder with what `save_tokenizer` wrote.

    Raises:
        ConfigError: Where the configuration is not one.
        CheckpointError: Where the words cannot be read.
    """
    return _in_folder(name, config, preprocess, words)


def _in_folder(
    name: str,
    config: Mapping[str, Any],
    preprocess: Preprocess,
    folder: Path,
    state: Mapping[str, Tensor] | None = None,
    where: str = "",
) -> OpenClipBackbone:
    """Build a model whose words, and whose text tower's configuration where it lies there, are in a folder."""
    placed = {**config, "text_cfg": dict(config["text_cfg"])}
    text = placed["text_cfg"]
    if text.get("hf_model_name") and (folder / "config.json").is_file():
        text["hf_model_name"] = str(folder)
    if text.get("hf_tokenizer_name"):
        text["hf_tokenizer_name"] = str(folder)
    backbone = OpenClipBackbone(placed, preprocess, name, state, _tokens(placed), where)
    backbone.config = deepcopy(dict(config))  # without the folder's place
    return backbone


def parse_name(name: str) -> tuple[str, str]:
    """Split a backbone's name into OpenCLIP's architecture and tag.

    Raises:
        ConfigError: Where the name is of another form, or the architecture is not known.
    """
    arch, tag = NAMES.get(name, ("", ""))
    if name.startswith("open_clip:"):
        arch, _, tag = name.removeprefix("open_clip:").partition("/")
    if not arch:
        raise ConfigError(f"backbone {name!r} is not OpenCLIP's; write open_clip:<architecture>/<tag>")
    if arch not in open_clip.list_models():
        near = get_close_matches(arch, open_clip.list_models(), n=3, cutoff=0.0)
        raise ConfigError(
            f"backbone {name!r}: OpenCLIP has no architecture {arch!r}; nearest are {', '.join(near)} "
            "(all: open_clip.list_models())"
        )
    return arch, tag


def configuration(name: str) -> dict[str, Any]:
    """Return a copy of the OpenCLIP configuration behind a name, QuickGELU set as its tag needs.

    Raises:
        ConfigError: As `parse_name`.
    """
    arch, tag = parse_name(name)
    config: dict[str, Any] = deepcopy(open_clip.get_model_config(arch))
    known = get_pretrained_cfg(arch, tag) if tag else {}
    config["quick_gelu"] = bool(config.get("quick_gelu") or known.get("quick_gelu") or tag == "openai")
    return config


def _build(config: Mapping[str, Any], name: str) -> Any:
    """Build the network of a configuration with random weights."""
    vision, text = config.get("vision_cfg"), config.get("text_cfg")
    if not isinstance(vision, Mapping) or not isinstance(text, Mapping) or "embed_dim" not in config:
        raise ConfigError(f"backbone {name!r} has no embed_dim, vision_cfg or text_cfg; give an OpenCLIP configuration")
    options = {key: deepcopy(value) for key, value in config.items() if key not in ("custom_text", "multimodal_cfg")}
    # What OpenCLIP would fetch or give beside an embedding is not asked for; CoCa's decoder is left out.
    options["vision_cfg"] = {**options["vision_cfg"], "timm_model_pretrained": False, "output_tokens": False}
    options["text_cfg"] = {**options["text_cfg"], "hf_model_pretrained": False, "output_tokens": False}
    apart = config.get("custom_text") or config.get("multimodal_cfg") or text.get("hf_model_name")
    try:
        return (open_clip.CustomTextCLIP if apart else open_clip.CLIP)(**options)
    except (OSError, HTTPException) as error:
        raise CheckpointError(
            f"backbone {name!r}: the configuration of its text tower {text.get('hf_model_name')} cannot be had "
            f"({first_line(error)}); connect once, or give {WEIGHTS} of a folder with its config.json"
        ) from None
    except LIBRARY_ERRORS as error:
        raise ConfigError(f"backbone {name!r} is not a CLIP configuration: {first_line(error)}") from None


def _own_names(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring older layouts to the network's: sizes dropped, the text tower's prefix, scalars' shape."""
    named = {name: x for name, x in state.items() if name not in _SIZES and not name.startswith("text_decoder.")}
    named = convert_state_dict(network, named)  # Apple's own names
    own = network.state_dict()
    if "text.positional_embedding" in own and "positional_embedding" in named:
        named = {(name if name.startswith(("visual.", "logit_")) else f"text.{name}"): x for name, x in named.items()}
    for name in ("logit_scale", "logit_bias"):
        if name in named and name in own and named[name].numel() == 1:
            named[name] = named[name].reshape(own[name].shape)
    # Counts of batches, which older files lack and frozen statistics do not read.
    return {name: x for name, x in own.items() if name.endswith(".num_batches_tracked")} | named


def _preprocess(config: Mapping[str, Any], known: Mapping[str, Any], tag: str) -> Preprocess:
    """Turn OpenCLIP's notes on a tag into a value."""
    size = known.get("size") or config["vision_cfg"].get("image_size", 224)
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if sides[0] != sides[1]:
        raise ConfigError(f"images of {sides[0]} x {sides[1]} are not supported; choose a model of square images")
    fits = {"shortest": "crop", "squash": "squash"}
    mode = known.get("resize_mode") or "shortest"
    if mode not in fits:
        raise ConfigError(f"resize_mode {mode!r} is not supported; choose a model with one of {', '.join(fits)}")
    r, g, b = known.get("mean") or OPENAI_MEAN
    s, t, u = known.get("std") or OPENAI_STD
    return Preprocess(
        size=int(sides[0]),
        mean=(r, g, b),
        std=(s, t, u),
        fit="pad" if tag == "openai" else fits[mode],  # type: ignore[arg-type]
        interpolation="bilinear" if known.get("interpolation") == "bilinear" else "bicubic",
    )


def _agreed(arch: str) -> dict[str, Any]:
    """Return the preprocessing that all tags of an architecture agree on, for weights without a tag."""
    tags = [dict(get_pretrained_cfg(arch, tag)) for tag in list_pretrained_tags_by_model(arch)]
    keys = ("mean", "std", "interpolation", "resize_mode", "size")
    return {key: tags[0].get(key) for key in keys if tags and all(tag.get(key) == tags[0].get(key) for tag in tags)}


def _tokens(config: Mapping[str, Any]) -> Tokenizer | None:
    """Return the tokenizer a configuration asks for; None for CLIP's own."""
    text = config["text_cfg"]
    source, options = text.get("hf_tokenizer_name"), dict(text.get("tokenizer_kwargs") or {})
    length = text.get("context_length", _CONTEXT)
    if not source:
        return open_clip.SimpleTokenizer(context_length=length, **options) if options else None
    try:
        found: Tokenizer = HFTokenizer(
            source, context_length=length, tokenizer_mode=text.get("tokenizer_mode"), **options
        )
    except Exception as error:
        # The tokenizers library raises the plain base class where a file is damaged.
        if type(error) is not Exception and not isinstance(error, LIBRARY_ERRORS):
            raise
        raise CheckpointError(
            f"the tokenizer {source} cannot be had ({first_line(error)}); connect once, "
            f"or give {WEIGHTS} of a folder with its tokenizer files"
        ) from None
    return found


def _download(name: str, known: Mapping[str, Any]) -> Path:
    """Let the library fetch a tag's weights, or find them where it keeps them."""
    wanted = known.get("hf_hub") or known.get("url")
    try:
        return Path(download_pretrained(dict(known)))
    except (OSError, RuntimeError, HTTPException) as error:
        raise CheckpointError(
            f"the weights of {name!r} ({wanted}) are not on this machine and cannot be fetched "
            f"({first_line(error)}); connect once, or put {_FILES[0]} anywhere and give {WEIGHTS}"
        ) from None


def _load_folder(name: str, tag: str, folder: Path) -> OpenClipBackbone:
    path = next((folder / file for file in _FILES if (folder / file).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} holds no weights; put one of {', '.join(_FILES)} there")
    try:
        notes = json.loads((folder / "open_clip_config.json").read_text())
        config, known = dict(notes["model_cfg"]), dict(notes.get("preprocess_cfg") or {})
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / 'open_clip_config.json'} cannot be read ({first_line(error)}); put OpenCLIP's file with "
            f"model_cfg there, or set model.weights to {path} itself"
        ) from None
    config["quick_gelu"] = bool(config.get("quick_gelu") or tag == "openai")
    return _in_folder(name, config, _preprocess(config, known, tag), folder, read_state_dict(path), str(path))
