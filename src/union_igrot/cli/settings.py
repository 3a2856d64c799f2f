"""The commands and their settings."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from union_igrot.cli.groups import preprocess_setting
from union_igrot.settings import REQUIRED, readable, setting
from union_igrot.storage.sizes import DURATION_FORMAT, SIZE_FORMAT, parse_duration, parse_size

# Settings that several commands share.


_FUSIONS = ("product", "weicom", "slerp", "basic")  # evaluation.fusion.FUSIONS, which imports torch


def _seed(of: str) -> Any:
    return setting(0, f"seed of {of}", low=0, high=2**32 - 1)


def _device(of: str) -> Any:
    return setting(
        "auto",
        f"device of {of}: auto (a GPU if there is one), cpu, cuda, cuda:1, mps",
        accepts=lambda value: bool(re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", str(value))),
        expected="auto, cpu, cuda, cuda:NUMBER or mps",
    )


def _cache_dir() -> Any:
    return setting(None, "cache folder; $UNION_CACHE or ~/.cache/union-igrot if null", rare=True)


def _progress() -> Any:
    return setting(True, "show progress bars on standard error")


def _weights(of: str, or_else: str = "the usual ones if null") -> Any:
    return setting(None, f"weights of {of}; {or_else}", path="file", rare=True)


def _workers() -> Any:
    return setting(None, "decoding processes; cores - 1 (8 at most without a GPU) if null", low=0, rare=True)


@dataclass
class FeatureSettings:
    """Feature extraction with the frozen backbone."""

    batch_size: int = setting(256, "images per batch", low=1)
    workers: int | None = _workers()
    dtype: Literal["float32", "float16"] = setting("float32", "storage type of cached features: float32 or float16")
    precision: Literal["float32", "bfloat16", "float16"] = setting(
        "float32", "precision of the frozen backbone: float32, bfloat16 or float16"
    )


@dataclass
class ExtractionSettings:
    """Settings of commands that extract features."""

    cache_dir: str | None = _cache_dir()
    cache_limit: str | None = setting(
        None,
        "size limit of the cache, such as 50GB; $UNION_CACHE_LIMIT or no limit if null",
        accepts=readable(parse_size),
        expected=SIZE_FORMAT,
        rare=True,
    )
    progress: bool = _progress()
    features: FeatureSettings = field(default_factory=FeatureSettings)


@dataclass
class TrainSettings(ExtractionSettings):
    """Settings of `union-train`."""

    seed: int = _seed("weights, sample order, random baseline and bootstrap")
    output_dir: str | None = setting(None, "run folder; outputs/train/DATE/TIME if null")
    checkpoint: str | None = setting(None, "trained heads to start from: a run, its model/ or a hub repository")


@dataclass
class EvalSettings(ExtractionSettings):
    """Settings of `union-eval`."""

    checkpoint: str | None = setting(
        "tiny", "folder of a run or its model/, a hub repository, or the bundled tiny or tiny-union"
    )
    weights: str | None = _weights("the checkpoint's backbone")
    device: str = _device("encoding and ranking")
    calibration: float = setting(
        0.0, "weight of a correction by training queries, such as 0.25; 0, as zero-shot protocols ask, for none", low=0
    )
    query_expansion: int = setting(
        0,
        "first results, such as 5, towards which queries move before a second search; 0 for none",
        low=0,
        high=50,
        rare=True,
    )
    fusions: tuple[str, ...] = setting(
        ("product",),
        "further baselines without training: product, weicom, slerp, basic",
        accepts=lambda value: set(value) <= set(_FUSIONS),
        expected=f"a list of {', '.join(_FUSIONS)}",
    )
    corpora: tuple[str, ...] = setting(
        (), "files of texts about subjects and about styles, one text a line, for fusions=[basic]"
    )
    predictions: str | None = setting(None, "submission file of any method, scored without a model", path="file")
    seed: int = _seed("random baseline and bootstrap")
    output_dir: str | None = setting(None, "folder of the results; outputs/eval/DATE/TIME if null")


@dataclass
class RaySettings:
    """Ray cluster of `executor=ray`."""

    address: str | None = setting(None, "address of the cluster, or auto for one on this machine; starts one if null")
    actors: int | None = setting(None, "number of actors; one per GPU, or per two CPU cores, if null", low=1)


@dataclass
class IndexSettings:
    """Settings of `union-index`."""

    images: str | None = setting(None, 'folder, pattern ("p/**/*.jpg"), list, tar shards ("s-{00..99}.tar")')
    index: str = setting(REQUIRED, "photos.lance, s3://bucket/photos.lance, milvus://host:19530/collection")
    remove: str | None = setting(None, "filter of rows to remove, such as id like '/photos/old/%'", verbatim=True)
    checkpoint: str | None = setting(None, "photos, tiny, a backbone, run or hub repository; null: the index's")
    weights: str | None = _weights("the checkpoint's backbone")
    preprocess: Literal["model", "pad"] | None = preprocess_setting()
    vectors: str | None = setting(None, "embeddings of a list, in order: .npy, .safetensors, .parquet", rare=True)
    vectors_from: str | None = setting(None, "name of the model of vectors=, if it is not available here", rare=True)
    calibration: float | None = setting(
        None, "calibration of a new index's scores, such as 0.25; none if null", low=0, rare=True
    )
    exclude: tuple[str, ...] = setting((), "patterns to leave out, such as drafts or '*.gif'")
    max_megapixels: float | None = setting(
        None, "largest image; $UNION_MAX_MEGAPIXELS or 179 if null", above=0, rare=True
    )
    file_columns: Literal["new", "all", "none"] = setting(
        "new", "columns from EXIF, folders, captions: of new files, all, or none", rare=True
    )
    embed_text: str | None = setting(None, "text column to embed with images in a new index, such as caption")
    on_broken: Literal["skip", "fail"] = setting("skip", "broken images: skip (and list), or fail")
    prune: bool = setting(True, "remove rows of this source whose images are gone")
    batch_size: int = setting(256, "images per batch", low=1, rare=True)
    workers: int | None = _workers()
    executor: Literal["local", "ray"] = setting(
        "local", "local: one device of this machine, or ray: actors of a cluster", rare=True
    )
    ray: RaySettings = field(default_factory=RaySettings)
    decoder: Literal["pillow", "torchcodec"] = setting(
        "pillow", "pillow; torchcodec was slower and was removed", rare=True
    )
    cache_dir: str | None = _cache_dir()
    progress: bool = _progress()


@dataclass
class SearchSettings:
    """Settings of `union-search`."""

    index: str = setting(REQUIRED, "photos.lance, s3://bucket/photos.lance, milvus://host:19530/collection")
    image: tuple[str, ...] = setting(
        (), "photo or sketch, or a region of it (a.jpg#10%,20%,50%,50%); repeat for a mean"
    )
    text: str | None = setting(None, "modification text with an image, or a text query alone", verbatim=True)
    terms: tuple[str, ...] = setting((), 'weighted texts and images ("2:a dog", -fruit, ./a.jpg, "a.jpg + in red")')
    vector: str | None = setting(None, "embedding of the index's model: .npy, .safetensors or .parquet", rare=True)
    k: int = setting(20, "results per query", low=1)
    offset: int = setting(0, "best results to leave out, for the next page", low=0)
    min_score: float | Literal["auto"] | None = setting(
        None,
        "lowest score of a result; auto: what 1% of random queries exceed",
        accepts=lambda value: value == "auto" or (not isinstance(value, str) and math.isfinite(value)),
        expected="a number, auto",
    )
    where: str | None = setting(None, "filter on columns, such as class = 'dog' and year > 2020", verbatim=True)
    search: Literal["auto", "exact", "ann"] = setting(
        "auto", "exact, ann (approximate), or auto: exact up to 200,000 images"
    )
    liked: tuple[str, ...] = setting((), "ids of results to move towards")
    disliked: tuple[str, ...] = setting((), "ids of results to move away from; hidden")
    exclude: tuple[str, ...] = setting((), "ids to hide, such as the query's own")
    queries: str | None = setting(None, "file of queries (.jsonl or .csv) with image, text or both per line")
    checkpoint: str | None = setting(None, "model of the queries; the one recorded in the index if null")
    weights: str | None = _weights("its backbone", "those recorded in the index if null")
    preprocess: Literal["model", "pad"] | None = preprocess_setting()
    device: str = _device("the query encoder")
    format: Literal["auto", "table", "jsonl"] = setting(
        "auto", "table, jsonl (one object per result), or auto: table on a terminal, else jsonl"
    )
    thumbnails: Literal["auto", "on", "off"] = setting(
        "auto", "images in the table: on, off, or auto: on if the terminal has 16 million colors", rare=True
    )
    contact: str | None = setting(None, "contact sheet (.png) of the first queries and their results", rare=True)
    progress: bool = _progress()


@dataclass
class DuplicatesSettings:
    """Settings of `union-duplicates`."""

    index: str = setting(REQUIRED, "photos.lance, s3://bucket/photos.lance, milvus://host:19530/collection")
    threshold: float | None = setting(
        0.95, "lowest cosine similarity of similar images; null: same files and images only", above=0, high=1
    )
    where: str | None = setting(None, "filter of the images to compare, such as width > 500", verbatim=True)
    format: Literal["auto", "table", "jsonl"] = setting(
        "auto", "table, jsonl (one object per group), or auto: table on a terminal, else jsonl"
    )
    html: str | None = setting(None, "page (.html) of the first groups with thumbnails")
    progress: bool = _progress()


@dataclass
class ServerSettings:
    """Settings of commands that serve a gallery."""

    device: str = _device("the query encoder")
    host: str = setting("127.0.0.1", "address to bind to; any but localhost requires a login or key")
    port: int = setting(7860, "port, or 0 for any free one", low=0, high=65_535)
    name: str | None = setting(None, "host name of a proxy in front, such as one that adds TLS")
    megabytes: float = setting(10, "upload limit in MB", above=0, high=1000)
    megapixels: float = setting(50, "upload limit in megapixels, checked before decoding", above=0, high=1000)
    waiting: int = setting(64, "searches that may wait; further ones are rejected", low=1, high=10_000)


@dataclass
class DemoSettings(ServerSettings, ExtractionSettings):
    """Settings of `union-demo`."""

    index: str | None = setting(None, "index made by union-index; the generated world if null")
    checkpoint: str | None = setting(None, "model of the index, as in union-index; the recorded one, or tiny, if null")
    second_index: str | None = setting(None, "second index of the same images, shown side by side")
    second_checkpoint: str | None = setting(None, "model of the second index, or second model on the generated world")
    user: str | None = setting(None, "user name for the login; the password is $UNION_DEMO_PASSWORD, or prompted for")
    page: int = setting(24, "images per page", low=2, high=200)


@dataclass
class ServeSettings(ServerSettings):
    """Settings of `union-serve`."""

    index: str = setting(REQUIRED, "photos.lance, s3://bucket/photos.lance, milvus://host:19530/collection")
    checkpoint: str | None = setting(None, "model of the queries; the one recorded in the index if null")
    key_file: str | None = setting(None, "file with the API key; $UNION_SERVE_KEY, or none, if null", path="file")
    page: bool = setting(True, "serve the page of union-demo, too")
    mcp: Literal["stdio"] | None = setting(None, "stdio: serve an assistant by standard input and output, not HTTP")


@dataclass
class ConvertSettings:
    """Settings of `union-convert`."""

    checkpoint: str = setting(REQUIRED, "the authors' .pth file", path="file")
    output_dir: str = setting(REQUIRED, "folder of the converted model, new or empty")
    mask: Literal["exclude", "legacy"] = setting(
        "exclude", "padding: exclude, as the published code evaluates, or legacy, as it trains"
    )
    tokenizer: str | None = setting(
        None, "BLIP's tokenizer (folder or vocab.txt); the hub's cache if null", path="file"
    )
    text_heads: int | None = setting(None, "attention heads of CLIP's text encoder; its width / 64 if null", low=1)
    half: bool = setting(False, "write 16-bit weights")


@dataclass
class ExportSettings:
    """Settings of `union-export`."""

    output: str = setting(REQUIRED, "folder of the ONNX files, new or empty")
    checkpoint: str = setting("photos", "photos, tiny, a backbone (untrained), a run, or a hub repository")
    precision: Literal["fp32", "int8"] = setting("fp32", "fp32, or int8: linear layers in 8 bits")
    weights: str | None = _weights("the checkpoint's backbone")
    preprocess: Literal["model", "pad"] | None = preprocess_setting()


@dataclass
class CompareSettings:
    """Settings of `union-compare`."""

    first: str = setting(REQUIRED, "folder of a run", path="folder")
    second: str = setting(REQUIRED, "folder of another run", path="folder")
    method: Literal["trained", "image", "text", "sum", "chance"] = setting(
        "trained", "method to compare: trained, or image, text, sum, chance"
    )
    rounds: int = setting(10000, "draws of the randomization test", low=1)
    seed: int = _seed("bootstrap and draws")


@dataclass
class CacheSettings:
    """Settings of `union-cache`."""

    cache_dir: str | None = _cache_dir()
    prune: str | None = setting(
        None,
        "size to prune to, such as 50GB (least recently used first), or all",
        accepts=readable(parse_size, "all"),
        expected=f"all, {SIZE_FORMAT}",
    )
    older_than: str | None = setting(
        None,
        "prune only what was not used for this long, such as 30d; without prune=, all of that",
        accepts=readable(parse_duration),
        expected=DURATION_FORMAT,
    )


@dataclass
class CheckSettings:
    """`union-check` has no settings but its group."""


@dataclass(frozen=True)
class Command:
    """A command and what its help says.

    Each group has its default option (None: no option) and its meaning. `positional` are settings whose values may be
    given without their names. With `hydra`, it has experiments, sweeps and `hydra.` settings.
    """

    summary: str
    settings: type
    examples: tuple[str, ...]
    groups: Mapping[str, tuple[str | None, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    hydra: bool = False


_DEVICES = {
    "precision": ("fp32", "numeric precision"),
    "strategy": ("auto", "devices and distributed strategy"),
}
COMMANDS: Mapping[str, Command] = {
    "train": Command(
        "Train the heads on a frozen backbone, then evaluate them.",
        TrainSettings,
        (
            "union-train",
            "union-train model=large data=llavasco",
            "union-train target=union loss=infonce_small",
            "union-train data=folder data.root=photos recipe.epochs=8",
            "union-train -m target=residual,union seed=0,1,2",
        ),
        {
            "model": ("tiny", "frozen vision-language model"),
            "data": ("shapes", "training and evaluation data"),
            "fusion": ("transagg", "query head"),
            "target": ("residual", "target head (gallery encoder)"),
            "loss": ("bank", "contrastive loss"),
            "recipe": ("default", "optimizer, schedule and length of training"),
            **_DEVICES,
            "logger": ("csv", "where losses and metrics are logged"),
            "experiment": (None, "an experiment of the paper: options of all groups"),
        },
        ("the same command resumes an interrupted run",),
        hydra=True,
    ),
    "eval": Command(
        "Evaluate a trained model, or a backbone alone, next to a random baseline and untrained baselines.",
        EvalSettings,
        (
            "union-eval checkpoint=outputs/train/DATE/TIME",
            "union-eval checkpoint=tiny data=circo data.root=data/circo",
            "union-eval model=base data=cirr",
        ),
        {
            "model": (None, "a backbone without trained heads, instead of a checkpoint"),
            "data": ("shapes", "data to evaluate on"),
        },
        hydra=True,
    ),
    "index": Command(
        "Index images, update an index, or remove rows from it.",
        IndexSettings,
        (
            "union-index images=photos/ index=photos.lance",
            "union-index images=photos/ index=photos.lance checkpoint=base strategy=cpu",
            "union-index index=photos.lance remove=\"id like '/photos/old/%'\"",
        ),
        {**_DEVICES, "strategy": ("auto", "device: auto (a GPU if there is one) or cpu; for more see executor")},
        (
            "run it again to update, or to resume; the index can be searched all the time",
            "lists: .txt (paths), or .csv, .jsonl, .parquet with a column path and others",
            "tar shards (WebDataset): .json, .txt and .cls files beside images become columns",
            "broken images are listed in INDEX.skipped.jsonl; delete it to try them again",
            "several sources may share an index; remove=\"source = '/old'\" removes one",
        ),
    ),
    "search": Command(
        "Search a gallery with an image, a sketch, a text, or several of them.",
        SearchSettings,
        (
            "union-search index=photos.lance image=sketch.png",
            'union-search index=photos.lance image=a.jpg text="in blue" k=5',
            'union-search index=photos.lance text="a red car" where="year > 2020"',
            'union-search index=photos.lance terms="2:a dog" terms=./a.jpg terms="-grass"',
        ),
        notes=("exit code: 0 results, 1 no results, 2 usage error, 130 interrupted, 141 broken pipe",),
    ),
    "duplicates": Command(
        "List groups of near duplicates: the same file, the same image saved again, similar images.",
        DuplicatesSettings,
        (
            "union-duplicates index=photos.lance html=duplicates.html",
            "union-duplicates index=photos.lance threshold=null where=\"id like '%/2024/%'\"",
        ),
        notes=(
            "nothing is removed; the first image of a group has most pixels, and all others duplicate it",
            "exit code: 0 duplicates, 1 none, 2 usage error",
        ),
    ),
    "demo": Command(
        "Serve a web page that searches a gallery, or the generated world, by sketch, photo and text.",
        DemoSettings,
        ("union-demo", "union-demo index=photos.lance", "union-demo index=photos.lance host=0.0.0.0 user=anna"),
        notes=("page and password travel unencrypted; for other machines use a proxy with TLS and name=ITS.NAME",),
    ),
    "serve": Command(
        "Serve searches of a gallery over HTTP, as JSON and as a page, or for an assistant by MCP.",
        ServeSettings,
        ("union-serve index=photos.lance", "union-serve index=photos.lance mcp=stdio"),
        notes=("requests are described by /openapi.json; for other machines set a key, and use a proxy with TLS",),
    ),
    "check": Command(
        "Check whether the files of a dataset are complete, and show what would be trained and tested on.",
        CheckSettings,
        ("union-check data=cirr data.root=data/cirr", "union-check data=folder data.root=photos"),
        {"data": (REQUIRED, "dataset")},
        ("exit code: 0 complete, 1 incomplete, 2 usage error",),
    ),
    "compare": Command(
        "Compare two runs query by query: paired differences with intervals and a randomization test.",
        CompareSettings,
        ("union-compare outputs/a outputs/b",),
        positional=("first", "second"),
    ),
    "convert": Command(
        "Convert a checkpoint of the published code (UNION or TransAgg) into a model of this package.",
        ConvertSettings,
        (
            "union-convert checkpoint=union.pth output_dir=converted",
            "union-convert checkpoint=a.pth target=frozen model=blip output_dir=converted",
        ),
        {
            "model": ("base", "backbone in the file; its weights and sizes are the file's"),
            "target": ("union", "target head in the file; frozen for TransAgg, which has none"),
        },
    ),
    "export": Command(
        "Export the towers and heads of a model to ONNX, for other programs.",
        ExportSettings,
        (
            "union-export output=photos-onnx",
            "union-export checkpoint=base output=base-int8 precision=int8",
        ),
        notes=("union-index precision=onnx|int8 exports by itself, to the cache",),
    ),
    "cache": Command(
        "List the cache of features, and prune it.",
        CacheSettings,
        ("union-cache", "union-cache prune=50GB", "union-cache older_than=30d"),
        notes=("exit code: 0 done, 1 more is left than prune= allows, since it is in use, 2 usage error",),
    ),
}
