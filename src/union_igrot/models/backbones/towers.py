"""How each kind of OpenCLIP's towers brings its tokens into the joint space.

One rule for all: a token is what the tower's own head would say of it alone. Where the head
reads one token, that is the whole of it; where it averages or attends, the pooled embedding is
no token and stands in front of them. Knows the towers' layers. Does not know weights' files,
names or words.
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
from torch.nn import functional as F

from union_igrot.types import Features

SeeImages = Callable[[Float[Tensor, "batch 3 height width"]], Float[Tensor, "batch length dim"]]
"""Images to their tokens in the joint space, the pooled embedding first."""
ReadTexts = Callable[[Int[Tensor, "batch length"]], Features]
"""Numbers of words to features in the joint space."""
_ENDS, _FIRST, _APART = "ends", "first", "apart"
_FIRST_POOLERS = ("ClsPooler", "ClsLastHiddenStatePooler")


class NotSupportedError(Exception):
    """A tower whose tokens cannot be brought into the joint space; says why."""


def image_tower(visual: Any) -> SeeImages:
    """Find how an image tower's tokens reach the joint space.

    Args:
        visual: OpenCLIP's `VisionTransformer`, `ModifiedResNet` or `TimmModel`.

    Raises:
        NotSupportedError: Where its head is of another kind.
    """
    if isinstance(visual, VisionTransformer):
        return _vision_transformer(visual)
    if isinstance(visual, ModifiedResNet):
        return _resnet(visual)
    if isinstance(visual, TimmModel):
        return _timm(visual)
    raise NotSupportedError(f"has an image tower of {type(visual).__name__}")


def _vision_transformer(visual: Any) -> SeeImages:
    if getattr(visual, "attn_pool_contrastive", None) is not None or visual.pool_type not in ("tok", "avg"):
        raise NotSupportedError("pools its image tokens in a way that has no single embedding")

    def alone(tokens: Tensor) -> Tensor:
        if visual.attn_pool is not None:
            tokens = _attended(visual.attn_pool, visual.attn_pool.ln_k(tokens))
        projected: Tensor = visual.ln_post(tokens) @ visual.proj
        return projected

    def see(images: Tensor) -> Tensor:
        seen = visual.forward_intermediates(images, indices=1, output_fmt="NLC", output_extra_tokens=True)
        patches, first = seen["image_intermediates"][-1], seen["image_intermediates_prefix"][-1]
        if visual.attn_pool is None and visual.pool_type == "tok":
            return alone(torch.cat([first, patches], dim=1))
        # An average is one over patches; attention sees the class token too.
        tokens = patches if visual.attn_pool is None else torch.cat([first, patches], dim=1)
        return torch.cat([seen["image_features"][:, None], alone(tokens)], dim=1)

    return see


def _attended(pool: Any, tokens: Tensor) -> Tensor:
    """Return attention's answer where it sees one token: that token's value, whatever the question is."""
    attention, width = pool.attn, pool.attn.embed_dim
    weight = attention.in_proj_weight[2 * width :] if attention.v_proj_weight is None else attention.v_proj_weight
    answer: Tensor = attention.out_proj(F.linear(tokens, weight, attention.in_proj_bias[2 * width :]))
    return answer


def _resnet(visual: Any) -> SeeImages:
    def see(images: Tensor) -> Tensor:
        grid = visual.stem(images)
        for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            grid = layer(grid)
        pool = visual.attnpool
        # The pool's first place is the mean's, which is where it asks from.
        places = grid.flatten(2).transpose(1, 2) + pool.positional_embedding[1:]
        tokens = pool.c_proj(pool.v_proj(places))
        return torch.cat([pool(grid)[:, None], tokens], dim=1)

    return see


def _timm(visual: Any) -> SeeImages:
    trunk = visual.trunk
    latent = getattr(trunk, "attn_pool", None)
    fixed = any(isinstance(part, AttentionPool2d | RotAttentionPool2d) for part in visual.modules())
    if fixed or getattr(latent, "pos_embed", None) is not None:
        raise NotSupportedError("pools its image tokens by an attention that knows their places, so not one by one")
    left_out = _left_out(trunk)

    def head(features: Tensor) -> Tensor:
        answer: Tensor = visual.head(trunk.forward_head(features))
        return answer

    def see(images: Tensor) -> Tensor:
        features = trunk.forward_features(images)
        if features.ndim == 4:
            if getattr(trunk, "output_fmt", "NCHW") == "NHWC":
                places = features.flatten(1, 2)
                single = places.flatten(0, 1)[:, None, None, :]
            else:
                places = features.flatten(2).transpose(1, 2)
                single = places.flatten(0, 1)[:, :, None, None]
        else:
            places = features[:, left_out:]
            # A head that leaves tokens out is given these as well, and looks at the one behind them.
            before = features[:, None, :left_out].expand(-1, places.shape[1], -1, -1)
            single = torch.cat([before, places[:, :, None]], dim=2).flatten(0, 1)
        tokens: Tensor = head(single).unflatten(0, places.shape[:2])
        if getattr(trunk, "global_pool", "") == "token" and features.ndim == 3:
            return tokens
        return torch.cat([head(features)[:, None], tokens], dim=1)

    return see


def _left_out(trunk: Any) -> int:
    """Count the tokens at the front that a timm transformer's head does not look at."""
    if getattr(trunk, "global_pool", "") == "token" or getattr(trunk, "pool_include_prefix", False):
        return 0
    if isinstance(trunk, Eva) and trunk.attn_pool is not None:
        return 0
    return int(getattr(trunk, "num_prefix_tokens", 0))


