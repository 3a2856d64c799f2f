"""Backbones of every kind at tiny sizes, from seeded weights and words made here."""

import pytest
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    RobertaConfig,
    SiglipConfig,
    SiglipModel,
)

from small_backbones import (
    CLIP_CONFIG,
    RESNET_CONFIG,
    SIGLIP_CONFIG,
    SMALL,
    VISION,
    WORDS,
    draw,
    word_tokenizer,
    write_notes,
    write_open_clip,
)


@pytest.fixture(scope="session")
def open_clip_folder(tmp_path_factory):
    return write_open_clip(tmp_path_factory.mktemp("open_clip"), CLIP_CONFIG, 1)


@pytest.fixture(scope="session")
def open_clip_siglip_folder(tmp_path_factory):
    """An image tower of timm that pools by attention, texts pooled at the last place, padding that is the end mark."""
    folder = tmp_path_factory.mktemp("open_clip_siglip")
    word_tokenizer("", "</s>", "</s>").save_pretrained(folder)
    return write_open_clip(folder, SIGLIP_CONFIG, 5)


@pytest.fixture(scope="session")
def open_clip_resnet_folder(tmp_path_factory):
    """A ResNet with attention pooling, and a text tower of Hugging Face that is averaged."""
    folder = tmp_path_factory.mktemp("open_clip_resnet")
    tokenizer = word_tokenizer("<s>", "</s>", "<pad>")
    tokenizer.save_pretrained(folder)
    text = {**SMALL, "vocab_size": 20, "max_position_embeddings": 40, "type_vocab_size": 1}
    marks = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1, "eos_token_id": 2}
    RobertaConfig(**text, **marks).save_pretrained(folder)
    return write_open_clip(folder, RESNET_CONFIG, 6)


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
