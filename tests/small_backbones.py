"""Backbones of every kind at tiny sizes: configurations, seeded weights and words made here."""

import json
from copy import deepcopy

import open_clip
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
)

WORDS = ("make", "it", "red", "a", "small", "dog", "!", "two", "cats")
CLIP_CONFIG = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
SIGLIP_CONFIG = {
    "embed_dim": 64,
    "custom_text": True,
    "init_logit_bias": -10,
    "vision_cfg": {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 20,
        "hf_tokenizer_name": "some/words",
        "width": 64,
        "heads": 2,
        "layers": 2,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    },
}
RESNET_CONFIG = {
    "embed_dim": 48,
    "custom_text": True,
    "vision_cfg": {"image_size": 64, "layers": [2, 2, 2, 2], "width": 8},
    "text_cfg": {
        "context_length": 20,
        "hf_model_name": "some/roberta",
        "hf_tokenizer_name": "some/roberta",
        "hf_proj_type": "mlp",
        "hf_pooler_type": "mean_pooler",
    },
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


def write_open_clip(folder, config, seed):
    """A folder as OpenCLIP writes it."""
    options = {key: value for key, value in deepcopy(config).items() if key != "custom_text"}
    if "hf_model_name" in config["text_cfg"]:
        options["text_cfg"] |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
    network = (open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP)(**options)
    state = {name: x.contiguous() for name, x in draw(network, seed).state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    size = config["vision_cfg"]["image_size"]
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "resize_mode": "squash", "size": [size, size]}
    notes = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(notes))
    return folder
