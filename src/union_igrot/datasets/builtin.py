"""Declarations of the built-in benchmarks: splits, options, prompts, official counts and sources.

The first prompt of each benchmark is the UNION authors'; the others are named after the repository that words queries
so. Templates of repositories that learn a word for the reference image keep its mark, `$` or `*`. If a repository
averages the embeddings of several texts (SEARLE and LinCIR on FashionIQ), the prompt returns all of them.
"""

import re
from collections.abc import Mapping
from typing import Final

from union_igrot.datasets.registry import BenchmarkDeclaration, BenchmarkOption

CATEGORIES: Final = ("dress", "shirt", "toptee")
TASKS: Final = ("focus_attribute", "change_attribute", "focus_object", "change_object")
DOMAINS: Final = ("cartoon", "origami", "toy", "sculpture")
SKETCHY_SPLITS: Final = ("zeroshot1", "zeroshot0")
LEAKING_PROMPT: Final = "union_llava"
_PRESETS: Final = ("official", "union_reference")
_READERS: Final = "union_igrot.datasets"


def _blip_caption(text: str, words: int) -> str:
    """Clean a caption as BLIP does (salesforce/BLIP, data/utils.py, `pre_caption`)."""
    plain = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    return " ".join(re.sub(r"\s{2,}", " ", plain).strip(" \n").split(" ")[:words])


def _clip4cir(fields: Mapping[str, str]) -> str:
    """Join two captions as CLIP4Cir does for validation (`data_utils.py`, `generate_input_captions`)."""
    return f"{fields['c1'].strip('.?, ').capitalize()} and {fields['c2'].strip('.?, ')}"


def _both_orders(fields: Mapping[str, str]) -> tuple[str, ...]:
    """Join two captions in both orders (miccunifi/SEARLE, src/validate.py; navervision/lincir, validate.py)."""
    first, second = fields["c1"], fields["c2"]
    return f"a photo of $ that {first} and {second}", f"a photo of $ that {second} and {first}"


