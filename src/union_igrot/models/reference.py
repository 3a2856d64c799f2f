"""Checkpoints of the reference: the authors' files as models of this library.

Reads UNION's `.pth` (CLIP or BLIP under `model.`) and TransAgg's (`pretrained_model.`, `blip_model.`). The backbone of
the file is used, its sizes are read from its tensors, and nothing is downloaded.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from union_igrot.errors import CheckpointError, ConfigError
from union_igrot.models.backbones.base import Backbone
from union_igrot.models.backbones.hf import NAMES as HF_NAMES, BlipBackbone, load_tokenizer
from union_igrot.models.backbones.open_clip import OPENAI_MEAN, OPENAI_STD, OpenClipBackbone, model_config
from union_igrot.models.backbones.weights import load_strict, read_state_dict, summarize_names, unwrap_state_dict
from union_igrot.models.factory import build_query_head, build_target_head
from union_igrot.models.heads.query import MaskMode, QueryHead
from union_igrot.models.heads.target import TargetHead
from union_igrot.models.model import IGROTModel
from union_igrot.types import Preprocess

_PREFIXES = ("pretrained_model.", "blip_model.", "model.")
_FUSION = ("fusion.", "sep_token", "combiner_layer.", "output_layer.", "weighted_layer.")
_TARGET = ("t5_layers.", "union_weighted_layer.")
_T5_EMBEDDINGS = "t5_layers.embed_tokens.weight"
_CLIP_SIZES = ("input_resolution", "context_length", "vocab_size")
_BLIP_DROPPED = re.compile(
    r"^(visual_encoder_m|text_encoder_m|vision_proj_m|text_proj_m|itm_head)\."
    r"|^(temp|image_queue|text_queue|idx_queue|ptr_queue)$"
    r"|\.crossattention\.|\.position_ids$"
)
_BLIP_NAMES = (
    (r"^visual_encoder\.blocks\.", "vision_model.encoder.layers."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^(vision_model\..*)\.norm([12])\.", r"\1.layer_norm\2."),
    (r"^(vision_model\..*)\.attn\.qkv\.", r"\1.self_attn.qkv."),
    (r"^(vision_model\..*)\.attn\.proj\.", r"\1.self_attn.projection."),
)
_KINDS = {"frozen": "original", "sum": "sum", "union": "union"}


def load_reference_checkpoint(
    path_or_state_dict: str | Path | Mapping[str, Tensor],
    model: str | Backbone = "base",
    target: Literal["frozen", "sum", "union"] = "union",
    mask: MaskMode = "exclude",
    *,
    sum_form: Literal["training", "inference", "normalised"] = "training",
    tokenizer: str | Path | None = None,
    text_heads: int | None = None,
) -> IGROTModel:
    """Load a checkpoint of the reference or of TransAgg, backbone included.

    Args:
        path_or_state_dict: The `.pth`, read with `weights_only=True`, or its tensors by name, in 16 or 32 bits.
        model: Name of the backbone: `base`, `large`, another OpenCLIP name, or `blip`; sizes come from the tensors. Or
            a backbone, whose weights are replaced.
        target: The target head. TransAgg's files hold none: choose `frozen` (the reference's `original`) for them. A
            UNION head in the file is ignored for `frozen` and `sum`.
        mask: `exclude`, as the reference evaluates, or `legacy`, as it trains.
        sum_form: Which of the reference's two sums `target="sum"` is: `training`, the one in its model (not of unit
            length; ranks like `frozen`), or `inference`, the one in its evaluation. `normalised` is ours.
        tokenizer: BLIP's vocabulary, which is not in its files: a folder or a `vocab.txt`; None for the one of BLIP's
            repository in the Hugging Face cache.
        text_heads: Attention heads of a CLIP's text tower, the one size that no tensor has. None for heads of width 64,
            as in every CLIP of OpenAI, but at least two: below a width of 128 that is a guess.

    Returns:
        The model in evaluation mode, in 32 bits; `save` writes its backbone's weights, too.

    Raises:
        ConfigError: If the backbone or target is not one of the reference's.
        CheckpointError: If the file cannot be read, or tensors are missing or unknown; lists them.
    """
    if target not in _KINDS:
        raise ConfigError(f"target {target!r} is not one of the reference's; choose {', '.join(_KINDS)}")
    if isinstance(path_or_state_dict, Mapping):
        source, state = "the state dict", unwrap_state_dict(path_or_state_dict, "the state dict")
    else:
        source, state = str(path_or_state_dict), read_state_dict(path_or_state_dict)
    encoder, heads = _split_state(state, source)
    try:
        backbone = _backbone(encoder, model, tokenizer, text_heads, source)
        fusion = _fusion(heads, backbone.dim, mask, source)
        head = _target(heads, backbone.dim, target, sum_form, source)
    except KeyError as error:  # a tensor that sizes are read from
        raise CheckpointError(f"{source} misses {error.args[0]}; give the whole state dict") from None
    loaded = IGROTModel(backbone, fusion, head, {"source": Path(source).name, "reference_target": _KINDS[target]})
    loaded.tuned = True  # the published code trains both encoders, and the file may hold any weights
    return loaded.eval()


def _split_state(state: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the backbone's tensors, without their prefix, and those of the heads."""
    encoder: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    unknown = []
    for name, x in state.items():
        prefix = next((p for p in _PREFIXES if name.startswith(p)), None)
        if prefix is not None:
            encoder[name.removeprefix(prefix)] = x
        elif name.startswith((*_FUSION, *_TARGET)):
            heads[name] = x
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"{source} holds tensors that the reference does not know: {summarize_names(unknown)}")
    if not encoder or not heads:
        missing = (
            "no backbone (model.*, pretrained_model.*, blip_model.*)" if not encoder else "no heads (fusion.*, ...)"
        )
        raise CheckpointError(f"{source} holds {missing}; give the state dict of the whole reference model")
    heads.pop(_T5_EMBEDDINGS, None)  # transformers 5 wrote an unused embedding table
    return encoder, heads


