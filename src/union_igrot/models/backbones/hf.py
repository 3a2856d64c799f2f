"""BLIP, SigLIP (1 and 2) and CLIP through transformers, from the hub or a local folder.

A model's class is imported when it is used. Code in a repository is never run.
"""

import json
import string
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from union_igrot.errors import CheckpointError, ConfigError, first_line
from union_igrot.models.backbones.base import (
    PROBE_TEXTS,
    Backbone,
    attention_of_one,
    first_pooled,
    json_hash,
    vocabulary_hash,
)
from union_igrot.models.backbones.weights import (
    LIBRARY_ERRORS,
    check_content,
    read_state_dict,
    replace_advice,
    summarize_names,
)
from union_igrot.models.hub import fetch_files
from union_igrot.types import Features, Preprocess

NAMES = {
    "blip": "Salesforce/blip-itm-base-coco",
    "siglip2": "google/siglip2-base-patch16-224",
    "tinyclip": "wkcn/TinyCLIP-ViT-8M-16-Text-3M-YFCC15M",
}
"""Short names of repositories on the Hugging Face hub."""
BLIP_CONTEXT = 35
"""Text positions of BLIP's retrieval models, padding included (Li et al., and the reference)."""
_WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_NEEDED = (
    ("config.json",),
    ("preprocessor_config.json", "processor_config.json"),
    ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model"),
    _WEIGHTS,
)
_TOWER_SETTINGS = (
    *("hidden_act", "layer_norm_eps", "num_attention_heads", "max_position_embeddings"),
    *("image_size", "patch_size", "position_embedding_type"),
)
_BILINEAR, _BICUBIC = 2, 3
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def canonicalize(text: str) -> str:
    """Return a text in lower case, without punctuation and repeated spaces, as SigLIP was trained."""
    return " ".join(text.replace("_", " ").translate(_WITHOUT_PUNCTUATION).lower().split())