def text_tower(network: Any, end: int | None, padding: int, *, padding_ends: bool) -> ReadTexts:
    """Find how a text tower's tokens reach the joint space.

    Args:
        network: OpenCLIP's `CLIP` or `CustomTextCLIP`.
        end: Number of the end mark; the largest number of each text where None.
        padding: Number of the padding.
        padding_ends: Whether the end mark has the padding's number, as in SigLIP.

    Raises:
        NotSupportedError: Where it pools in another way.
    """
    text = getattr(network, "text", network)
    how = _text_pooling(network, text)
    if isinstance(text, HFTextEncoder):
        padding = int(text.config.pad_token_id)
    project = _text_projection(network, text, how)

    def read(ids: Tensor) -> Features:
        pooled, tokens = project(ids)
        if how == _ENDS:
            at = ids.argmax(1) if end is None else (ids == end).int().argmax(1)
            mask = torch.arange(ids.shape[1], device=ids.device) <= at[:, None]
            return Features(tokens[torch.arange(len(ids), device=ids.device), at], tokens, mask, at)
        at, mask = torch.zeros_like(ids[:, 0]), _before_padding(ids, padding, padding_ends=padding_ends)
        if how == _APART:
            tokens = torch.cat([pooled[:, None], tokens], dim=1)
            mask = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
        return Features(tokens[:, 0], tokens, mask, at)

    return read


def _text_pooling(network: Any, text: Any) -> str:
    if not isinstance(text, HFTextEncoder):
        pool = getattr(text, "pool_type", None) or getattr(network, "text_pool_type", None)
        if getattr(text, "cls_emb", None) is not None or pool == "last":
            return _APART
        if pool in ("argmax", "eos"):
            return _ENDS
        if pool == "first":
            return _FIRST
        raise NotSupportedError(f"pools its texts by {pool!r}, which has no single embedding")
    pooler = type(text.pooler).__name__
    if pooler == "MeanPooler":
        return _APART
    if pooler in _FIRST_POOLERS and getattr(text.transformer, "pooler", None) is None:
        return _FIRST
    raise NotSupportedError(f"pools its texts by {pooler} of {type(text.transformer).__name__}")


def _text_projection(network: Any, text: Any, how: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return what turns numbers into the pooled embedding and all tokens, both in the joint space."""
    if not isinstance(text, HFTextEncoder):
        projection = text.text_projection

        def transformer(ids: Tensor) -> tuple[Tensor, Tensor]:
            said = network.forward_intermediates(
                text=ids, text_indices=1, normalize=False, normalize_intermediates=True
            )
            tokens = said["text_intermediates"][-1]
            if projection is not None:
                tokens = projection(tokens) if isinstance(projection, nn.Linear) else tokens @ projection
            return said["text_features"], tokens

        return transformer

    def pretrained(ids: Tensor) -> tuple[Tensor, Tensor]:
        attended = (ids != text.config.pad_token_id).long()
        said = text.transformer(input_ids=ids, attention_mask=attended)
        tokens = text.proj(said.last_hidden_state)
        return (tokens[:, 0] if how == _FIRST else text.proj(text.pooler(said, attended))), tokens

    return pretrained


def _before_padding(
    ids: Int[Tensor, "batch length"], padding: int, *, padding_ends: bool
) -> Bool[Tensor, "batch length"]:
    """Mark the words up to the padding at the end, by position: its number may stand among the words too."""
    words = ids != padding
    length = ids.shape[1] - words.flip(1).int().argmax(1)
    length = torch.where(words.any(1), length, torch.zeros_like(length)) + int(padding_ends)
    mask: Tensor = torch.arange(ids.shape[1], device=ids.device) < length[:, None]
    return mask
