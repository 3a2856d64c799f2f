"""Training changes the heads alone, chooses by the monitor and resumes to the same weights."""

import csv
import errno
import logging
import math
import os
import pickle
import signal
import warnings
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import FSDPPrecision

from small_world import LinearBackbone, cir_benchmark, extractor, sbir_benchmark, trainable, triplets
from union_igrot.errors import ConfigError, UnionError
from union_igrot.evaluation.evaluate import means
from union_igrot.evaluation.scoring import score
from union_igrot.features.embedding import embed_benchmark
from union_igrot.features.extractor import FeatureExtractor
from union_igrot.models.backbones.base import weights_hash
from union_igrot.training.datamodule import IGROTDataModule, TrainingBatch
from union_igrot.training.learner import (
    FSDPWithoutConversion,
    Learner,
    Recipe,
    TrainerConfig,
    fit,
    quiet_trainer,
    warmup_cosine,
)
from union_igrot.training.losses import InfoNCE
from union_igrot.types import Features

pytestmark = [
    # Lightning steps a resumed schedule before its optimizer has stepped; nothing is skipped.
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),
    # Its own use of a deprecated part of torch.
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]

CPU = TrainerConfig("cpu", 1)


class KilledError(Exception):
    """Stands for a process that was killed."""


class StopAfter(Callback):
    """Interrupts a training at the start of an epoch's step."""

    def __init__(self, epoch, step=2):
        self.epoch, self.step = epoch, step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):  # noqa: ARG002
        if trainer.current_epoch == self.epoch and batch_idx == self.step:
            raise KilledError


class Log(Callback):
    """Keeps the losses of the steps and the validation metrics of the epochs."""

    def __init__(self):
        self.losses, self.figures = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):  # noqa: ARG002
        self.losses.append(outputs["loss"].item())

    def on_validation_end(self, trainer, pl_module):  # noqa: ARG002
        figures = {name: x.item() for name, x in trainer.callback_metrics.items() if name.startswith("val/")}
        self.figures.append(figures)


def parts(folder, model, recipe=None, benchmarks=None, batch_size=10):
    benchmarks = [cir_benchmark(), sbir_benchmark()] if benchmarks is None else benchmarks
    filled = extractor(folder, model.backbone)
    data = IGROTDataModule(
        triplets(),
        benchmarks,
        filled,
        query_tokens=model.fusion.needs_tokens,
        target_tokens=model.target.needs_tokens,
        batch_size=batch_size,
    )
    return Learner(model, InfoNCE(scale=20.0), recipe or Recipe(epochs=2), benchmarks), data, filled