def _backbone(
    encoder: dict[str, Tensor],
    model: str | Backbone,
    tokenizer: str | Path | None,
    text_heads: int | None,
    source: str,
) -> Backbone:
    is_blip = "visual_encoder.cls_token" in encoder
    if not is_blip and "visual.conv1.weight" not in encoder:
        raise CheckpointError(
            f"{source}: the backbone is neither CLIP with a vision transformer (visual.conv1.weight) "
            f"nor BLIP (visual_encoder.cls_token), but begins {summarize_names(encoder)}"
        )
    kind = "BLIP" if is_blip else "CLIP"
    encoder = rename_blip(encoder) if is_blip else {n: x for n, x in encoder.items() if n not in _CLIP_SIZES}
    if isinstance(model, Backbone):
        if not isinstance(model, BlipBackbone if is_blip else OpenClipBackbone):
            raise ConfigError(f"{source} holds a {kind}, but the backbone given is a {type(model).__name__}")
        load_strict(model.network, encoder, f"the {kind} in {source}")
        return model
    if is_blip != (model == "blip"):
        allowed = "blip" if is_blip else "base, large or open_clip:<architecture>"
        raise ConfigError(f"{source} holds a {kind}, but model={model!r}; choose model={allowed}")
    return _blip(encoder, tokenizer, source) if is_blip else _clip(encoder, model, text_heads, source)


