"""Each kind of tower: pooled is OpenCLIP's own, a token is the output of the tower's own head for it alone."""

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, M2M100Config, MT5Config, RobertaConfig

from small_backbones import CLIP_CONFIG, RESNET_CONFIG, SMALL, draw
from union_igrot.errors import ConfigError
from union_igrot.models.backbones.open_clip import OPENAI_MEAN, OPENAI_STD, OpenClipBackbone
from union_igrot.models.backbones.towers import UnsupportedTowerError, before_padding, image_tower
from union_igrot.types import Preprocess

TEXTS = ["make it red", "", "wow! a dog!", "two cats instead of one " * 30]
OWN = CLIP_CONFIG["vision_cfg"]
COCA = {
    "embed_dim": 32,
    "custom_text": True,
    "multimodal_cfg": {"context_length": 19, "width": 64, "heads": 2, "layers": 1},
    "vision_cfg": {**OWN, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": {"context_length": 19, "width": 64, "heads": 2, "layers": 2, "embed_cls": True, "output_tokens": True},
}


def timm(name, pool="", proj="linear", size=32, **text):
    """An image tower of timm beside a text tower of OpenCLIP."""
    vision = {"image_size": size, "timm_model_name": name, "timm_pool": pool, "timm_proj": proj}
    own = {"context_length": 20, "width": 64, "heads": 2, "layers": 1, **text}
    return {"embed_dim": 64, "custom_text": True, "vision_cfg": vision, "text_cfg": own}


def clip(vision=None, text=None, **more):
    return CLIP_CONFIG | {"vision_cfg": OWN | (vision or {}), "text_cfg": CLIP_CONFIG["text_cfg"] | (text or {})} | more


# Configuration, image tokens, text tokens (20 positions, or 19, one more if the pooled embedding is apart).
CLIPA = clip({"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}, {"pool_type": "last"})
slow = pytest.mark.slow
TOWERS = [
    pytest.param(clip(), 5, 20, id="plain"),
    pytest.param(clip({"pool_type": "avg"}, {"pool_type": "first"}), 5, 20, id="average"),
    pytest.param(CLIPA, 5, 21, id="clipa"),
    pytest.param(COCA, 6, 20, id="coca"),
    pytest.param(RESNET_CONFIG | {"text_cfg": clip()["text_cfg"]}, 5, 20, id="resnet"),
    pytest.param(timm("test_vit", "map", "none"), 5, 20, id="siglip"),
    pytest.param(timm("test_vit", "token", None, no_causal_mask=True), 5, 20, id="mobileclip b"),
    pytest.param(timm("test_vit", "avg", "mlp"), 5, 20, id="timm average"),
    pytest.param(timm("test_convnext", "", "mlp", 64), 5, 20, id="convnext"),
    pytest.param(timm("test_vit3", "map", "linear", 160), 102, 20, id="timm map with prefix", marks=slow),
    pytest.param(timm("vit_medium_patch16_gap_256", size=256), 257, 20, id="gap", marks=slow),
    pytest.param(timm("vit_relpos_medium_patch16_cls_224", size=224), 197, 20, id="relpos", marks=slow),
    pytest.param(timm("swin_tiny_patch4_window7_224", size=224), 50, 20, id="swin", marks=slow),
    pytest.param(timm("fastvit_mci0", "avg", None, 256), 65, 20, id="mobileclip s", marks=slow),
    pytest.param(timm("vitamin_small_224", size=224), 197, 20, id="vitamin", marks=slow),
    pytest.param(timm("eva02_tiny_patch14_224", "token", None, 224), 257, 20, id="eva", marks=slow),
    pytest.param(timm("vit_pe_core_tiny_patch16_384", "map", None, 384), 578, 20, id="pe", marks=slow),
]


def built(config):
    torch.manual_seed(0)
    preprocess = Preprocess(config["vision_cfg"]["image_size"], OPENAI_MEAN, OPENAI_STD)
    backbone = OpenClipBackbone(config, preprocess, "mine")
    draw(backbone.network, 7)
    return backbone


def pixels(config, count=2):
    size = config["vision_cfg"]["image_size"]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def same(found, expected):
    scale = expected.abs().max().clamp(min=1.0)
    torch.testing.assert_close(found / scale, expected / scale, atol=2e-5, rtol=1e-4)


def alone(visual, images):
    """Yield the output of the tower's own head for each of its last tokens alone."""
    name = type(visual).__name__
    if name == "VisionTransformer":
        x = visual.transformer(visual._embeds(images))
        before = 1 if visual.attn_pool is None and visual.pool_type == "avg" else 0
        for at in range(before, x.shape[1]):
            pooled, _ = visual._pool(torch.cat([x[:, :before], x[:, at : at + 1]], dim=1))
            yield pooled @ visual.proj
        return
    if name == "ModifiedResNet":
        x = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images))))).flatten(2).permute(2, 0, 1)
        pool = visual.attnpool
        positions = torch.cat([x.mean(0, keepdim=True), x]) + pool.positional_embedding[:, None]
        for at in range(1, len(positions)):
            yield attended(pool, positions[:1], positions[at : at + 1])
        return
    x, trunk = visual.trunk.forward_features(images), visual.trunk
    if x.ndim == 4:
        channels_last = x.shape[-1] == trunk.num_features and x.shape[1] != trunk.num_features
        for row in range(x.shape[1 if channels_last else 2]):
            for column in range(x.shape[2 if channels_last else 3]):
                rows, columns = slice(row, row + 1), slice(column, column + 1)
                one = x[:, rows, columns] if channels_last else x[:, :, rows, columns]
                yield visual.head(trunk.forward_head(one))
        return
    averaged = trunk.global_pool == "avg" or (trunk.global_pool == "map" and type(trunk).__name__ != "Eva")
    before = trunk.num_prefix_tokens if averaged and not getattr(trunk, "pool_include_prefix", False) else 0
    for at in range(before, x.shape[1]):
        yield visual.head(trunk.forward_head(torch.cat([x[:, :before], x[:, at : at + 1]], dim=1)))


