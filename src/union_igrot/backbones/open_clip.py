"""CLIP models through OpenCLIP: OpenAI's, OpenCLIP's own and those in a local folder.

Knows OpenCLIP's architectures, tags and files. All tokens are projected into the joint
space as the reference does: images by the final norm and the projection, texts by the
final norm and the text projection, at every position. Does not know heads, pictures' files
or configurations.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any, final

import open_clip
import torch
from jaxtyping import Float, Int
from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn

from union_igrot.backbones.base import Backbone
from union_igrot.backbones.weights import fill, first_line, name_some, read_state
from union_igrot.errors import CheckpointError, ConfigError
from union_igrot.types import Features, Preprocess

Tokenizer = Callable[[list[str]], Int[Tensor, "batch length"]]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
NAMES = {
    "base": ("ViT-B-32", "openai"),
    "large": ("ViT-L-14", "openai"),
    "openclip_h": ("ViT-H-14", "laion2b_s32b_b79k"),
}
"""Short names: architecture and tag."""
_FILES = ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")
_SIZES = ("input_resolution", "context_length", "vocab_size", "attn_mask", "visual.attn_mask")


@final
class OpenClipBackbone(Backbone):
    """A frozen CLIP built by OpenCLIP from a configuration.

    Image tokens: the class token and all patches after the final norm, times the
    projection; `pooled` is the class token's. Where a model averages its patches instead,
    the average stands in front of the tokens. Text tokens: every position of the context
    (77 in CLIP) after the final norm, times the text projection; `pooled` is read at the
    end mark. The mask is True up to and with the end mark, by position: CLIP's padding
    shares its number 0 with "!", so numbers cannot tell.

    Args:
        config: An OpenCLIP configuration: `embed_dim`, `vision_cfg`, `text_cfg`, `quick_gelu`.
        preprocess: How a picture becomes this model's input.
        name: What the model is called in configurations and saved models.
        state: Weights by OpenCLIP's names; drawn at random (torch's seed) where None.
        tokenizer: Texts to numbers, padded to the context; CLIP's byte pairs where None.
        where: What to call `state` in an error.

    Raises:
        ConfigError: Where the configuration is not one, or its towers are not transformers
            with a projection (ResNets, timm and Hugging Face towers, attentional pooling).
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
        self.name, self.dim, self.preprocess = name, int(config["embed_dim"]), preprocess
        self._text: Any = getattr(self.network, "text", self.network)
        self.context: int = self.network.context_length
        self.tokenize: Tokenizer = tokenizer or open_clip.SimpleTokenizer(context_length=self.context)
        text = config["text_cfg"]
        self._end: int | None = text.get("eos_id", 2) if text.get("pool_type") == "eos" else None
        if state is not None:
            fill(self.network, _own_names(self.network, state), where, f"{name!r} may be another architecture")
        self.freeze()

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> Features:
        """Encode preprocessed pictures."""
        visual = self.network.visual
        seen = self.network.forward_intermediates(
            image=images,
            image_indices=1,
            normalize=False,
            normalize_intermediates=True,
            image_output_fmt="NLC",
            image_output_extra_tokens=True,
        )
        last = torch.cat([seen["image_intermediates_prefix"][-1], seen["image_intermediates"][-1]], dim=1)
        tokens = last @ visual.proj
        if visual.pool_type != "tok":
            tokens = torch.cat([seen["image_features"][:, None], tokens], dim=1)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Features(tokens[:, 0], tokens, mask, torch.zeros(len(tokens), dtype=torch.long, device=tokens.device))

    def encode_text(self, texts: Sequence[str]) -> Features:
        """Encode texts; what is longer than the context is cut, its end mark kept."""
        ids = self.tokenize(list(texts)).to(self.device)
        said = self.network.forward_intermediates(
            text=ids, text_indices=1, normalize=False, normalize_intermediates=True, intermediates_only=True
        )
        tokens, projection = said["text_intermediates"][-1], self._text.text_projection
        if projection is not None:
            tokens = projection(tokens) if isinstance(projection, nn.Linear) else tokens @ projection
        # The first of the largest numbers is the end mark: OpenAI's rule.
        end = ids.argmax(1) if self._end is None else (ids == self._end).int().argmax(1)
        mask = torch.arange(ids.shape[1], device=ids.device) <= end[:, None]
        return Features(tokens[torch.arange(len(ids), device=ids.device), end], tokens, mask, end)