FASHIONIQ = BenchmarkDeclaration(
    name="fashioniq",
    reader=f"{_READERS}.composed:read_fashioniq",
    splits=("val", "train", "test"),
    options=(
        BenchmarkOption("category", str, choices=CATEGORIES, is_part=True, help="category of clothes"),
        BenchmarkOption(
            "gallery",
            str,
            "original",
            ("original", "val"),
            for_training=False,
            help="original, or val (the smaller galleries of VAL)",
        ),
        BenchmarkOption("captions", str, choices=("joined", "each"), is_setting=False),
    ),
    prompts={
        "union": "{c1} and {c2}".format_map,
        "magiclens": "{c1} and {c2}".format_map,
        "clip4cir": _clip4cir,
        "sprc": lambda fields: _blip_caption(_clip4cir(fields), 50),
        "searle": _both_orders,
        "searle_swapped": "a photo of $ that {c2} and {c1}".format_map,
        "pic2word": "a photo of * , {c2} and {c1}".format_map,
        "covr": lambda fields: _blip_caption("{c1} and {c2}".format_map(fields), 30),
    },
    prompt_fields=("c1", "c2"),
    presets=_PRESETS,
    trainable=True,
    counts={("val", "dress"): (2017, 3817), ("val", "shirt"): (2038, 6346), ("val", "toptee"): (1961, 5373)},
    summary="FashionIQ: clothes with two sentences, three categories; the targets of split test are not published.",
    source="annotations: GitHub, XiaoxiaoGuo/fashion-iq; images: its product links, many dead, or a mirror",
)
CIRR = BenchmarkDeclaration(
    name="cirr",
    reader=f"{_READERS}.composed:read_cirr",
    splits=("val", "train", "test1"),
    prompts={
        "union": lambda fields: f"find a photo that {fields['caption'].lower()}",
        "clip4cir": "{caption}".format_map,
        "transagg": lambda fields: fields["caption"].lower(),
        "searle": "a photo of $ that {caption}".format_map,
        "pic2word": "a photo of * , {caption}".format_map,
        "covr": lambda fields: _blip_caption(fields["caption"], 30),
    },
    prompt_fields=("caption",),
    presets=_PRESETS,
    trainable=True,
    counts={("val", ""): (4181, 2297), ("test1", ""): (4148, 2315)},
    summary="CIRR: natural photos with a sentence, and subsets of look-alikes; split test1 writes submission files.",
    source="annotations: GitHub, Cuberick-Orion/CIRR, branch cirr_dataset; images: NLVR2's request form",
)
CIRCO = BenchmarkDeclaration(
    name="circo",
    reader=f"{_READERS}.composed:read_circo",
    splits=("val", "test"),
    prompts={
        "union": lambda fields: f"{fields['shared_concept'].lower()} but {fields['relative_caption'].lower()}",
        "magiclens": "find {shared_concept} but {relative_caption}".format_map,
        "searle": "a photo of $ that {relative_caption}".format_map,
        "covr": "{relative_caption}".format_map,
    },
    prompt_fields=("shared_concept", "relative_caption"),
    presets=_PRESETS,
    counts={("val", ""): (220, 123_403), ("test", ""): (800, 123_403)},
    summary="CIRCO: several targets among 123,403 photos; split test writes a submission file.",
    source="annotations: GitHub, miccunifi/CIRCO; images: COCO 2017 unlabeled (19 GB), cocodataset.org",
)
GENECIS = BenchmarkDeclaration(
    name="genecis",
    reader=f"{_READERS}.composed:read_genecis",
    splits=("val",),
    options=(BenchmarkOption("task", str, choices=TASKS, is_part=True, help="task"),),
    prompts={"clip": "{condition}".format_map},
    prompt_fields=("condition",),
    presets=("official",),  # the UNION authors have no reader of it
    counts={
        ("val", "focus_attribute"): (2000, None),
        ("val", "change_attribute"): (2112, None),
        ("val", "focus_object"): (1960, None),
        ("val", "change_object"): (1960, None),
    },
    summary="GeneCIS: conditional similarity, four tasks.",
    source="annotations: GitHub, facebookresearch/genecis; images: COCO val2017 and Visual Genome",
)
LASCO = BenchmarkDeclaration(
    name="lasco",
    reader=f"{_READERS}.composed:read_lasco",
    splits=("val", "train"),
    prompts={"union": "{query_text}".format_map},
    prompt_fields=("query_text",),
    presets=_PRESETS,
    trainable=True,
    counts={("val", ""): (30_037, 39_826)},
    summary="LaSCo: generated sentences on COCO photos.",
    source="annotations: GitHub, levymsn/LaSCo; images: COCO 2014 train and val, cocodataset.org",
)
LLAVASCO = BenchmarkDeclaration(
    name="llavasco",
    reader=f"{_READERS}.composed:read_llavasco",
    splits=("val", "train"),
    options=(
        BenchmarkOption("stride", int, minimum=1, help="read every n-th row; all if null (published code: 70)"),
        BenchmarkOption(
            "limit",
            int,
            minimum=1,
            help="read this many rows at most, before the stride; all if null (published code: 350000)",
        ),
        BenchmarkOption("gallery", str, "named", ("named", "corpus"), for_training=False, is_setting=False),
    ),
    prompts={
        "union": "{relative_caption}".format_map,
        LEAKING_PROMPT: "{relative_caption} with {llava_target_caption}".format_map,
    },
    prompt_fields=("relative_caption",),
    presets=_PRESETS,
    trainable=True,
    validation_split="val",
    counts={("train", ""): (None, None), ("val", ""): (None, None)},
    summary="LlavaSCo: about 5,000 training triplets of LaSCo.",
    source="annotations: the UNION authors' Google Drive; images: COCO 2014 train and val, cocodataset.org",
)
DTIN = BenchmarkDeclaration(
    name="dtin",
    reader=f"{_READERS}.composed:read_dtin",
    splits=("val",),
    options=(
        BenchmarkOption("domain", str, choices=DOMAINS, is_part=True, help="domain of the targets"),
        BenchmarkOption(
            "recall_mode",
            str,
            choices=("fraction", "any"),
            help="recall: fraction of the targets found, or any; the preset's if null",
        ),
        BenchmarkOption("only_with_gt", bool, default=False, help="leave out queries without targets"),
    ),
    prompts={
        "union": "the similar image with {domain} style".format_map,
        "magiclens": "find this object in {domain}".format_map,
        "pic2word": "a {domain} of *".format_map,
    },
    prompt_fields=("domain",),
    presets=_PRESETS,
    counts={("val", domain): (10_000, 16_983) for domain in DOMAINS},
    summary="DTIN: ImageNet photos retrieved in another domain.",
    source="lists: GitHub, google-research/composed_image_retrieval (Pic2Word); images: ImageNet val and ImageNet-R",
)