def attended(pool, query_token, known):
    """The published attention pooling over one position, whatever the query is."""
    output, _ = F.multi_head_attention_forward(
        query=query_token,
        key=known,
        value=known,
        embed_dim_to_check=known.shape[-1],
        num_heads=pool.num_heads,
        q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight,
        v_proj_weight=pool.v_proj.weight,
        in_proj_weight=None,
        in_proj_bias=torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]),
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=pool.c_proj.weight,
        out_proj_bias=pool.c_proj.bias,
        use_separate_proj_weight=True,
        training=False,
        need_weights=False,
    )
    return output[0]


@torch.no_grad()
@pytest.mark.parametrize(("config", "n_image", "n_text"), TOWERS)
def test_pooled_is_that_of_the_library_and_a_token_the_output_of_the_head_for_it_alone(config, n_image, n_text):
    backbone, images = built(config), pixels(config)
    image, text = backbone.encode_image(images), backbone.encode_text(TEXTS)
    ids = backbone.tokenize(TEXTS)
    same(image.pooled, backbone.network.encode_image(images))
    same(text.pooled, backbone.network.encode_text(ids))
    assert image.tokens.shape == (2, n_image, backbone.dim)
    assert text.tokens.shape == (4, n_text, backbone.dim)
    same(image.tokens[torch.arange(2), image.pooled_at], image.pooled)
    same(text.tokens[torch.arange(4), text.pooled_at], text.pooled)
    apart = n_text - ids.shape[1]
    assert text.mask.sum(1).tolist() == [apart + words for words in (5, 2, 7, ids.shape[1])]
    expected = torch.stack(list(alone(backbone.network.visual, images)), dim=1)
    same(image.tokens[:, n_image - expected.shape[1] :], expected)
    assert n_image - expected.shape[1] in (0, 1)  # before them is only the pooled embedding


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "text", [{"embed_cls": True}, {"pool_type": "last"}, {"pool_type": "first"}], ids=lambda text: next(iter(text))
)
def test_a_text_token_passes_the_final_norm_and_the_projection(text):
    backbone = built(clip(None, text, custom_text=True))
    tower, ids = backbone.network.text, backbone.tokenize(TEXTS)
    x, mask = tower._embeds(ids)
    expected = (tower.ln_final(tower.transformer(x, attn_mask=mask)) @ tower.text_projection)[:, :20]
    same(backbone.encode_text(TEXTS).tokens[:, -20:], expected)


