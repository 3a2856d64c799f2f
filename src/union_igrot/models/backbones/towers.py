"""How each kind of OpenCLIP's towers brings its tokens into the joint space.

One rule for all: a token is what the tower's own head returns for it alone. If the head reads one token, the pooled
embedding is one of the tokens; if it averages or attends (ResNets, SigLIP, CoCa, texts of Hugging Face), the pooled
embedding is put in front of them.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from timm.layers.attention_pool2d import AttentionPool2d, RotAttentionPool2d
from timm.models.eva import Eva
from torch import Tensor, nn

from union_igrot.models.backbones.base import attention_of_one, first_pooled
from union_igrot.types import Features

_FIRST_POOLERS = ("ClsPooler", "ClsLastHiddenStatePooler")

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
            tokens = attention_of_one(visual.attn_pool.attn, visual.attn_pool.ln_k(tokens))
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
            return Features(tokens[torch.arange(ids.shape[0], device=ids.device), at], tokens, mask, at)
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
