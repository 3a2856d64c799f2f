import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from union_igrot.errors import CheckpointError, ConfigError
from union_igrot.models.backbones.open_clip import OPENAI_MEAN, OPENAI_STD, OpenClipBackbone
from union_igrot.models.heads.query import TransAggFusion
from union_igrot.models.heads.target import UnionTarget
from union_igrot.models.reference import load_reference_checkpoint
from union_igrot.training.losses import info_nce
from union_igrot.types import Preprocess

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SHARED = HERE / "../../shared/golden"
TEXTS = (
    "make it red",
    "",
    "is a small dog but with a hat, and it sits on the left of the green sofa",
    "two cats instead of one " * 30,
)
# embed, image, vision layers, vision width, patch, context, vocabulary, text width, text heads, text layers
SIZES = {
    "mini": (64, 32, 2, 64, 16, 77, 49408, 64, 2, 2),
    "clip_base": (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12),
}

SMALL = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"width": 64, "heads": 1, "layers": 2},
}


def draw(key, shape):
    """The rule by which the golden weights were drawn."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    x = rng.standard_normal(shape, dtype=np.float32)
    if not shape:
        return torch.tensor(4.6)
    if len(shape) == 1:
        return torch.from_numpy((0.02 * x + (1.0 if key.endswith("weight") else 0.0)).astype(np.float32))
    return torch.from_numpy((x / np.sqrt(np.prod(shape[1:]))).astype(np.float32))


def layer_shapes(prefix, width):
    return {
        f"{prefix}.attn.in_proj_weight": (3 * width, width),
        f"{prefix}.attn.in_proj_bias": (3 * width,),
        f"{prefix}.attn.out_proj.weight": (width, width),
        f"{prefix}.attn.out_proj.bias": (width,),
        f"{prefix}.ln_1.weight": (width,),
        f"{prefix}.ln_1.bias": (width,),
        f"{prefix}.mlp.c_fc.weight": (4 * width, width),
        f"{prefix}.mlp.c_fc.bias": (4 * width,),
        f"{prefix}.mlp.c_proj.weight": (width, 4 * width),
        f"{prefix}.mlp.c_proj.bias": (width,),
        f"{prefix}.ln_2.weight": (width,),
        f"{prefix}.ln_2.bias": (width,),
    }


def clip_shapes(embed, image, layers, width, patch, context, vocabulary, text_width, _, text_layers):
    shapes = {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": ((image // patch) ** 2 + 1, width),
        "visual.proj": (width, embed),
        "visual.conv1.weight": (width, 3, patch, patch),
        "token_embedding.weight": (vocabulary, text_width),
        "positional_embedding": (context, text_width),
        "text_projection": (text_width, embed),
        "logit_scale": (),
        "ln_final.weight": (text_width,),
        "ln_final.bias": (text_width,),
    }
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{norm}.weight": (width,), f"visual.{norm}.bias": (width,)}
    for number in range(layers):
        shapes |= layer_shapes(f"visual.transformer.resblocks.{number}", width)
    for number in range(text_layers):
        shapes |= layer_shapes(f"transformer.resblocks.{number}", text_width)
    return shapes


def head_shapes(d, inner=512):
    shapes = {
        "sep_token": (1, 1, d),
        "t5_layers.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 8),
        "t5_layers.final_layer_norm.weight": (d,),
    }
    linear = {
        "combiner_layer": (8 * d, 2 * d),
        "output_layer": (d, 8 * d),
        "weighted_layer": (3, d),
        "union_weighted_layer.0": (4 * d, 2 * d),
        "union_weighted_layer.3": (d, 4 * d),
        "union_weighted_layer.6": (1, d),
    }
    for n in range(2):
        part = f"fusion.layers.{n}"
        linear |= {
            f"{part}.self_attn.out_proj": (d, d),
            f"{part}.linear1": (2048, d),
            f"{part}.linear2": (d, 2048),
        }
        shapes |= {f"{part}.self_attn.in_proj_weight": (3 * d, d), f"{part}.self_attn.in_proj_bias": (3 * d,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{part}.{norm}.weight": (d,), f"{part}.{norm}.bias": (d,)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for n in range(4):
        part = f"t5_layers.block.{n}.layer"
        shapes |= {f"{part}.0.SelfAttention.{x}.weight": (inner, d) for x in "qkv"}
        shapes |= {
            f"{part}.0.SelfAttention.o.weight": (d, inner),
            f"{part}.0.layer_norm.weight": (d,),
            f"{part}.1.DenseReluDense.wi.weight": (2048, d),
            f"{part}.1.DenseReluDense.wo.weight": (d, 2048),
            f"{part}.1.layer_norm.weight": (d,),
        }
    return shapes


def golden_state(name):
    sizes = SIZES[name]
    shapes = {f"model.{key}": shape for key, shape in clip_shapes(*sizes).items()} | head_shapes(sizes[0])
    return {key: draw(key, shape) for key, shape in shapes.items()}


def golden_images(name):
    px = SIZES[name][1]
    rng = np.random.default_rng(7)
    return [torch.from_numpy(rng.standard_normal((4, 3, px, px), dtype=np.float32)) for _ in range(2)]


@pytest.fixture(scope="module")
def mini():
    return golden_state("mini")


def close(found, expected, within=1e-5):
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=within, rtol=0)


@torch.no_grad()
def compare(state, golden, images_and_targets, name):
    """Compare every array of a golden file."""
    images, targets = images_and_targets
    checked = set()

    def check(key, found, within=1e-5):
        close(found, golden[key], within)
        checked.add(key)

    union = load_reference_checkpoint(state, model="base", target="union")
    frozen = load_reference_checkpoint(state, model=union.backbone, target="frozen")
    summed = load_reference_checkpoint(state, model=union.backbone, target="sum")
    legacy = load_reference_checkpoint(state, model=union.backbone, target="frozen", mask="legacy")
    image, text = union.backbone.encode_image(targets), union.backbone.encode_text(list(TEXTS))
    check("token_ids", union.backbone.tokenize(list(TEXTS)).int())
    check("image_pooled", image.pooled)
    check("image_tokens", image.tokens)
    check("text_pooled", text.pooled)
    check("text_tokens", text.tokens)
    query = union.embed_queries(images, list(TEXTS))
    check("query", query)
    for training in (False, True):  # dropout aside, the mask does not depend on the mode
        legacy.train(training)
        legacy.fusion.dropout.eval()
        for layer in legacy.fusion.fusion.layers:
            layer.dropout.eval()
            layer.self_attn.dropout = 0.0
        check("query_padding_plus_one", legacy.embed_queries(images, list(TEXTS)))
    check("union_target", union.embed_gallery(targets))
    check("union_query", union.target(union.backbone.encode_image(images), text, union.fusion))
    for kind, model in (("original", frozen), ("sum", summed), ("union", union)):
        embedded = model.embed_gallery(targets)
        check(f"logits_{kind}", 100 * query @ embedded.T, 1e-2)
        check(f"loss_{kind}", info_nce(query, embedded, torch.arange(4)), 1e-3)
    assert checked == set(golden.files), f"{name}: an array was not compared"


def test_the_mini_reference_is_matched_array_by_array(mini):
    with np.load(HERE / "golden/mini.npz") as golden:
        compare(mini, golden, golden_images("mini"), "mini")


def test_the_reference_on_vit_b_32_is_matched_array_by_array():
    path = SHARED / "clip_base.npz"
    if not path.is_file():
        pytest.skip("needs the shared golden file clip_base.npz (1 MB), which is not in the repository")
    with np.load(path) as golden:
        compare(golden_state("clip_base"), golden, golden_images("clip_base"), "clip_base")


@pytest.mark.parametrize(
    ("width", "heads", "transagg", "union", "t5"),
    [
        (256, 8, 4_206_339, 787_969, 6_294_016),
        (512, 8, 12_602_883, 3_148_801, 12_587_776),
        (768, 12, 25_193_731, 7_082_497, 22_027_392),
    ],
)
def test_parameter_counts_are_the_references(width, heads, transagg, union, t5):
    def count(module):
        return sum(x.numel() for x in module.parameters())

    with torch.device("meta"):
        fusion = TransAggFusion(width, start="reference")
        target = UnionTarget(width, heads=heads, start="reference")
    assert count(fusion) == transagg
    assert count(target.union_weighted_layer) == union
    assert count(target.t5_layers) == t5


@torch.no_grad()
def test_a_file_in_half_precision_with_wrappers_and_embedding_table_loads(mini, tmp_path):
    path = tmp_path / "reference.pth"
    state = {f"module.{key}": x.half() for key, x in mini.items()}
    state["module.t5_layers.embed_tokens.weight"] = torch.zeros(10, 64)
    state["module.model.input_resolution"] = torch.tensor(32)
    torch.save({"state_dict": state}, path)
    model = load_reference_checkpoint(path, model="base")
    assert {x.dtype for x in model.parameters()} == {torch.float32}
    with np.load(HERE / "golden/mini.npz") as golden:
        close(model.embed_gallery(golden_images("mini")[1]), golden["union_target"], 5e-3)
    assert model.preprocess == Preprocess(32, OPENAI_MEAN, OPENAI_STD, fit="pad")
    assert not model.training


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["pretrained_model.", "blip_model."])
def test_transagg_checkpoints_have_no_target_head(mini, prefix):
    state = {key.replace("model.", prefix, 1): x for key, x in mini.items()}
    state = {key: x for key, x in state.items() if not key.startswith(("t5_layers", "union_weighted_layer"))}
    with pytest.raises(CheckpointError, match="target=frozen"):
        load_reference_checkpoint(state, target="union")
    model = load_reference_checkpoint(state, target="frozen")
    images, targets = golden_images("mini")
    with np.load(HERE / "golden/mini.npz") as golden:
        close(model.embed_queries(images, list(TEXTS)), golden["query"])
    torch.testing.assert_close(model.embed_gallery(targets).norm(dim=1), torch.ones(4))


@torch.no_grad()
def test_both_sums_of_the_reference(mini):
    _, targets = golden_images("mini")
    training = load_reference_checkpoint(mini, target="sum")
    inference = load_reference_checkpoint(mini, target="sum", sum_form="inference")
    image, null = training.backbone.encode_image(targets).pooled, training.backbone.encode_text([""]).pooled
    torch.testing.assert_close(training.embed_gallery(targets), F.normalize(image, dim=-1) + F.normalize(null, dim=-1))
    torch.testing.assert_close(inference.embed_gallery(targets), F.normalize(image + null, dim=-1))


@torch.no_grad()
def test_the_text_towers_heads_can_be_given(mini):
    texts = list(TEXTS)
    with np.load(HERE / "golden/mini.npz") as golden:
        right = load_reference_checkpoint(mini, text_heads=2).backbone.encode_text(texts).pooled
        close(right, golden["text_pooled"])
    other = load_reference_checkpoint(mini, text_heads=1).backbone.encode_text(texts).pooled
    assert (other - right).abs().max() > 0.1


def test_a_given_backbone_gets_the_files_weights(mini):
    backbone = OpenClipBackbone(SMALL, Preprocess(32, OPENAI_MEAN, OPENAI_STD), "mine")
    before = backbone.fingerprint()
    model = load_reference_checkpoint(mini, model=backbone)
    assert model.backbone is backbone
    assert backbone.fingerprint() != before
    assert torch.equal(backbone.network.visual.proj, mini["model.visual.proj"])


def test_missing_unknown_and_ill_shaped_tensors_are_listed(mini):
    cases = [
        ({"sep_token": None}, r"missing \[sep_token\]"),
        ({"fusion.layers.0.linear1.weight": None}, r"misses fusion\.layers\.0\.linear1\.weight"),
        ({"model.ln_final.bias": None}, r"missing \[ln_final\.bias\]"),
        ({"model.visual.extra": torch.zeros(1)}, r"not known \[visual\.extra\]"),
        ({"stray": torch.zeros(1)}, r"does not know: \[stray\]"),
        ({"weighted_layer.bias": torch.zeros(4)}, r"weighted_layer\.bias \(4,\) for \(3,\)"),
        ({"t5_layers.block.1.layer.0.layer_norm.weight": None}, r"missing \[t5_layers\.block\.1"),
        ({"model.visual.proj": None}, r"missing \[visual\.proj\]"),
        ({"model.positional_embedding": None}, "positional_embedding"),
    ]
    for change, message in cases:
        state = {key: x for key, x in (mini | change).items() if x is not None}
        with pytest.raises(CheckpointError, match=message):
            load_reference_checkpoint(state)


def test_other_files_are_refused(mini, tmp_path):
    heads = {key: x for key, x in mini.items() if not key.startswith("model.")}
    with pytest.raises(CheckpointError, match="no backbone"):
        load_reference_checkpoint(heads)
    with pytest.raises(CheckpointError, match="no heads"):
        load_reference_checkpoint({key: x for key, x in mini.items() if key.startswith("model.")})
    with pytest.raises(CheckpointError, match="neither CLIP"):
        load_reference_checkpoint({"model.other": torch.zeros(1), **heads})
    with pytest.raises(ConfigError, match="holds a CLIP, but model='blip'"):
        load_reference_checkpoint(mini, model="blip")
    with pytest.raises(ConfigError, match="not OpenCLIP's"):
        load_reference_checkpoint(mini, model="tiny")
    with pytest.raises(CheckpointError, match="is not a file"):
        load_reference_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="no state dict"):
        load_reference_checkpoint({})


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("boom"),))


def test_a_file_with_code_in_it_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state": Bomb()}, "bad.pth")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        load_reference_checkpoint("bad.pth")
    assert not Path("boom").exists()