def heads(model):
    return {name: x.detach().clone() for name, x in model.heads_state_dict().items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One training that several tests look at."""
    folder = tmp_path_factory.mktemp("run")
    model = trainable("transagg", "union", dropout=0.1)
    before = weights_hash(model.backbone.state_dict()), heads(model)
    learner, data, filled = parts(folder / "cache", model, Recipe(epochs=2, rate=3e-3))
    log = Log()
    best = fit(learner, data, folder / "run", trainer=CPU, callbacks=[log], progress=False)
    return folder / "run", model, before, learner, filled, log, best


def test_the_backbone_is_the_same_after_a_training_and_the_heads_are_not(trained):
    _, model, (backbone, start), *_ = trained
    assert weights_hash(model.backbone.state_dict()) == backbone
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())
    changed = {name for name, x in model.heads_state_dict().items() if not x.equal(start[name])}
    assert {name.split(".")[0] for name in changed} == {"fusion", "target"}
    # Of two equal tokens T5's bias by distance and the last bias of a softmax change nothing; all else learns.
    assert len(changed) >= 0.9 * len(start)


def test_checkpoints_hold_the_heads_alone_and_open_without_pickle(trained):
    folder, model, *_ = trained
    for name in ("best.ckpt", "last.ckpt"):
        saved = torch.load(folder / name, weights_only=True)
        assert set(saved["state_dict"]) == {f"model.{head}" for head in model.heads_state_dict()}
        assert {key.split(".")[1] for key in saved["state_dict"]} == {"fusion", "target"}


def test_validation_figures_are_those_of_the_evaluation(trained):
    _, model, _, learner, filled, log, best = trained
    logged = log.figures[int(best["epoch"])]
    primary = []
    for benchmark in learner.benchmarks:
        queries, gallery, _ = embed_benchmark(model.eval(), benchmark, filled)
        expected = means(benchmark, score(benchmark, queries, gallery))
        primary.append(expected[benchmark.protocol.primary])
        for name, figure in expected.items():
            assert logged[f"val/{benchmark.name}/{name}"] == pytest.approx(figure, abs=1e-4)
    assert logged["val/score"] == pytest.approx(sum(primary) / 2, abs=1e-4)
    assert best["val/score"] == pytest.approx(max(figures["val/score"] for figures in log.figures))
    assert set(logged) == set(learner.metric_names())


def test_the_model_is_left_ready_to_evaluate(trained):
    _, model, *_ = trained
    assert not any(module.training for module in model.modules())


@pytest.mark.slow
def test_the_loss_goes_down_on_few_samples(tmp_path):
    model = trainable("transagg", "union")
    learner, data, _ = parts(tmp_path / "cache", model, Recipe(epochs=15, rate=5e-3), [sbir_benchmark(6, 8)], 20)
    log = Log()
    fit(learner, data, tmp_path / "run", trainer=CPU, callbacks=[log], progress=False)
    steps = 3
    assert sum(log.losses[-steps:]) < 0.5 * sum(log.losses[:steps])


class Ruin(Callback):
    """Destroys the heads at the start of an epoch, so that what follows is worse."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_validation_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            noise = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for p in pl_module.model.parameters():
                    if p.requires_grad:
                        p.copy_(5 * torch.randn(p.shape, generator=noise))


@pytest.mark.slow
@pytest.mark.parametrize("monitor", ["val/score", "val/noise_sbir/mAP"])
def test_the_best_epoch_is_kept_where_the_last_is_worse(tmp_path, monitor):
    model = trainable("transagg", "union")
    learner, data, _ = parts(tmp_path / "cache", model, Recipe(epochs=3, monitor=monitor))
    log = Log()
    best = fit(learner, data, tmp_path / "run", trainer=CPU, callbacks=[Ruin(2), log], progress=False)
    column = [figures[monitor] for figures in log.figures]
    assert column[2] < max(column)
    assert best["epoch"] == column.index(max(column)) < 2
    assert best[monitor] == pytest.approx(max(column))
    saved = torch.load(tmp_path / "run" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(x.equal(saved[f"model.{name}"]) for name, x in model.heads_state_dict().items())
    last = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    assert any(not x.equal(saved[name]) for name, x in last.items())


@pytest.mark.slow
def test_an_interruption_goes_to_the_caller_who_can_go_on(tmp_path):
    """Lightning would end the process with code 1 and leave Ctrl-C ignored."""

    class CtrlC(StopAfter):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):  # noqa: ARG002
            if trainer.current_epoch == self.epoch and batch_idx == self.step:
                raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    for callbacks in ([CtrlC(1)], []):
        model = trainable("transagg", "frozen")
        learner, data, _ = parts(tmp_path / "cache", model, Recipe(epochs=2), [cir_benchmark(6)])
        with pytest.raises(KeyboardInterrupt) if callbacks else nullcontext():
            fit(learner, data, tmp_path / "run", trainer=CPU, callbacks=callbacks, progress=False)
        assert signal.getsignal(signal.SIGINT) is before
    assert (tmp_path / "run" / "last.ckpt").is_file()


def test_an_unknown_monitor_is_an_error_that_names_the_known():
    with pytest.raises(ConfigError, match=r"val/nope.*val/score, val/noise_cir/R@1.*val/noise_sbir/mAP@10"):
        Learner(trainable(), InfoNCE(), Recipe(monitor="val/nope"), [cir_benchmark(), sbir_benchmark()])


def test_nothing_to_train_is_an_error_before_anything_is_encoded():
    with pytest.raises(ConfigError, match="nothing to train"):
        Learner(trainable("sum", "frozen"), InfoNCE(), Recipe(), [cir_benchmark()])


def test_the_rate_rises_and_falls():
    rates = [warmup_cosine(step, 100, 0.1, 0.01) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[55] == pytest.approx(0.01 + 0.99 / 2)
    assert rates[100] == pytest.approx(0.01)
    assert all(later <= earlier for earlier, later in pairwise(rates[9:]))
    assert warmup_cosine(33, 90, 0.0, 0.2) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 32 / 89)))
    assert warmup_cosine(0, 1, 0.05, 0.01) == 1.0
    assert warmup_cosine(500, 100, 0.1, 0.01) == pytest.approx(0.01)


