"""Two processes train and validate as one does on the joined batch.

The processes are started here, as a cluster would, and meet through a file.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from small_world import LinearBackbone, cir_benchmark, extractor, sbir_benchmark, trainable, triplets
from union_igrot.evaluation.evaluate import means
from union_igrot.evaluation.scoring import score
from union_igrot.features.embedding import embed_benchmark
from union_igrot.training.datamodule import IGROTDataModule
from union_igrot.training.learner import Learner, Recipe, TrainerConfig, fit
from union_igrot.training.losses import BankLoss, InfoNCE

pytestmark = pytest.mark.slow

CHILD = """
import os
import sys
from datetime import timedelta
from pathlib import Path

sys.path[:0] = [f"{sys.argv[3]}/training", sys.argv[3]]
import torch
import torch.distributed as dist

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group(
    "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
)
from test_distributed import LOSSES, TrainerConfig, train

for loss in LOSSES:
    train(folder, TrainerConfig("cpu", 2, strategy="ddp"), 5, f"rank{rank}", loss)
dist.destroy_process_group()
# Gone at once: the threads of a backend may outlive the interpreter and end it with an abort.
sys.stdout.flush()
os._exit(0)
"""


LOSSES = ("symmetric", "bank", "queue")
"""InfoNCE; a sample of a bank of cached features; a queue of past batches of an encoder that is tuned."""


class Watch(Callback):
    """Keeps losses, reduced gradients and validation metrics."""

    def __init__(self):
        self.losses, self.gradients, self.figures = [], {}, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):  # noqa: ARG002
        self.losses.append(outputs["loss"].item())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):  # noqa: ARG002
        named = [(name, p.grad) for name, p in pl_module.model.named_parameters() if p.grad is not None]
        self.gradients |= {f"{trainer.global_step} {name}": gradient.clone() for name, gradient in named}

    def on_validation_end(self, trainer, pl_module):  # noqa: ARG002
        self.figures = {name: x.item() for name, x in trainer.callback_metrics.items() if name.startswith("val/")}


def benchmarks():
    return [cir_benchmark(), sbir_benchmark()]  # 23 and 25 queries, galleries of 31 and 29


def train(folder, config, batch_size, name, kind):
    """Train at rate 0, so that each step's loss and gradient are those of the same weights."""
    folder = folder / kind
    model = trainable("transagg", "union" if kind == "symmetric" else "residual", LinearBackbone())
    tuned = ("image",) if kind == "queue" else ()
    model.tune(tuned)
    filled = extractor(folder / "cache", model.backbone)
    loss = InfoNCE(scale=20.0, symmetric=True) if kind == "symmetric" else BankLoss(20.0, bank_size=50)
    data = IGROTDataModule(
        triplets(),
        benchmarks(),
        filled,
        query_tokens=True,
        target_tokens=False,
        batch_size=batch_size,
        tuned=tuned,
        bank_size=None if kind == "symmetric" else 50,
        fused_targets=kind == "bank",
    )
    learner = Learner(model, loss, Recipe(epochs=1, rate=0.0, backbone_rate=0.0), benchmarks())
    watch = Watch()
    run = folder / ("alone" if name == "alone" else "together")
    best = fit(learner, data, run, trainer=config, callbacks=[watch], progress=False)
    torch.save(watch.gradients, folder / f"{name}.pt")
    found = {
        "losses": watch.losses,
        "figures": watch.figures,
        "best": best,
        "encoded": sum(model.backbone.image_batches),
    }
    (folder / f"{name}.json").write_text(json.dumps(found))
    return model, filled


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    for loss in LOSSES:
        extractor(folder / loss / "cache")  # makes the folder, before both processes do
    # An earlier test's seed in the environment would seed the processes under DDP, but not the training alone.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PL_")}
    here = {**inherited, "WORLD_SIZE": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD]
    tests = str(Path(__file__).parents[1])
    children = [
        subprocess.Popen(
            [*command, str(rank), str(folder), tests],
            env={**here, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [child.communicate(timeout=300)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(said)
    runs = {}
    for loss in LOSSES:
        model, filled = train(folder, TrainerConfig("cpu", 1), 10, "alone", loss)
        names = ("rank0", "rank1", "alone")
        found = {name: json.loads((folder / loss / f"{name}.json").read_text()) for name in names}
        gradients = {name: torch.load(folder / loss / f"{name}.pt", weights_only=True) for name in names}
        runs[loss] = found, gradients, model, filled
    return runs


@pytest.fixture(params=LOSSES)
def runs(request, runs_of):
    return runs_of[request.param]


def test_the_mean_loss_of_two_processes_is_the_loss_of_the_joined_batch(runs):
    found, *_ = runs
    halves = list(zip(found["rank0"]["losses"], found["rank1"]["losses"], strict=True))
    assert len(halves) == 6
    assert [sum(pair) / 2 for pair in halves] == pytest.approx(found["alone"]["losses"], abs=1e-5)
    assert any(abs(first - second) > 1e-3 for first, second in halves)  # each has samples of its own


def test_gradients_are_those_of_the_joined_batch(runs):
    _, gradients, *_ = runs
    alone = gradients["alone"]
    assert len(alone) > 6 * 20
    assert sum(x.abs().max() > 1e-3 for x in alone.values()) > 80
    for name in ("rank0", "rank1"):
        assert gradients[name].keys() == alone.keys()
        for key, expected in alone.items():
            torch.testing.assert_close(gradients[name][key], expected, atol=1e-5, rtol=1e-4)


def test_validation_figures_are_those_of_one_process_and_of_the_evaluation(runs):
    found, _, model, filled = runs
    figures = found["alone"]["figures"]
    assert len(figures) == 1 + 7 + 4
    for name in ("rank0", "rank1"):
        assert found[name]["figures"] == pytest.approx(figures, abs=1e-6)
        assert found[name]["best"] == pytest.approx(found["alone"]["best"], abs=1e-6)
    for benchmark in benchmarks():
        queries, gallery, _ = embed_benchmark(model.eval(), benchmark, filled)
        for name, figure in means(benchmark, score(benchmark, queries, gallery)).items():
            assert figures[f"val/{benchmark.name}/{name}"] == pytest.approx(figure, abs=1e-4)


def test_one_process_encodes_for_all(runs_of):
    found, *_ = runs_of["symmetric"]
    assert found["rank0"]["encoded"] > 0
    assert found["rank1"]["encoded"] == 0
    assert found["alone"]["encoded"] == 0  # it came last