def _clip(encoder: dict[str, Tensor], model: str, text_heads: int | None, source: str) -> OpenClipBackbone:
    named = model_config(model)
    config = _clip_sizes(encoder, named)
    config["text_cfg"]["heads"] = text_heads or max(2, config["text_cfg"]["width"] // 64)
    preprocess = Preprocess(config["vision_cfg"]["image_size"], OPENAI_MEAN, OPENAI_STD, fit="pad")
    return OpenClipBackbone(config, preprocess, model, encoder, source=f"the CLIP in {source}")


def _clip_sizes(state: Mapping[str, Tensor], named: Mapping[str, Any]) -> dict[str, Any]:
    """Read a CLIP's sizes from its tensors; the others come from the named configuration."""
    width, _, patch, _ = state["visual.conv1.weight"].shape
    grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    context, text_width = state["positional_embedding"].shape
    vocabulary, joint = state["token_embedding.weight"].shape[0], state["text_projection"].shape[1]
    vision = {
        "image_size": patch * grid,
        "layers": _count(state, r"^visual\.transformer\.resblocks\.(\d+)\."),
        "width": width,
        "patch_size": patch,
        "head_width": named["vision_cfg"].get("head_width", 64),
    }
    text = {
        "context_length": context,
        "vocab_size": vocabulary,
        "width": text_width,
        "layers": _count(state, r"^transformer\.resblocks\.(\d+)\."),
    }
    return {"embed_dim": joint, "quick_gelu": named["quick_gelu"], "vision_cfg": vision, "text_cfg": text}


def _count(state: Mapping[str, Tensor], layer: str) -> int:
    """Count the layers whose number a pattern finds in the names."""
    return len({found[1] for name in state if (found := re.search(layer, name))})


def rename_blip(encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert BLIP's original names to those of transformers.

    Momentum copies, queues, the temperature, the matching head and the text encoder's cross-attention are left out:
    retrieval does not use them.
    """
    renamed = {}
    for name, x in encoder.items():
        if _BLIP_DROPPED.search(name):
            continue
        for pattern, new in _BLIP_NAMES:
            name = re.sub(pattern, new, name)  # noqa: PLW2901 - one rule after the other
        renamed[name] = x
    return renamed


def _blip(state: dict[str, Tensor], tokenizer: str | Path | None, source: str) -> BlipBackbone:
    from transformers import BlipConfig, BlipForImageTextRetrieval  # noqa: PLC0415 - heavy

    sizes, vocabulary = _blip_sizes(state), _blip_tokenizer(tokenizer)
    network = BlipForImageTextRetrieval(BlipConfig(**sizes))
    preprocess = Preprocess(sizes["vision_config"]["image_size"], OPENAI_MEAN, OPENAI_STD, fit="pad")
    backbone = BlipBackbone(network, vocabulary, preprocess, "blip")
    load_strict(backbone.network, state, f"the BLIP in {source}")
    return backbone


def _blip_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read BLIP's sizes from its tensors; heads are 64 wide on both sides."""
    patch = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    grid = round((state["vision_model.embeddings.position_embedding"].shape[1] - 1) ** 0.5)
    width = state["vision_model.embeddings.class_embedding"].shape[-1]
    vision_inner = state["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0]
    vocabulary, text_width = state["text_encoder.embeddings.word_embeddings.weight"].shape
    positions = state["text_encoder.embeddings.position_embeddings.weight"].shape[0]
    text_inner = state["text_encoder.encoder.layer.0.intermediate.dense.weight"].shape[0]
    joint = state["vision_proj.weight"].shape[0]
    vision = {
        "hidden_size": width,
        "intermediate_size": vision_inner,
        "num_hidden_layers": _count(state, r"^vision_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": width // 64,
        "image_size": patch * grid,
        "patch_size": patch,
        "layer_norm_eps": 1e-6,  # BLIP's own vision transformer; transformers' default is 1e-5
    }
    text = {
        "vocab_size": vocabulary,
        "hidden_size": text_width,
        "encoder_hidden_size": width,
        "intermediate_size": text_inner,
        "num_hidden_layers": _count(state, r"^text_encoder\.encoder\.layer\.(\d+)\."),
        "num_attention_heads": text_width // 64,
        "max_position_embeddings": positions,
        "layer_norm_eps": 1e-12,
        "is_decoder": False,
    }
    return {"vision_config": vision, "text_config": text, "image_text_hidden_size": joint}


def _blip_tokenizer(tokenizer: str | Path | None) -> Any:
    if tokenizer is not None:
        return load_tokenizer(tokenizer, "blip")
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - seldom needed

    cached = try_to_load_from_cache(HF_NAMES["blip"], "vocab.txt")
    if not isinstance(cached, str):
        raise CheckpointError(
            "BLIP's file holds no vocabulary; give tokenizer=PATH, a folder with tokenizer files or "
            f"the vocab.txt of {HF_NAMES['blip']}"
        )
    return load_tokenizer(Path(cached).parent, "blip")


def _fusion(heads: Mapping[str, Tensor], width: int, mask: MaskMode, source: str) -> QueryHead:
    own = {name: x for name, x in heads.items() if name.startswith(_FUSION)}
    layers, inner = _count(own, r"^fusion\.layers\.(\d+)\."), own["fusion.layers.0.linear1.weight"].shape[0]
    fusion = build_query_head("transagg", width, layers=layers, feedforward=inner, mask=mask)
    load_strict(fusion, own, f"the fusion head in {source}")
    return fusion


def _target(heads: Mapping[str, Tensor], width: int, target: str, sum_form: str, source: str) -> TargetHead:
    if target != "union":
        options: dict[str, Any] = {"form": sum_form} if target == "sum" else {}
        return build_target_head(target, width, **options)
    own = {name: x for name, x in heads.items() if name.startswith(_TARGET)}
    if not own:
        raise CheckpointError(
            f"{source} has no UNION head (t5_layers.*, union_weighted_layer.*); TransAgg's files have none: "
            "choose target=frozen"
        )
    layers, first = _count(own, r"^t5_layers\.block\.(\d+)\."), "t5_layers.block.0.layer"
    inner = own[f"{first}.1.DenseReluDense.wi.weight"].shape[0]
    # Heads of T5 are 64 wide at every width of the joint space.
    heads_of_64 = own[f"{first}.0.SelfAttention.q.weight"].shape[0] // 64
    head = build_target_head("union", width, layers=layers, heads=heads_of_64, feedforward=inner)
    load_strict(head, own, f"the UNION head in {source}")
    return head