def load_open_clip(name: str, weights: str | Path | None = None) -> OpenClipBackbone:
    """Build an OpenCLIP model with its trained weights.

    `base` and `large` are OpenAI's ViT-B/32 and ViT-L/14. Weights of OpenAI come with
    QuickGELU and with the reference's preprocessing: a picture longer than 1.25 to 1 is
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
        tags = name_some(list_pretrained_tags_by_model(arch))
        raise ConfigError(f"backbone {name!r}: {arch} has no tag {tag!r}; choose one of {tags} or give model.weights")
    path = Path(weights) if weights is not None else _download(name, known)
    return OpenClipBackbone(
        config, _preprocess(config, known, tag), name, read_state(path), _tokens(arch, config), str(path)
    )


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
    """Give a copy of the OpenCLIP configuration behind a name, QuickGELU set as its tag needs.

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
    options = {key: deepcopy(value) for key, value in config.items() if key not in ("custom_text", "multimodal_cfg")}
    problem = _unsupported(config)
    if problem:
        raise ConfigError(f"backbone {name!r} {problem}; choose a CLIP whose towers are OpenCLIP's own transformers")
    try:
        network = (open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP)(**options)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"backbone {name!r} is not a CLIP configuration: {first_line(error)}") from None
    text = getattr(network, "text", network)
    pool = getattr(text, "pool_type", None) or getattr(network, "text_pool_type", None)
    if not isinstance(network.visual, VisionTransformer) or pool not in ("argmax", "eos"):
        raise ConfigError(f"backbone {name!r} pools its texts by {pool!r}; only an end mark's token is supported")
    if network is not text and not isinstance(text, TextTransformer):
        raise ConfigError(f"backbone {name!r} has a text tower of {type(text).__name__}, which is not supported")
    return network


def _unsupported(config: Mapping[str, Any]) -> str:
    vision, text = config.get("vision_cfg"), config.get("text_cfg")
    if not isinstance(vision, Mapping) or not isinstance(text, Mapping) or "embed_dim" not in config:
        return "has no embed_dim, vision_cfg or text_cfg"
    if config.get("multimodal_cfg") or vision.get("attentional_pool") or text.get("embed_cls"):
        return "pools by attention (CoCa), so that its tokens are not in the joint space"
    if vision.get("timm_model_name") or isinstance(vision.get("layers"), list | tuple):
        return "has an image tower of timm or a ResNet, whose tokens are not projected"
    return "has a text tower of Hugging Face" if text.get("hf_model_name") else ""


def _own_names(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring older layouts to the network's: sizes dropped, the text tower's prefix, scalars' shape."""
    named = {name: x for name, x in state.items() if name not in _SIZES}
    own = network.state_dict()
    if "text.positional_embedding" in own and "positional_embedding" in named:
        named = {(name if name.startswith(("visual.", "logit_")) else f"text.{name}"): x for name, x in named.items()}
    for name in ("logit_scale", "logit_bias"):
        if name in named and name in own and named[name].numel() == 1:
            named[name] = named[name].reshape(own[name].shape)
    return named


def _preprocess(config: Mapping[str, Any], known: Mapping[str, Any], tag: str) -> Preprocess:
    """Turn OpenCLIP's notes on a tag into a value."""
    size = known.get("size") or config["vision_cfg"].get("image_size", 224)
    sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if sides[0] != sides[1]:
        raise ConfigError(f"pictures of {sides[0]} x {sides[1]} are not supported; choose a model of square pictures")
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


def _tokens(source: str, config: Mapping[str, Any]) -> Tokenizer | None:
    """Give the tokenizer a configuration asks for; None for CLIP's own."""
    text = config["text_cfg"]
    if not text.get("hf_tokenizer_name") and not text.get("tokenizer_kwargs"):
        return None
    try:
        found: Tokenizer = open_clip.get_tokenizer(source)
    except Exception as error:  # whatever a hub, a network or a file may say
        raise CheckpointError(
            f"the tokenizer {text.get('hf_tokenizer_name')} cannot be had ({first_line(error)}); connect once, "
            "or give model.weights=FOLDER with its tokenizer files"
        ) from None
    return found


def _download(name: str, known: Mapping[str, Any]) -> Path:
    """Let the library fetch a tag's weights, or find them where it keeps them."""
    wanted = known.get("hf_hub") or known.get("url")
    try:
        return Path(download_pretrained(dict(known)))
    except Exception as error:  # whatever a hub or a network may say
        raise CheckpointError(
            f"the weights of {name!r} ({wanted}) are not on this machine and cannot be fetched "
            f"({first_line(error)}); connect once, or put {_FILES[0]} anywhere and set model.weights=PATH to it"
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
    tokenizer = _tokens(f"local-dir:{folder}", config)
    return OpenClipBackbone(config, _preprocess(config, known, tag), name, read_state(path), tokenizer, str(path))
