"""Query heads against torch's own encoder and a literal, item by item computation."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

from union_igrot.models.heads.query import FusionLayer, ImageFusion, SumFusion, TextFusion, TransAggFusion
from union_igrot.types import Features

WIDTH, HEADS, INNER = 16, 4, 24


def head(mask="exclude", seed=0, layers=2, dropout=0.0, start="reference"):
    torch.manual_seed(seed)
    made = TransAggFusion(WIDTH, layers, HEADS, INNER, dropout, mask, start)
    for parameter in made.parameters():  # biases and norms away from 0 and 1
        nn.init.normal_(parameter, std=0.3) if start == "reference" else None
    return made.eval()


def features(batch, length, seed, lengths=None, pooled_at=None):
    source = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, length, WIDTH, generator=source)
    lengths = torch.full((batch,), length) if lengths is None else torch.tensor(lengths)
    at = lengths - 1 if pooled_at is None else torch.tensor(pooled_at)
    mask = torch.arange(length)[None] < lengths[:, None]
    return Features(tokens[torch.arange(batch), at], tokens, mask, at)


def images_and_texts(seed=1):
    return features(3, 5, seed, pooled_at=[0, 0, 0]), features(3, 6, seed + 1, lengths=[6, 2, 4])


def torch_encoder(made):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, 0.0, "gelu", batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, len(made.fusion.layers), enable_nested_tensor=False)
    encoder.load_state_dict(made.fusion.state_dict())
    return encoder.eval()


def through_torch(made, encoder, images, texts):
    """The reference's forward over torch's encoder, every row of every layer computed."""
    x = torch.cat([texts.tokens, made.sep_token.expand(len(images), 1, -1), images.tokens], 1)
    padding = torch.cat([~texts.mask, torch.zeros(len(images), 1, dtype=torch.bool), ~images.mask], 1)
    if made.mask == "legacy":
        padding = padding.float()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        y = encoder(x, src_key_padding_mask=padding)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    each = torch.arange(len(images))
    both = torch.cat([y[each, texts.tokens.shape[1] + 1 + images.pooled_at], y[each, texts.pooled_at]], 1)
    fused = made.output_layer(F.relu(made.combiner_layer(both)))
    w = made.weighted_layer(fused)
    return F.normalize(w[:, :1] * texts.pooled + w[:, 1:2] * fused + w[:, 2:] * images.pooled, dim=-1)


@pytest.mark.parametrize("mask", ["exclude", "legacy"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_equals_torch_encoder_with_gradients(mask, layers):
    made = head(mask, layers=layers)
    encoder = torch_encoder(made)
    images, texts = images_and_texts()
    ours, theirs = made(images, texts), through_torch(made, encoder, images, texts)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)
    goal = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(9))
    names = dict(made.fusion.named_parameters())
    ours_grad = torch.autograd.grad((ours * goal).sum(), list(names.values()))
    others = dict(encoder.named_parameters())
    theirs_grad = torch.autograd.grad((theirs * goal).sum(), [others[name] for name in names])
    for mine, expected in zip(ours_grad, theirs_grad, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-3)


def literal(made, images, texts, item):
    """Section by section in double precision, one item, one head, one key at a time."""
    p = {name: x.double() for name, x in made.state_dict().items()}

    def norm(v, name):
        return (v - v.mean()) / torch.sqrt(((v - v.mean()) ** 2).mean() + 1e-5) * p[name + ".weight"] + p[
            name + ".bias"
        ]

    def linear(v, name):
        return p[name + ".weight"] @ v + p[name + ".bias"]

    sequence = [*texts.tokens[item].double(), p["sep_token"][0, 0], *images.tokens[item].double()]
    real = [*texts.mask[item].tolist(), True, *images.mask[item].tolist()]
    part = WIDTH // HEADS
    for number in range(len(made.fusion.layers)):
        here = f"fusion.layers.{number}."
        normed = [norm(v, here + "norm1") for v in sequence]
        qkv = [linear_in(p, here, v) for v in normed]
        out = []
        for row, v in enumerate(sequence):
            mixed = []
            for h in range(HEADS):
                cut = slice(h * part, (h + 1) * part)
                logits = [float(qkv[row][0][cut] @ qkv[key][1][cut]) / math.sqrt(part) for key in range(len(sequence))]
                if made.mask == "legacy":
                    logits = [x if real[key] else x + 1.0 for key, x in enumerate(logits)]
                    weights = [math.exp(x) for x in logits]
                else:
                    weights = [math.exp(x) if real[key] else 0.0 for key, x in enumerate(logits)]
                mixed.append(sum(w / sum(weights) * qkv[key][2][cut] for key, w in enumerate(weights)))
            v = v + linear(torch.cat(mixed), here + "self_attn.out_proj")  # noqa: PLW2901
            inner = linear(norm(v, here + "norm2"), here + "linear1")
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            out.append(v + linear(inner, here + "linear2"))
        sequence = out
    text_length = texts.tokens.shape[1]
    h = torch.cat([sequence[text_length + 1 + int(images.pooled_at[item])], sequence[int(texts.pooled_at[item])]])
    fused = linear(linear(h, "combiner_layer").clamp(min=0), "output_layer")
    w = linear(fused, "weighted_layer")
    mixed = w[0] * texts.pooled[item].double() + w[1] * fused + w[2] * images.pooled[item].double()
    return mixed / mixed.norm()


def linear_in(p, here, v):
    joined = p[here + "self_attn.in_proj_weight"] @ v + p[here + "self_attn.in_proj_bias"]
    return joined.split(WIDTH)


@pytest.mark.parametrize("mask", ["exclude", "legacy"])
def test_equals_the_literal_computation(mask):
    made = head(mask)
    images = features(3, 5, 1, lengths=[5, 4, 5], pooled_at=[0, 2, 1])
    texts = features(3, 6, 2, lengths=[6, 1, 4], pooled_at=[5, 0, 0])
    found = made(images, texts)
    expected = torch.stack([literal(made, images, texts, item) for item in range(3)])
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**30), st.sampled_from(["exclude", "legacy"]), st.data())
def test_chosen_rows_equal_the_full_computation(seed, mask, data):
    torch.manual_seed(seed)
    layer = FusionLayer(WIDTH, HEADS, INNER, 0.0)
    x = torch.randn(2, 7, WIDTH)
    bias = torch.where(torch.rand(2, 7) < 0.3, 1.0 if mask == "legacy" else float("-inf"), 0.0)
    bias[:, 0] = 0
    rows = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=2, max_size=2))
    )
    full = layer(x, bias)
    chosen = torch.stack([full[item, rows[item]] for item in range(2)])
    torch.testing.assert_close(layer(x, bias, rows), chosen, atol=1e-6, rtol=1e-5)


def test_content_of_padding_counts_under_legacy_alone():
    images, texts = images_and_texts()
    other = texts.tokens.clone()
    other[~texts.mask] = 7 * torch.randn(int((~texts.mask).sum()), WIDTH, generator=torch.Generator().manual_seed(5))
    changed = Features(texts.pooled, other, texts.mask, texts.pooled_at)
    made = head("exclude")
    torch.testing.assert_close(made(images, changed), made(images, texts), atol=0, rtol=0)
    legacy = head("legacy")
    apart = (legacy(images, changed) - legacy(images, texts)).abs().amax(1)
    assert apart[0] == 0  # nothing of it is padding
    assert (apart[1:] > 1e-3).all()


def test_masks_agree_where_nothing_is_padding():
    images, texts = features(2, 4, 1), features(2, 3, 2)
    torch.testing.assert_close(head("exclude")(images, texts), head("legacy")(images, texts))
    bare = Features(texts.pooled, texts.tokens, None, texts.pooled_at)
    torch.testing.assert_close(head()(images, bare), head()(images, texts))


@pytest.mark.parametrize("mask", ["exclude", "legacy"])
def test_training_without_dropout_equals_evaluation(mask):
    made = head(mask)
    images, texts = images_and_texts()
    with torch.no_grad():
        evaluated = made(images, texts)
    torch.testing.assert_close(made.train()(images, texts), evaluated)


def test_dropout_acts_in_training_alone():
    made = head(dropout=0.4)
    images, texts = images_and_texts()
    torch.testing.assert_close(made(images, texts), made(images, texts), atol=0, rtol=0)
    torch.testing.assert_close(made(images, texts), head()(images, texts), atol=0, rtol=0)
    made.train()
    assert not torch.allclose(made(images, texts), made(images, texts))


def test_balanced_start_weighs_all_three_alike():
    made = head(start="balanced")
    images, texts = images_and_texts()
    calls = []
    made.weighted_layer.register_forward_hook(lambda _, given, out: calls.append((given[0], out)))
    query = made(images, texts)
    ((fused, w),) = calls
    assert torch.equal(w, torch.ones(3, 3))
    torch.testing.assert_close(query, F.normalize(texts.pooled + fused + images.pooled, dim=-1))


def test_transagg_asks_for_tokens():
    images, texts = images_and_texts()
    for pair in ((Features(images.pooled), texts), (images, Features(texts.pooled))):
        with pytest.raises(ValueError, match="token features"):
            head()(*pair)
    assert TransAggFusion.needs_tokens


def test_heads_without_weights():
    images, texts = features(4, 1, 1), features(4, 1, 2)
    i, t = images.pooled.double(), texts.pooled.double()
    i, t = i / i.norm(dim=1, keepdim=True), t / t.norm(dim=1, keepdim=True)
    for made, expected in (
        (ImageFusion(), i),
        (TextFusion(), t),
        (SumFusion(), (i + t) / (i + t).norm(dim=1)[:, None]),
    ):
        found = made(Features(images.pooled * 3), Features(texts.pooled * 0.2))
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
        assert not list(made.parameters())
        assert not made.needs_tokens
