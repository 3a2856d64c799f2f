"""Write `data/`: one of each file format as commit bfeb166 wrote it, and what that commit read from it.

Run it with a checkout of that commit first on the path, never with the current code:

    git worktree add ../old bfeb166
    PYTHONPATH=../old/src python tests/formats/make_fixtures.py

Images are generated, and every path that reaches a file lies in `SCRATCH`, so that nothing of the machine is written.
"""

import importlib
import json
import shutil
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import lance
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

DATA = Path(__file__).with_name("data")
SCRATCH = Path("/dev/shm/union-formats")
WORDS = ("make", "it", "red", "a", "small", "dog")
TRAIN = [
    "model.projector=mlp",
    "fusion=sum",
    "target=frozen",
    "data.triplets=24",
    "data.pairs=8",
    "data.queries=12",
    "data.val_queries=12",
    "recipe.epochs=1",
    "recipe.batch_size=8",
    "progress=false",
]
"""Settings of the training; the test repeats them."""


def main() -> None:
    """Write all fixtures."""
    shutil.rmtree(SCRATCH, ignore_errors=True)
    shutil.rmtree(DATA, ignore_errors=True)
    SCRATCH.mkdir()
    DATA.mkdir()
    expected = {"model": model(), "index": index(), "features": features(), "train": TRAIN}
    run()
    (DATA / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    shutil.rmtree(SCRATCH)


def old(module: str) -> ModuleType:
    """Import a module of that commit; its name may not exist any more."""
    return importlib.import_module(f"union_igrot.{module}")


def model() -> dict[str, object]:
    """A trained model with all heads and the weights of its own backbone, a CLIP of width 16."""

    torch.manual_seed(0)
    backbone = old("backbones.build").build_backbone(f"hf:{clip(SCRATCH / 'clip')}")
    fusion = old("heads.build").build_fusion("transagg", 16, layers=1, heads=2, feedforward=16, start="reference")
    target = old("heads.build").build_target("union", 16, layers=1, heads=1, feedforward=16, start="reference")
    made = old("model").IGROTModel(
        backbone,
        fusion,
        target,
        {"data": "none", "samples": 3},
        old("heads.projector").build_projector("mlp", 16, hidden=8),
    )
    torch.nn.init.normal_(made.projector.down.weight)
    made.tuned, made.training_images = True, frozenset({"0123456789abcdef", "fedcba9876543210"})
    made.save(DATA / "model", half=True)
    return embedded(old("model").IGROTModel.load(DATA / "model"))


@torch.inference_mode()
def embedded(made: object) -> dict[str, object]:
    """What a model makes of fixed pixels and texts."""
    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    return {
        "fingerprint": made.fingerprint(),
        "queries": made.embed_queries(pixels, ["make it red", None]).tolist(),
        "gallery": made.embed_gallery(pixels).tolist(),
    }


def clip(folder: Path) -> Path:
    """A CLIP of random weights with a tokenizer of six words, as transformers writes it."""
    folder.mkdir()
    vocabulary = {word: number for number, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", *WORDS))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    marks = [("<s>", 1), ("</s>", 2)]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    words = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")
    words.save_pretrained(folder)
    side = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**side, "vocab_size": len(vocabulary), "max_position_embeddings": 12, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**side, "image_size": 16, "patch_size": 8}
    network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    generator = torch.Generator().manual_seed(0)
    for _, x in sorted(network.named_parameters()):
        x.data = torch.randn(x.shape, generator=generator) / max(1, x[0].numel() if x.ndim > 1 else 1) ** 0.5
    save_file({name: x.contiguous() for name, x in network.state_dict().items()}, folder / "model.safetensors")
    network.config.architectures = ["CLIPModel"]
    network.config.save_pretrained(folder)
    notes = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({**notes, "do_center_crop": False}))
    return folder


def index() -> dict[str, object]:
    """An index that `union-index` filled from a list with columns, and two searches in it."""

    photos = SCRATCH / "photos"
    photos.mkdir()
    rows = ["path,label,year"]
    for number, item in enumerate(old("data.shapes").shapes_cir("val", queries=2, distractors=8).gallery[:5]):
        item.image.open().save(photos / f"{number}.png")
        rows.append(f"{number}.png,{'even' if number % 2 == 0 else 'odd'},{2000 + number}")
    (photos / "list.csv").write_text("\n".join(rows) + "\n")
    made = SCRATCH / "photos.lance"
    settings = [f"images={photos}/list.csv", f"index={made}", f"cache_dir={SCRATCH}/cache", "progress=false"]
    command(settings, old("cli.index").main)
    lance.dataset(str(made)).cleanup_old_versions(timedelta(0), delete_unverified=True)
    shutil.copytree(made, DATA / "photos.lance")
    shutil.copytree(photos, DATA / "photos")
    gallery = old("gallery.gallery").Gallery.open(str(made), old("model").load_model("tiny"))
    answers = gallery.search(text="a red circle", k=5)
    filtered = gallery.search(text="a red circle", where="label = 'odd' and year > 2000", k=5)
    return {
        "ids": sorted(gallery.ids()),
        "found": [list(answers.ids), list(answers.scores)],
        "odd": [list(filtered.ids), list(filtered.scores)],
    }


def features() -> dict[str, object]:
    """A feature store of two additions, the second with tokens."""

    def numbers(*shape: int) -> torch.Tensor:
        return torch.arange(float(torch.tensor(shape).prod())).reshape(shape) / 8

    with old("store.features").FeatureStore(DATA / "cache", "print-1", "float16", backbone="tiny") as store:
        store.add(["a", "b"], old("types").Features(numbers(2, 4)))
        mask = torch.tensor([[True, True, False], [True, True, True]])
        store.add(["c", "d"], old("types").Features(numbers(2, 4) + 1, numbers(2, 3, 4), mask, torch.tensor([1, 2])))
        read = store.get(["d", "c"], tokens=True)
        return {
            "pooled": store.get(["a", "b", "c", "d"]).pooled.tolist(),
            "tokens": read.tokens.tolist(),
            "mask": read.mask.tolist(),
            "pooled_at": read.pooled_at.tolist(),
        }


def run() -> None:
    """The folder of a finished `union-train`, with a smaller projector and without checkpoints and reports."""

    folder = SCRATCH / "run"
    settings = [*TRAIN, f"output_dir={folder}", f"cache_dir={SCRATCH}/cache"]
    command(settings, old("cli.train").main)
    trained = old("model").IGROTModel.load(folder / "model")
    trained.projector = old("heads.projector").build_projector("mlp", trained.backbone.dim, hidden=8)
    torch.nn.init.normal_(trained.projector.down.weight, std=0.05)
    trained.save(folder / "model")
    notes = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**notes, "stage": "trained"}) + "\n")
    command(settings, old("cli.train").main)  # evaluates that model and ends the run
    (DATA / "run").mkdir()
    for name in ("run.json", "config.yaml", "results.json", "results.csv"):
        shutil.copy(folder / name, DATA / "run" / name)
    shutil.copytree(folder / "model", DATA / "run" / "model")


def command(settings: list[str], main: object) -> None:
    """Run a command; exit code 0 is success."""
    try:
        main(settings)
    except SystemExit as ended:
        if ended.code:
            sys.exit(f"{settings}: exit code {ended.code}")


if __name__ == "__main__":
    main()
