"""Declarations of the built-in benchmarks: splits, options, prompts, official counts and sources.

The first prompt of each benchmark is the UNION authors'; the others are named after the repository that words queries
so. Templates of repositories that learn a word for the reference image keep its mark, `$` or `*`. If a repository
averages the embeddings of several texts (SEARLE and LinCIR on FashionIQ), the prompt returns all of them.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from union_igrot.datasets.registry import BenchmarkDeclaration, BenchmarkOption, Template

CATEGORIES: Final = ("dress", "shirt", "toptee")
TASKS: Final = ("focus_attribute", "change_attribute", "focus_object", "change_object")
ATTRIBUTES: Final = ("color", "context", "density", "existence", "quantity", "shape")
DOMAINS: Final = ("cartoon", "origami", "toy", "sculpture")
GENERALIZED: Final = ("all_seen", "seen_fifth", "seen_classes")
SKETCHY_SPLITS: Final = ("zeroshot1", "zeroshot0")
LEAKING_PROMPT: Final = "union_llava"
_PRESETS: Final = ("official", "union_reference")
_READERS: Final = "union_igrot.datasets"
_TARGETS: Final = BenchmarkOption(
    "targets", str, for_training=False, help="file of SoFT in the folder that lists several targets of a query"
)


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
        BenchmarkOption("spelling", bool, default=False, help="correct captions by DQU-CIR's correction_dict files"),
        _TARGETS,
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
    summary="FashionIQ: clothes with two texts per pair, three categories; targets of split test are not public.",
    source="annotations: GitHub, XiaoxiaoGuo/fashion-iq; images: its product links, many dead, or a mirror",
)
CIRR = BenchmarkDeclaration(
    name="cirr",
    reader=f"{_READERS}.composed:read_cirr",
    splits=("val", "train", "test1"),
    options=(_TARGETS,),
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
    summary="CIRR: natural photos with a text, and subsets of look-alikes; split test1 writes submission files.",
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
    summary="LaSCo: generated texts on COCO photos.",
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


def _freedom(name: str, queries: int, gallery: int | None, summary: str, images: str) -> BenchmarkDeclaration:
    """Declare a dataset of the FREEDOM suite; `queries` counts pairs of an image and another domain."""
    return BenchmarkDeclaration(
        name=name,
        reader=f"{_READERS}.conversion:read_{name}",
        splits=("test",),
        prompts={"freedom": "{domain}".format_map, "photo": "a {domain} photo".format_map},
        prompt_fields=("domain",),
        folder="dtin" if name == "imagenet_r" else None,
        counts={("test", ""): (queries, gallery)},
        summary=summary,
        source=f"lists: GitHub, NikosEfth/freedom (MIT); images: {images}",
    )


NICO = _freedom("nico", 43_615, 80_134, "NICO++ of FREEDOM: objects in six contexts, all ordered pairs.", "NICO++")
MINIDN = _freedom(
    "minidn", 7_560, None, "Mini-DomainNet of FREEDOM: four domains, all ordered pairs.", "DomainNet, cleaned version"
)
LTLL = _freedom("ltll", 488, 488, "LTLL of FREEDOM: landmarks today and in archives.", "the LTLL project's page")
IMAGENET_R = _freedom(
    "imagenet_r", 67_932, 16_983, "ImageNet-R of FREEDOM: five domains, all ordered pairs; DTIN's list.", "as for dtin"
)
PATTERNCOM = BenchmarkDeclaration(
    name="patterncom",
    reader=f"{_READERS}.conversion:read_patterncom",
    splits=("test",),
    options=(BenchmarkOption("attribute", str, choices=ATTRIBUTES, is_part=True, help="attribute that is changed"),),
    prompts={"rscir": "{value}".format_map},
    prompt_fields=("value",),
    counts={("test", attribute): (None, 30_400) for attribute in ATTRIBUTES},
    summary="PatternCom: attributes of aerial images, six parts.",
    source="lists: GitHub, billpsomas/rscir (Apache-2.0); images: PatternNet",
)
ICIR = BenchmarkDeclaration(
    name="icir",
    reader=f"{_READERS}.instances:read_icir",
    splits=("test",),
    prompts={"icir": "{text_query}".format_map},
    prompt_fields=("text_query",),
    counts={("test", ""): (1_883, None)},
    summary="i-CIR: instances among their own hard negatives, each query in a gallery of its own.",
    source="https://vrg.fel.cvut.cz/icir (CC BY-NC-SA 4.0), or Hugging Face, billpsomas/icir",
)
FSCOCO = BenchmarkDeclaration(
    name="fscoco",
    reader=f"{_READERS}.instances:read_fscoco",
    splits=("val_normal", "val_unseen_user"),
    options=(
        BenchmarkOption("query", str, "both", ("both", "sketch", "text"), help="what a query is: both, sketch or text"),
    ),
    prompts={"fscoco": "{text}".format_map},
    prompt_fields=("text",),
    counts={("val_normal", ""): (None, None), ("val_unseen_user", ""): (None, None)},
    summary="FS-COCO: freehand scene sketches, texts or both ask for a COCO photo.",
    source="http://cvssp.org/data/fscoco/fscoco.tar.gz (CC BY-NC 4.0)",
)
CSTBIR = BenchmarkDeclaration(
    name="cstbir",
    reader=f"{_READERS}.instances:read_cstbir",
    splits=("test", "val", "val_large", "open", "train"),
    options=(
        BenchmarkOption("gallery", str, "targets", help="targets, or a file in the folder that lists photos"),
        BenchmarkOption("annotations", str, help="file of the queries; CSTBIR_dataset.json or .csv if null"),
        BenchmarkOption("oracle", bool, default=False, help="allow a prompt that tells the category"),
    ),
    prompts={
        "keep": "{text}".format_map,
        "drop": lambda fields: re.sub(r"\s*\[sketch\]\s*", " ", fields["text"]).strip(),
        "label": lambda fields: fields["text"].replace("[sketch]", fields["label"]),
    },
    prompt_fields=("text", "label"),
    counts={("test", ""): (4_001, None), ("val", ""): (1_000, None)},
    summary="CSTBIR: a sketch of an object and a text about the rest of the scene.",
    source="annotations: GitHub, vl2g/CSTBIR (MIT); photos: Visual Genome; sketches: QuickDraw's numpy_bitmap",
)


def _qmul(name: str, title: str) -> BenchmarkDeclaration:
    return BenchmarkDeclaration(
        name=name,
        reader=f"{_READERS}.instances:read_{name}",
        splits=("test", "train"),
        prompts={"none": "".format_map, "photo": "a real image of sketch".format_map},
        counts={("test", ""): (None, None)},
        summary=f"QMUL {title}: the photo that a sketch was drawn of.",
        source="the page of SketchX (QMUL), or its copies in the layout of pix2pix",
    )


SHOEV2 = _qmul("shoev2", "ShoeV2")
CHAIRV2 = _qmul("chairv2", "ChairV2")
CIRCLED = BenchmarkDeclaration(
    name="circled",
    reader=f"{_READERS}.sessions:read_circled",
    splits=("val", "train"),
    options=(BenchmarkOption("subset", str, choices=(*CATEGORIES, "cirr", "circo"), is_part=True, help="images of"),),
    prompts={"caption": "{relative_caption}".format_map},
    prompt_fields=("relative_caption",),
    counts={
        ("val", "dress"): (3_716, 3_817),
        ("val", "shirt"): (3_773, 6_346),
        ("val", "toptee"): (3_841, 5_373),
        ("val", "cirr"): (2_279, 2_297),
        ("val", "circo"): (141, 123_403),
    },
    summary="CIRCLED: sessions of several turns over FashionIQ, CIRR and CIRCO.",
    source="Hugging Face, tk1441/CIRCLED (CC BY 4.0); images: as for fashioniq, cirr and circo",
)
MMEB = BenchmarkDeclaration(
    name="mmeb",
    reader=f"{_READERS}.sessions:read_mmeb",
    splits=("test",),
    options=(BenchmarkOption("task", str, choices=("CIRR", "FashionIQ"), is_part=True, help="task"),),
    prompts={"mmeb": "{qry_inst} {qry_text}".format_map, "caption": "{qry_text}".format_map},
    prompt_fields=("qry_inst", "qry_text"),
    counts={("test", "CIRR"): (None, None), ("test", "FashionIQ"): (None, None)},
    summary="MMEB's CIRR and FashionIQ: own candidates; not the official protocols.",
    source="Hugging Face, ziyjiang/MMEB_Test_Instruct",
)

_SKETCHY_PROMPTS: Final = {"union": "a real image of sketch".format_map, "none": "".format_map}
_NO_PROMPT: Final = {"union": "".format_map}
_ZSE_SBIR: Final = "lists and images: the archive that ZSE-SBIR's README names"


def _unseen(
    name: str, splits: Mapping[str, tuple[int, int]], prompts: Mapping[str, Template], summary: str
) -> BenchmarkDeclaration:
    """Declare sketches of unseen classes; `splits` are the numbers of queries and photos."""
    return BenchmarkDeclaration(
        name=name,
        reader=f"{_READERS}.sbir:read_{name}",
        splits=tuple(splits),
        prompts=prompts,
        prompt_fields=("class",),
        presets=_PRESETS,
        counts={(split, ""): count for split, count in splits.items()},
        summary=summary,
        source=_ZSE_SBIR,
    )


SKETCHY = _unseen(
    "sketchy",
    {"zeroshot1": (15_229, 17_101), "zeroshot0": (12_694, 12_553)},
    _SKETCHY_PROMPTS,
    "Sketchy, zero-shot: 25 (zeroshot1) or 21 (zeroshot0) unseen classes.",
)
TUBERLIN = _unseen("tuberlin", {"test": (2_400, 27_989)}, _NO_PROMPT, "TU-Berlin, zero-shot: 30 unseen classes.")
QUICKDRAW = _unseen(
    "quickdraw", {"test": (92_291, 54_151)}, _NO_PROMPT, "QuickDraw-Extended, zero-shot: 30 unseen classes."
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
SKETCHY_INSTANCES = BenchmarkDeclaration(
    name="sketchy_instances",
    reader=f"{_READERS}.sbir:read_sketchy_instances",
    splits=("zeroshot0", "zeroshot1"),
    options=(BenchmarkOption("gallery", str, "class", ("class", "all"), help="photos of the query's class, or all"),),
    prompts=_SKETCHY_PROMPTS,
    prompt_fields=("class",),
    folder="sketchy",
    counts={("zeroshot0", ""): (12_694, 2_100), ("zeroshot1", ""): (15_229, 2_500)},
    summary="Sketchy, the very photo that was drawn, of unseen classes.",
    source=_ZSE_SBIR,
)


def _generalized(base: BenchmarkDeclaration, photos: int) -> BenchmarkDeclaration:
    return replace(
        base,
        name=f"{base.name}_generalized",
        reader=f"{_READERS}.sbir:read_{base.name}_generalized",
        options=(
            BenchmarkOption(
                "protocol", str, "all_seen", GENERALIZED, help="seen classes: all_seen, seen_fifth or seen_classes"
            ),
            BenchmarkOption("seed", int, 0, help="seed of the drawn photos or classes"),
        ),
        presets=(),
        folder=base.name,
        counts={key: (count, photos) for key, (count, _) in base.counts.items()},
        summary=f"{base.summary.partition(',')[0]}, generalized zero-shot: seen classes are in the gallery too.",
    )


SKETCHY_GENERALIZED = _generalized(SKETCHY, 85_502)
TUBERLIN_GENERALIZED = _generalized(TUBERLIN, 204_489)
BUILTIN: Final = tuple(one for one in [*globals().values()] if isinstance(one, BenchmarkDeclaration))
"""All of the above, in their order."""