class _TransformersBackbone(Backbone):
    """A model of transformers.

    Args:
        network: The model.
        tokenizer: Its tokenizer.
        preprocess: How an image becomes its input.
        name: Name of the backbone in configurations and saved models.
        dim: Width of the joint space.

    Attributes:
        kind: Name of the architecture in configurations of transformers.
        network_class: Name of its class in transformers.
        clean: What is done to a text before it is tokenized.
    """

    kind: str
    network_class: str
    clean: Callable[[str], str] = str

    def __init__(self, network: Any, tokenizer: Any, preprocess: Preprocess, name: str, dim: int) -> None:
        super().__init__()
        self.network, self.tokenizer, self.preprocess, self.name, self.dim = network, tokenizer, preprocess, name, dim
        self.context: int = network.config.text_config.max_position_embeddings
        self.freeze()

    def architecture(self) -> dict[str, Any]:
        """Return the network's configuration."""
        return {"kind": self.kind, "config": json.loads(self.network.config.to_json_string(use_diff=False))}

    def settings(self) -> dict[str, Any]:
        """Return the settings of both towers, and the tokenizer's words and ids of a few texts."""
        ids, mask = self._tokenize(PROBE_TEXTS)
        return {
            "kind": self.kind,
            "image": tower_settings(self.network.config.vision_config),
            "text": tower_settings(self.network.config.text_config),
            "tokens": json_hash([ids.tolist(), mask.tolist()]),
            "vocabulary": vocabulary_hash(self.tokenizer.get_vocab()),
        }

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)

    def _tokenize(self, texts: Sequence[str]) -> tuple[Int[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
        """Return token ids padded or cut to the context, and a mask of the tokens."""
        encoded = self.tokenizer(
            [self.clean(text) for text in texts],
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.context,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return encoded["input_ids"].to(self.device), encoded["attention_mask"].bool().to(self.device)

    def text_inputs(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Return token ids, and a mask of the tokens."""
        return self._tokenize(texts)

    def token_count(self, text: str) -> int:
        """See `Backbone`."""
        return len(self.tokenizer(self.clean(text), verbose=False)["input_ids"])


@final
class BlipBackbone(_TransformersBackbone):
    """BLIP's two towers for retrieval, frozen, without cross-attention and matching head.

    All image tokens pass `vision_proj`, all 35 text positions `text_proj`; `pooled` is the first of each. Source: the
    reference's `blip_retrieval.py`, `return_local=True`.

    Args:
        network: A `BlipForImageTextRetrieval`; its unused modules are removed.
        tokenizer: BERT's tokenizer.
        preprocess: How an image becomes this model's input.
        name: Name of the backbone in configurations and saved models.
    """

    kind, network_class = "blip", "BlipForImageTextRetrieval"

    def __init__(self, network: Any, tokenizer: Any, preprocess: Preprocess, name: str) -> None:
        del network.itm_head
        for layer in network.text_encoder.encoder.layer:
            if hasattr(layer, "crossattention"):
                del layer.crossattention
        super().__init__(network, tokenizer, preprocess, name, network.vision_proj.out_features)
        self.context = min(BLIP_CONTEXT, self.context)

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> Features:
        """Encode preprocessed images."""
        hidden = self.network.vision_model(pixel_values=images).last_hidden_state
        return first_pooled(self.network.vision_proj(hidden))

    def text_features(self, *inputs: Tensor) -> Features:
        """See `Backbone`."""
        ids, mask = inputs
        hidden = self.network.text_encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return first_pooled(self.network.text_proj(hidden), mask)


@final
class SiglipBackbone(_TransformersBackbone):
    """SigLIP or SigLIP 2 of a fixed image size, frozen.

    Its pooled embeddings are not tokens, so they are put in front of the tokens on both sides. An image's comes from an
    attention head; a token passes that head as if the head read it alone, which brings it into the joint space. A
    text's is the last of all positions, padding or not, through a linear head that every position then passes.

    Texts are in lower case and without punctuation, as in training and in OpenCLIP.

    Args:
        network: A `SiglipModel`.
        tokenizer: The model's tokenizer.
        preprocess: How an image becomes this model's input.
        name: Name of the backbone in configurations and saved models.
    """

    kind, network_class = "siglip", "SiglipModel"
    clean = staticmethod(canonicalize)

    def __init__(self, network: Any, tokenizer: Any, preprocess: Preprocess, name: str) -> None:
        super().__init__(network, tokenizer, preprocess, name, network.config.vision_config.hidden_size)

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> Features:
        """Encode preprocessed images."""
        outputs = self.network.vision_model(pixel_values=images)
        head = self.network.vision_model.head
        tokens = attention_of_one(head.attention, outputs.last_hidden_state)
        tokens = tokens + head.mlp(head.layernorm(tokens))
        return first_pooled(torch.cat([outputs.pooler_output[:, None], tokens], dim=1))

    def text_features(self, *inputs: Tensor) -> Features:
        """See `Backbone`."""
        ids, mask = inputs
        # Without an attention mask: the model was trained with its padding.
        outputs = self.network.text_model(input_ids=ids)
        tokens = self.network.text_model.head(outputs.last_hidden_state)
        real = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
        return first_pooled(torch.cat([outputs.pooler_output[:, None], tokens], dim=1), real)

    def earlier_fingerprint(self, own: str) -> None:
        """Return None: earlier versions kept capitals."""


@final
class HFClipBackbone(_TransformersBackbone):
    """A CLIP of transformers, frozen; tokens as in `open_clip.OpenClipBackbone`.

    Args:
        network: A `CLIPModel`.
        tokenizer: CLIP's tokenizer.
        preprocess: How an image becomes this model's input.
        name: Name of the backbone in configurations and saved models.
    """

    kind, network_class = "clip", "CLIPModel"

    def __init__(self, network: Any, tokenizer: Any, preprocess: Preprocess, name: str) -> None:
        super().__init__(network, tokenizer, preprocess, name, network.config.projection_dim)

    def encode_image(self, images: Float[Tensor, "batch 3 height width"]) -> Features:
        """Encode preprocessed images."""
        vision = self.network.vision_model
        hidden = vision.post_layernorm(vision(pixel_values=images).last_hidden_state)
        return first_pooled(self.network.visual_projection(hidden))

    def text_inputs(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Return token ids; longer texts are cut to the context, their end mark kept."""
        return self._tokenize(texts)[:1]

    def text_features(self, *inputs: Tensor) -> Features:
        """See `Backbone`."""
        (ids,) = inputs
        tokens = self.network.text_projection(self.network.text_model(input_ids=ids).last_hidden_state)
        # The padding may share the end mark's id: the first one counts.
        end = (ids == self.tokenizer.eos_token_id).int().argmax(1)
        mask = torch.arange(ids.shape[1], device=ids.device) <= end[:, None]
        return Features(tokens[torch.arange(ids.shape[0], device=ids.device), end], tokens, mask, end)


HFBackbone = BlipBackbone | SiglipBackbone | HFClipBackbone
_KINDS: dict[str, type[HFBackbone]] = {one.kind: one for one in (BlipBackbone, SiglipBackbone, HFClipBackbone)}


def tower_settings(config: Any) -> dict[str, Any]:
    """Return the settings of a tower that its weights do not show, from a configuration of transformers."""
    given = config.to_dict()
    return {name: given[name] for name in _TOWER_SETTINGS if given.get(name) is not None}


def load_hf(name: str, weights: str | Path | None = None) -> HFBackbone:
    """Build a model of transformers with its trained weights.

    The preprocessing is the repository's own, except for `blip`: that name stands for the reference's recipe, which
    pads images longer than 1.25 to 1 to that ratio, then resizes and crops; `hf:Salesforce/blip-itm-base-coco`
    squashes, as its authors do.

    Args:
        name: `blip`, `siglip2`, `tinyclip` or `hf:<repository>`.
        weights: None to download on first use (kept by huggingface_hub), or a local folder with `config.json`, weights,
            tokenizer and `preprocessor_config.json`; or with a LoRA adapter, which is merged by `peft`, all else coming
            from the folder or repository of its model.

    Raises:
        ConfigError: If the name or the kind of model is not supported.
        CheckpointError: If a file cannot be downloaded or read, or does not fit.
    """
    source = NAMES.get(name) or (name.removeprefix("hf:") if name.startswith("hf:") else "")
    if not source:
        raise ConfigError(f"backbone {name!r} is not one of transformers; choose {', '.join(NAMES)} or hf:<repository>")
    if weights is not None and not Path(weights).is_dir():
        raise CheckpointError(
            f"backbone {name!r}: {weights} is not a folder; set model.weights to a folder with config.json, "
            "model.safetensors, tokenizer files and preprocessor_config.json"
        )
    folder = _find_model(str(weights or source))
    if (folder / "0_CLIPModel").is_dir():  # a folder of sentence-transformers
        folder /= "0_CLIPModel"
    if (folder / "open_clip_config.json").is_file() and not (folder / "config.json").exists():
        raise CheckpointError(
            f"backbone {name!r}: {folder} is a model of OpenCLIP; use the backbone open_clip:<any name> with it"
        )
    adapter = folder if (folder / "adapter_config.json").is_file() else None
    if adapter is not None:
        folder = _find_model(_adapted_model(name, adapter))
    kind = _find_kind(name, folder)
    network = _load_network(name, folder, kind)
    if adapter is not None:
        network = _merge_adapter(name, network, adapter)
    settings, size = _read_preprocess(name, folder), network.config.vision_config.image_size
    if name != "blip":
        return kind(network, load_tokenizer(folder, name), parse_preprocess(settings, size, name), name)
    padded = replace(parse_preprocess(settings, size, name, sized=False), fit="pad")
    backbone = kind(network, load_tokenizer(folder, name), padded, name)
    with suppress(CheckpointError):  # sizes that only matter without padding
        backbone.model_preprocess = parse_preprocess(settings, size, name)
    return backbone


def _find_model(source: str) -> Path:
    """Return a folder, or that of a repository in the cache."""
    return Path(source) if Path(source).is_dir() else fetch_files(source, _NEEDED).parent


def _adapted_model(name: str, adapter: Path) -> str:
    """Return the folder or repository of the model that a LoRA adapter changes."""
    with reading_files(name, adapter, "adapter_config.json"):
        config = json.loads((adapter / "adapter_config.json").read_text())
        base, kind = str(config["base_model_name_or_path"]), config["peft_type"]
    if kind != "LORA" or any((adapter / file).is_file() for file in _WEIGHTS):
        found = "both an adapter and a whole model" if kind == "LORA" else f"an adapter of type {kind}"
        raise CheckpointError(f"backbone {name!r}: {adapter} holds {found}; give one whole model, or one of type LORA")
    if find_spec("peft") is None:
        raise CheckpointError(
            f'backbone {name!r}: {adapter} holds a LoRA adapter of {base}; pip install "union-igrot[peft]" to merge it '
            "on loading, or merge it (merge_and_unload() of peft) and save that"
        )
    return base


def _merge_adapter(name: str, network: Any, adapter: Path) -> Any:
    """Add a LoRA adapter to the weights of its model."""
    from peft import PeftConfig, PeftModel, set_peft_model_state_dict  # noqa: PLC0415 - an extra

    files = [adapter / file for file in ("adapter_model.safetensors", "adapter_model.bin")]
    state = read_state_dict(next((file for file in files if file.is_file()), files[0]))
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        merged = PeftModel(network, config)
        loaded: Any = set_peft_model_state_dict(merged, state)  # a namedtuple without types
    except LIBRARY_ERRORS as error:
        raise CheckpointError(
            f"backbone {name!r}: the LoRA adapter {adapter} does not fit its model ({first_line(error)}); give the "
            "model it was trained on as base_model_name_or_path in adapter_config.json"
        ) from None
    missing = [key for key in loaded.missing_keys if "lora_" in key]
    if missing or loaded.unexpected_keys:
        raise CheckpointError(
            f"backbone {name!r}: the LoRA adapter {adapter} does not fit its model: "
            f"{summarize_names([*missing, *loaded.unexpected_keys])}"
        )
    return merged.merge_and_unload()


def restore_hf(name: str, kind: str, config: Mapping[str, Any], preprocess: Preprocess, folder: Path) -> HFBackbone:
    """Build a model of transformers from its configuration, with random weights.

    Args:
        name: Name of the backbone.
        kind: Its architecture, from `architecture`.
        config: Its configuration, from `architecture`.
        preprocess: How an image becomes its input.
        folder: The folder of its tokenizer.

    Raises:
        KeyError: If the architecture is unknown.
        CheckpointError: If the tokenizer cannot be read.
    """
    import transformers  # noqa: PLC0415 - heavy

    backbone = _KINDS[kind]
    model_class = getattr(transformers, backbone.network_class)
    network = model_class(model_class.config_class.from_dict(dict(config)))
    return backbone(network, load_tokenizer(folder, name), preprocess, name)


def load_tokenizer(source: str | Path, name: str) -> Any:
    """Load a tokenizer from a folder or a BERT `vocab.txt`.

    Raises:
        CheckpointError: If it cannot be read.
    """
    from transformers import AutoTokenizer, BertTokenizer  # noqa: PLC0415 - heavy

    with reading_files(name, Path(source), "tokenizer files"):
        if Path(source).is_file():
            return BertTokenizer(vocab=str(source))
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=False, local_files_only=True)


def _find_kind(name: str, folder: Path) -> type[HFBackbone]:
    from transformers import AutoConfig  # noqa: PLC0415 - heavy

    with reading_files(name, folder, "config.json"):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    if (model_type := config.model_type) not in _KINDS:
        hint = " (its images vary in size; use a repository of a fixed one)" if model_type == "siglip2" else ""
        raise ConfigError(f"backbone {name!r} is a {model_type} model{hint}; supported are {', '.join(_KINDS)}")
    return _KINDS[model_type]


def _load_network(name: str, folder: Path, kind: type[HFBackbone]) -> Any:
    import transformers  # noqa: PLC0415 - heavy

    file = next((file for file in _WEIGHTS if (folder / file).is_file()), _WEIGHTS[0])
    with reading_files(name, folder, file), _no_bar():
        check_content(folder / file)
        options = {"dtype": torch.float32, "output_loading_info": True, "local_files_only": True}
        network, report = getattr(transformers, kind.network_class).from_pretrained(str(folder), **options)
    # transformers fills what a file lacks with random weights.
    missing = [*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])]
    if missing := [key for key in missing if not key.endswith("position_ids")]:
        raise CheckpointError(
            f"the weights of {folder} miss {summarize_names(missing)} or hold another shape; copy them again"
        )
    return network


@contextmanager
def _no_bar() -> Iterator[None]:
    """Keep the bar of transformers out of what is no terminal."""
    from transformers.utils import logging  # noqa: PLC0415 - heavy

    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _read_preprocess(name: str, folder: Path) -> Mapping[str, Any]:
    from transformers.image_processing_base import ImageProcessingMixin  # noqa: PLC0415 - heavy

    settings: Any
    with reading_files(name, folder, "preprocessor_config.json"):
        settings, _ = ImageProcessingMixin.get_image_processor_dict(str(folder))
        if not isinstance(settings, Mapping):
            raise ValueError("it holds no settings")
    return settings


def parse_preprocess(settings: Mapping[str, Any], size: int, name: str, *, sized: bool = True) -> Preprocess:
    """Return the preprocessing of a preprocessor_config.json; `sized` refuses sizes that it cannot follow."""
    resample = settings.get("resample", _BICUBIC)
    normalize = settings.get("do_normalize", True)
    missing = [key for key in ("image_mean", "image_std") if normalize and len(settings.get(key) or ()) != 3]
    problem: str | None
    if missing:
        problem = f"lacks {', '.join(missing)}; give three numbers each"
    elif resample not in (_BILINEAR, _BICUBIC):
        problem = f"resamples by {resample} (expected 2 or 3)"
    elif not settings.get("do_rescale", True) or abs(settings.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        problem = "does not rescale pixels to 0..1, which is not supported"
    else:
        problem = _size_problem(settings, size) if sized else None
    if problem:
        raise CheckpointError(f"the preprocessor_config.json of {name!r} {problem}")
    (r, g, b), (s, t, u) = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if normalize:
        (r, g, b), (s, t, u) = settings["image_mean"], settings["image_std"]
    given = settings.get("size", size)
    shortest = isinstance(given, Mapping) and "shortest_edge" in given
    crop = bool(settings.get("do_center_crop", False)) and not (isinstance(given, Mapping) and "height" in given)
    return Preprocess(
        size=size,
        mean=(r, g, b),
        std=(s, t, u),
        fit="crop" if crop or shortest else "squash",
        interpolation="bicubic" if resample == _BICUBIC else "bilinear",
    )


def _size_problem(settings: Mapping[str, Any], size: int) -> str | None:
    """Return why a resizing and cropping does not end in the model's image size without a change of scale."""
    if not settings.get("do_resize", True):
        return "does not resize images, which is not supported"
    sizes = {"size": settings.get("size", size)}
    if settings.get("do_center_crop", False):
        sizes["crop_size"] = settings.get("crop_size", size)
    for key, given in sizes.items():
        if {int(x) for x in (given.values() if isinstance(given, Mapping) else [given])} != {size}:
            return f"has {key} {given!r}, which is not supported (expected {size}, the model's image size)"
    return None


@contextmanager
def reading_files(name: str, folder: Path, file: str) -> Iterator[None]:
    """Turn the errors of transformers about a file into one line."""
    try:
        yield
    except Exception as error:
        # The tokenizers library raises the plain base class for a damaged file.
        if type(error) is not Exception and not isinstance(error, LIBRARY_ERRORS):
            raise
        problem = f"{file} in {folder} cannot be read ({first_line(error)})"
        advice = replace_advice(folder / file) if (folder / file).is_file() else "copy it there"
        if "trust_remote_code" in str(error):
            problem = f"{folder} has code of its own, which is not run"
            advice = f"use a repository of a kind that transformers supports ({', '.join(_KINDS)})"
        raise CheckpointError(f"backbone {name!r}: {problem}; {advice}") from None