@pytest.mark.slow
def test_the_schedule_ends_at_its_floor_and_vectors_do_not_decay(tmp_path):
    class Rates(Callback):
        def __init__(self):
            self.rates, self.groups = [], []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):  # noqa: ARG002
            self.groups = trainer.optimizers[0].param_groups
            self.rates.append(self.groups[0]["lr"])

    model = trainable("transagg", "frozen")
    recipe = Recipe(epochs=2, rate=1e-3, warmup=0.25, floor=0.1, weight_decay=0.3, eps=1e-6)
    learner, data, _ = parts(tmp_path / "cache", model, recipe, [cir_benchmark(6)], batch_size=10)
    seen = Rates()
    fit(learner, data, tmp_path / "run", trainer=CPU, callbacks=[seen], progress=False)
    steps = 2 * (4 + 2)
    assert seen.rates == pytest.approx([1e-3 * warmup_cosine(step, steps, 0.25, 0.1) for step in range(1, steps + 1)])
    assert {(p.ndim > 1, group["weight_decay"], group["eps"]) for group in seen.groups for p in group["params"]} == {
        (True, 0.3, 1e-6),
        (False, 0.0, 1e-6),
    }
    held = sum(p.numel() for group in seen.groups for p in group["params"])
    assert held == sum(p.numel() for p in model.fusion.parameters())


@pytest.mark.slow
def test_a_resumed_training_ends_like_an_uninterrupted_one(tmp_path):
    epoch = 2

    def run(folder, callbacks=(), seed=7):
        model = trainable("transagg", "union", dropout=0.3)
        learner, data, _ = parts(tmp_path / "cache", model, Recipe(epochs=3, rate=3e-3))
        torch.manual_seed(seed)
        log = Log()
        best = fit(learner, data, folder, trainer=CPU, callbacks=[log, *callbacks], progress=False)
        return model, best, log.losses

    whole, best, losses = run(tmp_path / "whole")
    with pytest.raises(KilledError):
        run(tmp_path / "cut", [StopAfter(epoch)])
    resumed, best_resumed, losses_resumed = run(tmp_path / "cut", seed=99)  # the first run's seed counts
    assert losses_resumed == losses[6 * epoch :]
    assert best_resumed == best
    assert all(x.equal(whole.heads_state_dict()[name]) for name, x in resumed.heads_state_dict().items())
    finals = [torch.load(tmp_path / run / "last.ckpt", weights_only=True) for run in ("whole", "cut")]
    assert finals[0]["state_dict"].keys() == finals[1]["state_dict"].keys()
    assert all(x.equal(finals[1]["state_dict"][name]) for name, x in finals[0]["state_dict"].items())


@pytest.mark.slow
def test_a_finished_training_is_not_trained_again(trained):
    folder, _, _, learner, filled, _, best = trained
    model = trainable("transagg", "union", backbone=LinearBackbone(), seed=5, dropout=0.1)
    again, data, _ = parts(filled.store.root, model, learner.recipe)
    log = Log()
    assert fit(again, data, folder, trainer=CPU, callbacks=[log], progress=False) == best
    assert log.losses == []
    saved = torch.load(folder / "best.ckpt", weights_only=True)["state_dict"]
    assert all(x.equal(saved[f"model.{name}"]) for name, x in model.heads_state_dict().items())


