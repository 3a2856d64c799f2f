import pytest
import torch
from transformers import BlipConfig, BlipForImageTextRetrieval

from union_igrot.errors import CheckpointError, ConfigError
from union_igrot.models.backbones.hf import BlipBackbone
from union_igrot.models.backbones.open_clip import OPENAI_MEAN, OPENAI_STD, OpenClipBackbone
from union_igrot.models.heads.query import TransAggFusion
from union_igrot.models.heads.target import UnionTarget
from union_igrot.models.reference import load_reference_checkpoint, rename_blip
from union_igrot.types import Preprocess

CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"width": 64, "heads": 1, "layers": 1},
}
ORIGINAL_BLIP = [
    ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
    ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
    ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
    ("vision_model.post_layernorm", "visual_encoder.norm"),
    ("vision_model.encoder.layers", "visual_encoder.blocks"),
    (".layer_norm1", ".norm1"),
    (".layer_norm2", ".norm2"),
    (".self_attn.qkv", ".attn.qkv"),
    (".self_attn.projection", ".attn.proj"),
]


def words_file(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "make", "it", "red", "##der"]
    path = folder / "vocab.txt"
    path.write_text("\n".join(words) + "\n")
    return path


def tiny_blip():
    vision = {"hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 1,
        "vocab_size": 11,
        "encoder_hidden_size": 128,
        "max_position_embeddings": 40,
        "layer_norm_eps": 1e-12,
    }
    torch.manual_seed(0)
    config = BlipConfig(
        vision_config={**vision, "image_size": 32, "patch_size": 16, "layer_norm_eps": 1e-6},
        text_config=text,
        image_text_hidden_size=64,
    )
    return BlipForImageTextRetrieval(config).eval()


def blip_state(network):
    """A reference file with a BLIP: the original names, and everything that is to be dropped."""
    state = TransAggFusion(64).state_dict() | UnionTarget(64).state_dict()
    for name, x in network.state_dict().items():
        original = name
        for ours, theirs in ORIGINAL_BLIP:
            original = original.replace(ours, theirs) if name.startswith("vision_model") else original
        state[f"model.{original}"] = x
    dropped = ["visual_encoder_m.cls_token", "text_encoder_m.embeddings.LayerNorm.bias", "vision_proj_m.bias"]
    dropped += ["text_proj_m.weight", "image_queue", "text_queue", "idx_queue", "ptr_queue", "temp"]
    return state | {f"model.{name}": torch.zeros(2) for name in dropped}


@torch.no_grad()
def test_a_blip_of_the_reference_loads_under_its_original_names(tmp_path):
    network = tiny_blip()
    state = blip_state(network)
    assert "model.visual_encoder.blocks.1.attn.proj.weight" in state
    assert "model.text_encoder.encoder.layer.0.crossattention.self.query.weight" in state
    model = load_reference_checkpoint(state, model="blip", tokenizer=words_file(tmp_path))
    assert isinstance(model.backbone, BlipBackbone)
    images = torch.randn(2, 3, 32, 32)
    image = network.vision_proj(network.vision_model(images).last_hidden_state)
    torch.testing.assert_close(model.backbone.encode_image(images).tokens, image, atol=1e-6, rtol=0)
    ids = torch.tensor([[2, 7, 8, 9, 10, 3] + [0] * 29])
    text = network.text_proj(network.text_encoder(ids, attention_mask=(ids != 0).long()).last_hidden_state)
    torch.testing.assert_close(model.backbone.encode_text(["Make it redder"]).tokens, text, atol=1e-6, rtol=0)
    assert model.embed_queries(images, ["make it", None]).shape == (2, 64)
    assert model.preprocess == Preprocess(32, OPENAI_MEAN, OPENAI_STD, fit="pad")


def test_a_blip_needs_its_word_list_and_its_own_name(tmp_path, monkeypatch):
    state = blip_state(tiny_blip())
    with pytest.raises(ConfigError, match="holds a BLIP, but model='base'"):
        load_reference_checkpoint(state, model="base")
    clip = OpenClipBackbone(CLIP, Preprocess(32, OPENAI_MEAN, OPENAI_STD), "mine")
    with pytest.raises(ConfigError, match="holds a BLIP, but the backbone given is a OpenClipBackbone"):
        load_reference_checkpoint(state, model=clip)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    with pytest.raises(CheckpointError, match="tokenizer=PATH"):
        load_reference_checkpoint(state, model="blip")
    del state["model.visual_encoder.pos_embed"]
    with pytest.raises(CheckpointError, match="position_embedding"):
        load_reference_checkpoint(state, model="blip", tokenizer=words_file(tmp_path))


def test_renaming_blip_keeps_the_text_encoder_as_it_is():
    names = ["text_encoder.encoder.layer.0.attention.self.query.weight", "text_proj.bias", "vision_proj.weight"]
    assert list(rename_blip(dict.fromkeys(names, torch.zeros(1)))) == names
