"""Target heads against the reference's outputs and a literal T5 encoder."""

import math

import pytest
import torch
from torch.nn import functional as F

from union_igrot.models.heads.query import TransAggFusion
from union_igrot.models.heads.target import FrozenTarget, ResidualTarget, SharedTarget, SumTarget, UnionTarget
from union_igrot.types import Features

WIDTH, HEADS, INNER, LAYERS = 12, 2, 20, 3


def never(images, texts):
    pytest.fail("this target does not fuse")


def pair(batch=5, width=WIDTH, seed=0):
    source = torch.Generator().manual_seed(seed)
    return Features(torch.randn(batch, width, generator=source)), Features(torch.randn(batch, width, generator=source))


def union(seed=0, start="reference", **options):
    torch.manual_seed(seed)
    made = UnionTarget(WIDTH, layers=LAYERS, heads=HEADS, feedforward=INNER, start=start, **options)
    if start == "reference":
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return made.eval()


def test_residual_starts_at_the_image_and_equals_plain_sums():
    images, null = pair()
    torch.manual_seed(1)
    made = ResidualTarget(WIDTH, hidden=7).double()
    images = Features(images.pooled.double(), torch.full((5, 3, WIDTH), torch.nan))  # tokens are not read
    assert made(images, null, never).equal(F.normalize(images.pooled, dim=-1))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    p = {name.removeprefix("mlp."): x.tolist() for name, x in made.state_dict().items()}
    for x, found in zip(images.pooled.tolist(), made(images, null, never), strict=True):
        mean = sum(x) / WIDTH
        spread = math.sqrt(sum((v - mean) ** 2 for v in x) / WIDTH + 1e-5)
        normed = [(v - mean) / spread * g + b for v, g, b in zip(x, p["norm.weight"], p["norm.bias"], strict=True)]
        inner = [
            sum(w * v for w, v in zip(row, normed, strict=True)) + b
            for row, b in zip(p["up.weight"], p["up.bias"], strict=True)
        ]
        inner = [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in inner]
        outer = [
            v + sum(w * h for w, h in zip(row, inner, strict=True)) + b
            for v, row, b in zip(x, p["down.weight"], p["down.bias"], strict=True)
        ]
        length = math.sqrt(sum(v * v for v in outer))
        assert found.tolist() == pytest.approx([v / length for v in outer], abs=1e-12)


def test_residual_is_twice_as_wide_inside_by_default():
    assert ResidualTarget(WIDTH).state_dict()["mlp.up.weight"].shape == (2 * WIDTH, WIDTH)
    assert ResidualTarget(WIDTH, 5).options == {"hidden": 5}


def bucket(distance):
    """T5's bucket of a distance key - query below 8 steps: keys behind take the upper half of 32."""
    return abs(distance) + (16 if distance > 0 else 0)


