"""On a GPU everything comes out as on a CPU: rankings, features, metrics, trainings, rows of an index."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_reference import HERE, TEXTS, golden_images, golden_state
from torch.nn.functional import normalize

from small_runs import SMALL, rows_of
from small_world import cir_benchmark, extractor, sbir_benchmark, trainable, triplets
from union_igrot.cli.eval import main as evaluate
from union_igrot.cli.train import main as train
from union_igrot.evaluation.ranking import exact_topk, rank_chunks
from union_igrot.evaluation.scoring import score
from union_igrot.features.embedding import embed_benchmark
from union_igrot.features.extractor import FeatureExtractor
from union_igrot.features.store import FeatureStore
from union_igrot.gallery.engines.factory import MemoryIndex
from union_igrot.gallery.ingest.pipeline import ingest_images
from union_igrot.gallery.ingest.report import IngestOptions
from union_igrot.gallery.ingest.sources import list_images
from union_igrot.images.transforms import image_batch
from union_igrot.models.devices import full_precision
from union_igrot.models.model import load
from union_igrot.models.reference import load_reference_checkpoint
from union_igrot.synthetic.shapes import shapes_cir
from union_igrot.training.datamodule import IGROTDataModule
from union_igrot.training.learner import Learner, Recipe, TrainerConfig, fit
from union_igrot.training.losses import InfoNCE

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
    # Lightning's own use of a deprecated part of torch.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]


def whole_numbers(rows, dim, seed):
    """Small whole numbers: every sum is exact, so both devices owe the same bits."""
    return torch.randint(-4, 5, (rows, dim), generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("chunk_bytes", [2**15, 2**27])
def test_rankings_are_those_of_the_cpu_to_the_last_tie(chunk_bytes):
    queries, gallery = whole_numbers(70, 12, 0), whole_numbers(5000, 12, 1)
    exclude = [[i, 4999 - i] for i in range(70)]
    here = exact_topk(queries, gallery, 40, exclude)
    there = exact_topk(queries.cuda(), gallery.cuda(), 40, exclude, chunk_bytes)
    assert there.positions.is_cuda
    assert there.positions.cpu().equal(here.positions)
    assert there.scores.cpu().equal(here.scores)
    places = torch.randint(5000, (70, 9), generator=torch.Generator().manual_seed(2))
    expected = [chunk.ranks(places[chunk.queries]) for chunk in rank_chunks(queries, gallery, exclude)]
    found = [
        chunk.ranks(places[chunk.queries].cuda()).cpu()
        for chunk in rank_chunks(queries.cuda(), gallery.cuda(), exclude, chunk_bytes)
    ]
    assert torch.cat(found).equal(torch.cat(expected))


def test_scores_are_float32_whatever_the_settings():
    draw = torch.Generator().manual_seed(0)
    queries, gallery = (normalize(torch.randn(n, 256, generator=draw), dim=-1) for n in (16, 3000))
    exact = (queries.double() @ gallery.double().T).topk(10).values
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with torch.autocast("cuda", torch.bfloat16):
            found = exact_topk(queries.cuda(), gallery.cuda(), 10)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    torch.testing.assert_close(found.scores.cpu().double(), exact, atol=1e-6, rtol=0)


def test_the_embedded_model_embeds_the_same():
    world = shapes_cir("val", 40)
    here, there = load("tiny"), load("tiny").to("cuda")
    images = image_batch([query.image for query in world.queries], here.preprocess)
    texts = [query.text for query in world.queries]
    with torch.inference_mode(), full_precision(torch.device("cuda")):
        for one in (images, images.cuda()):
            torch.testing.assert_close(there.embed_gallery(one).cpu(), here.embed_gallery(images), atol=1e-5, rtol=0)
            found = there.embed_queries(one, texts)
            torch.testing.assert_close(found.cpu(), here.embed_queries(images, texts), atol=1e-5, rtol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_features_and_figures_are_the_same_in_every_arithmetic(tmp_path, precision):
    """Half precision may change a feature by a percent; metrics of 40 queries then stay close."""
    found = {}
    for device in ("cpu", "cuda"):
        model = load("tiny").to(device)
        store = FeatureStore(tmp_path / device, model.backbone.fingerprint())
        chosen = precision if device == "cuda" else "float32"
        filling = FeatureExtractor(model.backbone, store, batch_size=64, workers=1, precision=chosen, progress=False)
        world = shapes_cir("val", 40)
        queries, gallery, _ = embed_benchmark(model, world, filling)
        assert queries.device.type == device
        assert queries.dtype == torch.float32
        found[device] = queries.cpu(), gallery.cpu(), score(world, queries, gallery).values
    near = 1e-5 if precision == "float32" else 0.03
    for one, other in zip(found["cpu"][:2], found["cuda"][:2], strict=True):
        torch.testing.assert_close(other, one, atol=near, rtol=0)
    for name, values in found["cpu"][2].items():
        assert found["cuda"][2][name].cpu().nanmean() == pytest.approx(values.nanmean(), abs=near)


@pytest.mark.parametrize("make", [cir_benchmark, sbir_benchmark])
def test_scoring_gives_the_same_figures(make):
    benchmark = make()
    queries, gallery = (whole_numbers(len(one), 8, at) for at, one in enumerate((benchmark.queries, benchmark.gallery)))
    here, there = score(benchmark, queries, gallery), score(benchmark, queries.cuda(), gallery.cuda())
    assert there.ranking.positions.cpu().equal(here.ranking.positions)
    for name, values in here.values.items():
        torch.testing.assert_close(there.values[name].cpu(), values, equal_nan=True)


@pytest.mark.enable_socket  # Lightning looks for a port that is free
@pytest.mark.parametrize(
    ("strategy", "precision"),
    [("auto", "32-true"), ("auto", "bf16-mixed"), ("auto", "16-mixed"), ("ddp", "bf16-mixed"), ("fsdp", "bf16-mixed")],
)
def test_a_training_ends_where_the_cpu_s_does(tmp_path, strategy, precision):
    best = {}
    for device in ("cpu", "cuda"):
        model = trainable("transagg", "union")
        benchmarks = [cir_benchmark(), sbir_benchmark()]
        data = IGROTDataModule(
            triplets(),
            benchmarks,
            extractor(tmp_path / device, model.backbone),
            query_tokens=True,
            target_tokens=False,
            batch_size=10,
        )
        machine = (
            TrainerConfig("cpu", 1)
            if device == "cpu"
            else TrainerConfig("gpu", 1, strategy=strategy, precision=precision)
        )
        learner = Learner(model, InfoNCE(scale=20.0), Recipe(epochs=1, rate=1e-4), benchmarks)
        best[device] = fit(learner, data, tmp_path / f"run {device}", trainer=machine, progress=False)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert best["cuda"]["val/score"] == pytest.approx(best["cpu"]["val/score"], abs=0.02)


@pytest.mark.parametrize(("precision", "near"), [("32-true", 1e-5), ("bf16-mixed", 0.03), ("16-mixed", 0.03)])
def test_rows_of_an_index_are_those_of_the_cpu(tmp_path, precision, near):
    images = tmp_path / "pictures"
    images.mkdir()
    for number, item in enumerate(shapes_cir("val", 10).gallery):
        item.image.open().resize((200, 150)).save(images / f"{number}.jpg")
    found = {}
    for device in ("cpu", "cuda"):
        model = load("tiny").to(device)
        index = MemoryIndex(model.backbone.dim)
        chosen = precision if device == "cuda" else "32-true"
        work = IngestOptions(batch_size=16, workers=2, progress=False, precision=chosen)
        report = ingest_images(index, model, list_images(str(images)), work)
        assert report.added == report.embedded == len(index) > 40
        rows = index.fetch(sorted(str(path) for path in images.iterdir()))
        found[device] = rows.vectors
        assert {Image.open(io.BytesIO(small)).size for small in rows.columns["thumbnail"]} == {(160, 120)}
    torch.testing.assert_close(found["cuda"], found["cpu"], atol=near, rtol=0)


def test_an_encoder_is_tuned_on_a_gpu():
    model = load("tiny").to("cuda")
    model.tune(("image", "text"))
    world = shapes_cir("val", 8)
    images = image_batch([query.image for query in world.queries], model.preprocess).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        queries = model.embed_queries(images, [query.text for query in world.queries])
        loss = InfoNCE()(queries, model.embed_gallery(images), torch.arange(8, device="cuda"))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.backbone.parameters() if p.requires_grad)


@torch.no_grad()
def test_the_published_model_is_itself_on_a_gpu():
    """The golden values of the reference model on seeded weights, which the CPU meets to 1e-5."""
    model = load_reference_checkpoint(golden_state("mini"), model="base", target="union").to("cuda")
    images, targets = (pictures.cuda() for pictures in golden_images("mini"))
    found = {
        "query": model.embed_queries(images, list(TEXTS)),
        "union_target": model.embed_gallery(targets),
        "image_tokens": model.backbone.encode_image(targets).tokens,
        "text_tokens": model.backbone.encode_text(list(TEXTS)).tokens,
    }
    with np.load(HERE / "golden/mini.npz") as golden:
        for name, values in found.items():
            torch.testing.assert_close(values.cpu(), torch.from_numpy(golden[name]), atol=1e-4, rtol=0)


def test_the_commands_use_it_by_themselves(tmp_path):
    settings = [one for one in SMALL if one != "strategy=cpu"]
    train([*settings, f"output_dir={tmp_path / 'gpu'}", "features.precision=bfloat16", "precision=bf16"])
    train([*SMALL, f"output_dir={tmp_path / 'cpu'}"])
    rows = {name: {(r["benchmark"], r["method"]): r for r in rows_of(tmp_path / name)} for name in ("gpu", "cpu")}
    assert rows["gpu"].keys() == rows["cpu"].keys()
    for key, row in rows["cpu"].items():
        name, found = row["protocol"]["primary"], rows["gpu"][key]
        # Percent, of 24 queries: half precision may turn an answer or two.
        assert found["metrics"][name] == pytest.approx(row["metrics"][name], abs=15 if key[1] == "trained" else 3), key
        assert found["arithmetic"]["device"].startswith("cuda:0 (")
        assert (found["arithmetic"]["precision"], row["arithmetic"]["device"]) == ("bfloat16", "cpu")
    evaluate(
        [f"checkpoint={tmp_path / 'gpu'}", f"output_dir={tmp_path / 'again'}", "progress=false", "data.queries=24"]
    )
    assert json.loads((tmp_path / "again" / "results.json").read_text())