@pytest.mark.slow
def test_an_encoder_with_a_bar_trains_the_same(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    model = trainable("transagg", "frozen")
    learner, _, filled = parts(tmp_path / "cache", model, Recipe(epochs=1), [cir_benchmark(6)])
    shown = FeatureExtractor(model.backbone, filled.store, workers=0, progress=True)
    data = IGROTDataModule(triplets(), [cir_benchmark(6)], shown, query_tokens=True, target_tokens=False, batch_size=10)
    fit(learner, data, tmp_path / "run", trainer=CPU, progress=True)
    assert "encoding training queries" in capfd.readouterr().err


def test_fsdp_leaves_batches_as_they_are():
    """Lightning's own conversion sets fields, which ours refuse."""
    features = Features(torch.ones(2, 3))
    batch = TrainingBatch(features, features, features, torch.arange(2))
    assert FSDPWithoutConversion("bf16-mixed").convert_input(batch) is batch
    with pytest.raises(ValueError, match="frozen dataclass"):
        FSDPPrecision("bf16-mixed").convert_input(batch)


def test_only_expected_warnings_are_hidden(recwarn):
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    with quiet_trainer():
        warnings.warn("Found 3 module(s) in eval mode at the start of training", UserWarning, stacklevel=1)
        warnings.warn("something else", UserWarning, stacklevel=1)
        assert logger.level == logging.WARNING
    assert [str(one.message) for one in recwarn] == ["something else"]
    assert logger.level == before


@pytest.mark.parametrize("pressed", [True, False])
def test_only_ctrl_c_raises_keyboard_interrupt(pressed):
    def end():
        try:
            raise KeyboardInterrupt if pressed else ValueError
        except (KeyboardInterrupt, ValueError):
            raise SystemExit(1)  # noqa: B904 - as Lightning does it

    with pytest.raises(KeyboardInterrupt if pressed else SystemExit), quiet_trainer():
        end()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace_by_pickle(path):
    path.write_bytes(pickle.dumps({"state_dict": KilledError("not loaded")}))


def replace_by_foreign(path):
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "loops": {}, "epoch": 1, "global_step": 6, "seed": 0}, path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (replace_by_pickle, ("last.ckpt",)),
        (replace_by_foreign, ("last.ckpt",)),
        (cut, ("last.ckpt", "best.ckpt")),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_training_ends_the_same(tmp_path, damage, names, caplog):
    def run():
        learner, data, _ = parts(tmp_path / "cache", trainable("transagg", "frozen", dropout=0.1), Recipe(epochs=2))
        torch.manual_seed(7)
        return fit(learner, data, tmp_path / "run", trainer=CPU, progress=False), heads(learner.model)

    best, state = run()
    for name in names:
        damage(tmp_path / "run" / name)
    again, state_again = run()
    assert again == best
    assert all(x.equal(state_again[name]) for name, x in state.items())
    assert {path.name for path in (tmp_path / "run").glob("*.broken")} == {f"{name}.broken" for name in names}
    assert all(f"{name} is damaged" in caplog.text for name in names)


@pytest.mark.slow
def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("union_igrot.training.learner.write_atomic", full)
    learner, data, _ = parts(tmp_path / "cache", trainable(), Recipe(epochs=1), [cir_benchmark(6)])
    with pytest.raises(UnionError, match=r"^cannot write checkpoint \S+best.ckpt \(No space left.*to resume$"):
        fit(learner, data, tmp_path / "run", trainer=CPU, progress=False)


@pytest.mark.slow
def test_short_runs_log_the_loss_of_each_task_in_each_epoch(tmp_path):
    learner, data, _ = parts(tmp_path / "cache", trainable(), Recipe(epochs=3), [cir_benchmark(6)], batch_size=20)
    logger = CSVLogger(tmp_path)
    fit(learner, data, tmp_path / "run", trainer=CPU, logger=logger, progress=False)
    with Path(logger.log_dir, "metrics.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {row["epoch"] for row in rows if row["train/loss"]} == {"0", "1", "2"}
    for task in ("cir", "sbir"):
        assert any(row[f"train/loss_{task}"] == row["train/loss"] != "" for row in rows)
