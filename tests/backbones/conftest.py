"""Backbones of every kind at tiny sizes, from seeded weights and words made here."""

import json

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

WORDS = ("make", "it", "red", "a", "small", "dog", "!", "two", "cats")
CLIP_CONFIG = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
NOTES = {
    "size": {"height": 32, "width": 32},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
    "resample": 3,
    "do_center_crop": False,
}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 32, "patch_size": 16}


def draw(network, seed):
    """Draw weights under which every part of a model matters; the libraries' own start is nearly constant."""
    generator = torch.Generator().manual_seed(seed)
    for name, x in sorted(network.named_parameters()):
        noise = torch.randn(x.shape, generator=generator)
        one = 1.0 if name.endswith("weight") else 0.0
        x.data = noise / x[0].numel() ** 0.5 if x.ndim > 1 else one + 0.1 * noise
    return network


def write_notes(folder, **changes):
    (folder / "preprocessor_config.json").write_text(json.dumps(NOTES | changes))


def word_tokenizer(start, end, pad):
    """A tokenizer of whole words whose texts stand between two marks."""
    specials = [mark for mark in dict.fromkeys((pad, start, end, "<unk>")) if mark]
    vocabulary = {word: number for number, word in enumerate((*specials, *WORDS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    marks = [(mark, vocabulary[mark]) for mark in (start, end) if mark]
    pattern = f"{start} $A {end}" if start else f"$A {end}"
    made.post_processor = processors.TemplateProcessing(single=pattern, special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token=end, pad_token=pad)


@pytest.fixture(scope="session")
def open_clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    network = draw(open_clip.CLIP(**CLIP_CONFIG), 1)
    save_file(
        {name: x.contiguous() for name, x in network.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "resize_mode": "squash", "size": [32, 32]}
    notes = {"model_cfg": CLIP_CONFIG, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(notes))
    return folder


@pytest.fixture(scope="session")
def blip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    text = {**SMALL, "vocab_size": len(words), "encoder_hidden_size": 64, "max_position_embeddings": 64}
    config = BlipConfig(vision_config=VISION, text_config=text, image_text_hidden_size=24)
    draw(BlipForImageTextRetrieval(config), 2).save_pretrained(folder)
    write_notes(folder)
    return folder


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    word_tokenizer("", "</s>", "<pad>").save_pretrained(folder)
    text = {**SMALL, "vocab_size": 20, "max_position_embeddings": 16, "projection_size": 64}
    draw(SiglipModel(SiglipConfig(vision_config=VISION, text_config=text)), 3).save_pretrained(folder)
    write_notes(folder, resample=2)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    # As in OpenAI's repositories, padding has the number of the end mark.
    tokenizer = word_tokenizer("<start>", "<end>", "<end>")
    tokenizer.save_pretrained(folder)
    text = {
        **SMALL,
        "vocab_size": 20,
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<start>"),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    draw(CLIPModel(CLIPConfig(vision_config=VISION, text_config=text, projection_dim=48)), 4).save_pretrained(folder)
    write_notes(folder, size={"shortest_edge": 32}, do_center_crop=True, crop_size={"height": 32, "width": 32})
    return folder