_SKETCHY_PROMPTS: Final = {"union": "a real image of sketch".format_map, "none": "".format_map}
_NO_PROMPT: Final = {"union": "".format_map}
_ZSE_SBIR: Final = "lists and images: the archive that ZSE-SBIR's README names"
SKETCHY = BenchmarkDeclaration(
    name="sketchy",
    reader=f"{_READERS}.sbir:read_sketchy",
    splits=SKETCHY_SPLITS,
    prompts=_SKETCHY_PROMPTS,
    prompt_fields=("class",),
    presets=_PRESETS,
    counts={("zeroshot1", ""): (15_229, 17_101), ("zeroshot0", ""): (12_694, 12_553)},
    summary="Sketchy, zero-shot: 25 (zeroshot1) or 21 (zeroshot0) unseen classes.",
    source=_ZSE_SBIR,
)
TUBERLIN = BenchmarkDeclaration(
    name="tuberlin",
    reader=f"{_READERS}.sbir:read_tuberlin",
    splits=("test",),
    prompts=_NO_PROMPT,
    prompt_fields=("class",),
    presets=_PRESETS,
    counts={("test", ""): (2_400, 27_989)},
    summary="TU-Berlin, zero-shot: 30 unseen classes.",
    source=_ZSE_SBIR,
)
QUICKDRAW = BenchmarkDeclaration(
    name="quickdraw",
    reader=f"{_READERS}.sbir:read_quickdraw",
    splits=("test",),
    prompts=_NO_PROMPT,
    prompt_fields=("class",),
    presets=_PRESETS,
    counts={("test", ""): (92_291, 54_151)},
    summary="QuickDraw-Extended, zero-shot: 30 unseen classes.",
    source=_ZSE_SBIR,
)
TRAINING_SKETCHY = BenchmarkDeclaration(
    name="training_sketchy",
    reader=f"{_READERS}.sbir:read_training_sketchy",
    splits=("train",),
    options=(
        BenchmarkOption("lists", str, "zeroshot1", SKETCHY_SPLITS, help="training classes of: zeroshot1 or zeroshot0"),
        BenchmarkOption("build", int, minimum=1, help="number of pairs to draw; the authors' file if null"),
        BenchmarkOption("seed", int, 0, help="seed of the drawn pairs"),
    ),
    prompts=_SKETCHY_PROMPTS,
    prompt_fields=("class",),
    presets=_PRESETS,
    trainable=True,
    folder="sketchy",
    counts={("train", ""): (5_000, None)},
    summary="Training-Sketchy: 5,000 sketch and photo pairs.",
    source="triplets: the UNION authors' Google Drive, or data.build=5000; images: as for sketchy",
)
BUILTIN: Final = (
    FASHIONIQ,
    CIRR,
    CIRCO,
    GENECIS,
    LASCO,
    LLAVASCO,
    DTIN,
    SKETCHY,
    TUBERLIN,
    QUICKDRAW,
    TRAINING_SKETCHY,
)