HF = {"context_length": 12, "hf_tokenizer_name": "", "hf_proj_type": "mlp"}
BERT = {**SMALL, "vocab_size": 50000, "max_position_embeddings": 40}
MT5 = {"vocab_size": 50000, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
M2M = {"vocab_size": 50000, "d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("made", "pooler", "apart"),
    [
        (RobertaConfig(**BERT, pad_token_id=0), "mean_pooler", 1),
        (MT5Config(**MT5), "mean_pooler", 1),
        (M2M100Config(**M2M, pad_token_id=0, decoder_layers=1), "cls_pooler", 0),
        (BertConfig(**BERT), "cls_last_hidden_state_pooler", 0),
    ],
    ids=["roberta", "mt5", "nllb", "bert"],
)
def test_text_towers_of_hugging_face(tmp_path, made, pooler, apart):
    made.save_pretrained(tmp_path)
    text = {**HF, "hf_model_name": str(tmp_path), "hf_pooler_type": pooler}
    backbone = built({"embed_dim": 32, "vision_cfg": OWN, "text_cfg": text})
    ids, tower = backbone.tokenize(TEXTS), backbone.network.text
    features = backbone.encode_text(TEXTS)
    same(features.pooled, backbone.network.encode_text(ids))
    hidden = tower.transformer(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    same(features.tokens[:, apart:], tower.proj(hidden))
    assert features.mask.sum(1).tolist() == [apart + words for words in (5, 2, 7, 12)]


def test_padding_goes_by_position():
    ids = torch.tensor([[5, 0, 7, 1, 0, 0], [1, 1, 1, 1, 1, 1], [3, 4, 5, 6, 7, 1], [0, 0, 0, 0, 0, 0]])
    assert before_padding(ids, 0, padding_is_end=False).sum(1).tolist() == [4, 6, 6, 0]
    assert before_padding(ids, 1, padding_is_end=True).sum(1).tolist() == [6, 1, 6, 6]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (clip({"pool_type": "none"}), "has no single embedding"),
        (clip({"attentional_pool": "parallel"}), "has no single embedding"),
        (clip(None, {"pool_type": "none"}, custom_text=True), "pools its texts by 'none'"),
        (timm("test_convnext", "abs_attn", "", 64), "over positions"),
    ],
)
def test_heads_that_cannot_read_one_token_are_refused(config, message):
    with pytest.raises(ConfigError, match=message) as error:
        OpenClipBackbone(config, Preprocess(32, OPENAI_MEAN, OPENAI_STD), "mine")
    assert "choose another architecture" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pooler_with_weights_of_its_own_is_refused(tmp_path):
    BertConfig(**BERT).save_pretrained(tmp_path)
    text = {**HF, "hf_model_name": str(tmp_path), "hf_pooler_type": "cls_pooler"}
    with pytest.raises(ConfigError, match="pools its texts by ClsPooler of BertModel"):
        built({"embed_dim": 32, "vision_cfg": OWN, "text_cfg": text})


def test_a_tower_of_another_kind_is_refused():
    with pytest.raises(UnsupportedTowerError, match="an image tower of Linear"):
        image_tower(torch.nn.Linear(2, 2))