def literal_share(made, image, null):
    """The two tokens through T5's encoder and the small network, head by head, in double precision."""
    p = {name: x.double() for name, x in made.state_dict().items()}

    def norm(v, name):
        return v / torch.sqrt((v**2).mean() + 1e-6) * p[name]

    tokens = [image.double(), null.double()]
    table = p["t5_layers.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    for number in range(LAYERS):
        here = f"t5_layers.block.{number}."
        attention = here + "layer.0.SelfAttention."
        normed = [norm(v, here + "layer.0.layer_norm.weight") for v in tokens]
        attended = []
        for row in range(2):
            heads = []
            for h in range(HEADS):
                cut = slice(64 * h, 64 * (h + 1))
                query = (p[attention + "q.weight"] @ normed[row])[cut]
                logits = [
                    float(query @ (p[attention + "k.weight"] @ normed[key])[cut]) + float(table[bucket(key - row), h])
                    for key in range(2)
                ]
                weights = [math.exp(x - max(logits)) for x in logits]
                heads.append(
                    sum(w / sum(weights) * (p[attention + "v.weight"] @ normed[k])[cut] for k, w in enumerate(weights))
                )
            attended.append(tokens[row] + p[attention + "o.weight"] @ torch.cat(heads))
        dense = here + "layer.1.DenseReluDense."
        tokens = [
            v
            + p[dense + "wo.weight"]
            @ (p[dense + "wi.weight"] @ norm(v, here + "layer.1.layer_norm.weight")).clamp(min=0)
            for v in attended
        ]
    x = torch.cat([norm(v, "t5_layers.final_layer_norm.weight") for v in tokens])
    for layer in (0, 3, 6):
        name = f"union_weighted_layer.{layer}."
        x = p[name + "weight"] @ x + p[name + "bias"]
        x = x if layer == 6 else 1 / (1 + torch.exp(-x))
    return x


@pytest.mark.parametrize("seed", [0, 1])
def test_union_equals_the_literal_computation(seed):
    made = union(seed)
    images, null = pair(seed=seed)
    shares = torch.stack([literal_share(made, i, n) for i, n in zip(images.pooled, null.pooled, strict=True)])
    torch.testing.assert_close(made.weight(images.pooled, null.pooled).double(), shares, atol=1e-5, rtol=1e-4)
    mixed = shares * images.pooled.double() + (1 - shares) * null.pooled.double()
    expected = mixed / mixed.norm(dim=1, keepdim=True)
    torch.testing.assert_close(made(images, null, never).double(), expected, atol=1e-5, rtol=1e-4)
    assert shares.std() > 0.01  # the share does depend on the image


def test_union_starts_at_the_plain_image():
    made = union(start="image").train()
    images, null = pair()
    assert torch.equal(made.weight(images.pooled, null.pooled), torch.ones(5, 1))
    assert torch.equal(made(images, null, never), FrozenTarget()(images, null, never))
    # and moves away from there: the last layer learns from the first step on
    made(images, null, never).sum().backward()
    assert made.union_weighted_layer[-1].weight.grad.abs().max() > 0


def test_union_share_is_not_bounded():
    made = union()
    images, null = pair()
    with torch.no_grad():
        made.union_weighted_layer[-1].bias.fill_(40.0)
    m = made.weight(images.pooled, null.pooled)
    assert (m > 30).all()
    expected = F.normalize(m * images.pooled + (1 - m) * null.pooled, dim=-1)
    torch.testing.assert_close(made(images, null, never), expected)


def test_union_dropout_acts_in_training_alone():
    made = union(dropout=0.5, encoder_dropout=0.5)
    images, null = pair()
    assert torch.equal(made(images, null, never), made(images, null, never))
    made.train()
    assert not torch.equal(made(images, null, never), made(images, null, never))
    without = union(dropout=0.0, encoder_dropout=0.0)
    torch.testing.assert_close(without.train()(images, null, never), union()(images, null, never), atol=1e-6, rtol=1e-5)


def test_union_reads_an_expanded_null_text_and_gives_gradients():
    made = union()
    images, null = pair()
    one = null.select(torch.tensor([0]))
    many = Features(one.pooled.repeat(5, 1))
    assert torch.equal(made(images, one.expand(5), never), made(images, many, never))
    made(images, one.expand(5), never)[:, 0].sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.parameters())


def test_sum_forms():
    images, null = pair()
    i, n = images.pooled.double(), null.pooled.double()
    units = i / i.norm(dim=1, keepdim=True) + n / n.norm(dim=1, keepdim=True)
    expected = {
        "normalised": units / units.norm(dim=1, keepdim=True),
        "training": units,
        "inference": (i + n) / (i + n).norm(dim=1, keepdim=True),
    }
    for form, rows in expected.items():
        torch.testing.assert_close(SumTarget(form)(images, null, never).double(), rows, atol=1e-6, rtol=1e-5)
    assert SumTarget().form == "normalised"


def test_frozen_is_the_unit_image():
    images, null = pair()
    found = FrozenTarget()(Features(5 * images.pooled), null, never)
    torch.testing.assert_close(found.double(), images.pooled.double() / images.pooled.double().norm(dim=1)[:, None])


def test_shared_is_the_query_head_with_the_null_text():
    torch.manual_seed(0)
    fusion = TransAggFusion(WIDTH, 1, 2, INNER, start="reference").eval()
    tokens = torch.randn(4, 3, WIDTH)
    zeros, ones = torch.zeros(4, dtype=torch.long), torch.ones(4, 3, dtype=torch.bool)
    images = Features(tokens[:, 0], tokens, ones, zeros)
    word = torch.randn(1, 1, WIDTH)
    null = Features(word[:, 0], word, torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, dtype=torch.long)).expand(4)
    assert torch.equal(SharedTarget()(images, null, fusion), fusion(images, null))
    assert not list(SharedTarget().parameters())
    assert SharedTarget.needs_tokens
    assert not any(h.needs_tokens for h in (FrozenTarget, SumTarget, UnionTarget))
