"""Training and evaluation runs with their files; `union-train`, `union-eval` and `union_igrot.train` call these.

Settings are plain nested values with the groups and names of `conf/`; see `run_training` for those of a training.
"""

import hashlib
import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from union_igrot.datasets.submission import check_submission, read_predictions, write_circo, write_cirr
from union_igrot.errors import ConfigError, DataError, UnionError
from union_igrot.evaluation.evaluate import (
    average_parts,
    correct_embeddings,
    describe_validation,
    evaluate_benchmark,
    method_result,
    versions,
)
from union_igrot.evaluation.results import EvaluationResult, ScoredBenchmark, write_query_values, write_results
from union_igrot.evaluation.scoring import score, score_predictions
from union_igrot.evaluation.tables import correction_lines, print_results
from union_igrot.features.embedding import embed_benchmark
from union_igrot.features.extractor import FeatureExtractor
from union_igrot.features.store import FeatureStore
from union_igrot.images.decode import open_image
from union_igrot.images.identity import image_identities
from union_igrot.models.backbones.base import Backbone
from union_igrot.models.devices import device_name
from union_igrot.models.factory import build_backbone, build_projector, build_query_head, build_target_head
from union_igrot.models.model import IGROTModel, load
from union_igrot.reporting.charts import read_curves
from union_igrot.reporting.contact_sheets import TILE_SIDE, benchmark_sheet
from union_igrot.reporting.model_card import write_model_card
from union_igrot.reporting.page import SIDE, Provenance, write_page
from union_igrot.storage.cache import chosen_limit, default_root
from union_igrot.storage.files import expand_user, write_atomic
from union_igrot.terminal import print_line
from union_igrot.training.data import mean_name, read_evaluated, read_training
from union_igrot.training.datamodule import IGROTDataModule
from union_igrot.training.distillation import can_distill, distill_target
from union_igrot.training.learner import Learner, TrainerConfig, fit, load_best
from union_igrot.training.loggers import open_loggers
from union_igrot.training.losses import BankLoss, build_loss
from union_igrot.training.processes import Processes, leave_process_group
from union_igrot.training.run_folder import open_run, settings_hash
from union_igrot.training.settings import Recipe
from union_igrot.types import Benchmark, TrainingSet

PAGE = "report.html"
"""Name of the report in a run's folder."""
NOT_HASHED = {"output_dir", "cache_dir", "cache_limit", "progress"}
"""Settings that do not change the results, so that a run resumes if they differ."""
_ENCODERS: dict[str, tuple[Any, ...]] = {"none": (), "text": ("text",), "image": ("image",), "both": ("image", "text")}
CALIBRATION_QUERIES = 2000
"""Most training queries of a task that are saved with a model."""
_SUBMITTED = ("circo", "cirr")
"""Benchmarks with a server that scores submission files."""
_REFERENCE_SIZES = {"blip": (2048, 8), "openclip_h": (2048, 8)}


@dataclass(frozen=True)
class Launch:
    """How a run was started, for its files.

    Attributes:
        program: The command or function, such as `union-train`.
        command: The whole command line or call.
        config: The settings as YAML, for `config.yaml`.
    """

    program: str
    command: str
    config: str


@dataclass(frozen=True)
class RunData:
    """Data of a training run.

    Attributes:
        samples: Training triplets; None if they are not needed.
        validation: Benchmarks that select the best epoch.
        test: Benchmarks that are evaluated at the end.
        mean: Name of the mean over `test`, if they are parts of one benchmark.
    """

    samples: TrainingSet | None
    validation: Sequence[Benchmark] = ()
    test: Sequence[Benchmark] = ()
    mean: str = ""

    @classmethod
    def read(cls, data: Mapping[str, Any], *, train: bool = True, evaluate: bool = True) -> "RunData":
        """Read or generate what is needed of a dataset, see `training.data.data_settings`."""
        samples, validation = read_training(data) if train else (None, [])
        return cls(samples, validation, read_evaluated(data) if evaluate else [], mean_name(data))


def hashed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide the results; runs of earlier versions have no `checkpoint` and `preprocess`."""
    absent = {"checkpoint"} if settings.get("checkpoint") is None else set()
    hashed = {key: value for key, value in settings.items() if key not in NOT_HASHED | absent}
    if hashed["model"].get("preprocess") is None:
        hashed["model"] = {key: value for key, value in hashed["model"].items() if key != "preprocess"}
    return hashed


def check_writable(folder: Path) -> None:
    """Raise ConfigError if a folder cannot be created or written to."""
    existing = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise ConfigError(f"cannot write output_dir {folder} ({existing} is not a writable folder); choose another")


def head_sizes(name: str, dim: int) -> dict[str, int]:
    """Return the sizes of heads that suit a backbone: inner width, and attention heads of the UNION head."""
    feedforward, heads = _REFERENCE_SIZES.get(name, (min(2048, 4 * dim), max(1, dim // 64)))
    return {"feedforward": feedforward, "union_heads": heads}


def build_model(settings: Mapping[str, Any], metadata: dict[str, Any], backbone: Backbone | None = None) -> IGROTModel:
    """Build a model with the heads of `checkpoint`, or untrained ones, whose weights torch's seed decides.

    Args:
        settings: `model`, `fusion`, `target` and `checkpoint` of a training's settings.
        metadata: Facts on the training, saved with the model.
        backbone: The backbone; None builds that of the settings.
    """
    chosen = settings["model"]
    backbone = backbone or build_backbone(chosen["name"], chosen["weights"], chosen.get("preprocess"))
    sizes, width = head_sizes(backbone.name, backbone.dim) | chosen, backbone.dim
    model = IGROTModel(
        backbone,
        build_query_head(width=width, sizes=sizes, **settings["fusion"]),
        build_target_head(width=width, sizes=sizes, **settings["target"]),
        metadata,
        build_projector(chosen["projector"], width),
    )
    if settings.get("checkpoint") is not None:
        _load_trained_heads(model, settings["checkpoint"])
    return model


def _load_trained_heads(model: IGROTModel, checkpoint: str) -> None:
    """Load the heads of a trained model into a new one, to train them further."""
    start = load(checkpoint)
    parts = ("backbone_fingerprint", "fusion", "target", "projector")
    given, built = start.describe(), model.describe()
    for part in parts:
        if given[part] != built[part]:
            raise ConfigError(
                f"checkpoint={checkpoint} has {part} {given[part]} (expected that of this training: {built[part]})"
            )
    model.load_state_dict(start.heads_state_dict(), strict=False)


def open_extractor(settings: Mapping[str, Any], backbone: Backbone, *, shown: bool = True) -> FeatureExtractor:
    """Open the feature store of a backbone.

    Args:
        settings: `cache_dir`, `cache_limit`, `progress` and `features`.
        backbone: The backbone.
        shown: False hides progress bars whatever the settings say.
    """
    root = default_root() if settings["cache_dir"] is None else expand_user(settings["cache_dir"])
    options, limit = settings["features"], chosen_limit(settings["cache_limit"])
    precision = options["precision"]
    return FeatureExtractor(
        backbone,
        FeatureStore.for_backbone(backbone, root, dtype=options["dtype"], precision=precision, limit=limit),
        batch_size=options["batch_size"],
        workers=options["workers"],
        precision=precision,
        progress=settings["progress"] and shown,
    )


def run_training(
    settings: Mapping[str, Any],
    launch: Launch,
    fresh: Path,
    device: torch.device,
    *,
    processes: Processes = Processes(),  # noqa: B008 - immutable
    data: RunData | None = None,
    backbone: Backbone | None = None,
    loss: nn.Module | None = None,
    evaluate: bool = True,
    shown: bool = True,
) -> tuple[IGROTModel, Path]:
    """Train the heads, evaluate them and write all files of the run; resume an interrupted run of the same settings.

    Args:
        settings: `model`, `data`, `fusion`, `target`, `loss`, `recipe`, `precision`, `strategy`, `logger`, `features`,
            `seed`, `output_dir`, `cache_dir`, `cache_limit`, `progress` and perhaps `checkpoint`.
        launch: How the run was started.
        fresh: A new folder, used if `output_dir` is None and there is no interrupted run next to it.
        device: Device of the evaluation.
        processes: This process among those of the run.
        data: What to train and evaluate on; None reads that of the settings.
        backbone: The backbone; None builds that of the settings.
        loss: The loss; None builds that of the settings.
        evaluate: Whether to read and evaluate the test data of the settings.
        shown: Whether to print results.

    Returns:
        The model, and the run's folder.

    Raises:
        UnionError: If the folder is in use, or the data are invalid; then a new folder is removed again.
    """
    if not processes.is_main:
        return _run_with_main(settings, processes, data, backbone, loss)
    chosen = None if settings["output_dir"] is None else expand_user(settings["output_dir"])
    try:
        run = open_run(chosen, fresh, settings_hash(hashed_settings(settings)))
    except UnionError:
        processes.broadcast("run", json.dumps(None))
        raise
    with run, run.discarded_on(UnionError):
        processes.broadcast("run", json.dumps([str(run.path), run.stage]))
        print_line(f"{'resuming' if run.resumed else 'run folder'} {run.path}", stderr=True)
        write_atomic(run.path / "config.yaml", launch.config)
        # The test data too are read before the training, so that mistakes in them are found at once.
        data = data or RunData.read(settings["data"], train=run.stage != "trained", evaluate=evaluate)
        if run.stage == "trained":
            model = IGROTModel.load(run.path / "model", backbone, settings["model"]["weights"])
        else:
            model = train_heads(settings, data, run.path, processes, backbone, loss)
            model.save(run.path / "model")
            run.set_stage("trained")
        model.to(device)
        if data.test:
            # Another extractor: the weights of a tuned backbone have changed.
            extractor, saved = open_extractor(settings, model.backbone), str(run.path / "model")
            evaluate_and_report(
                model,
                data.test,
                extractor,
                run.path,
                launch,
                settings["seed"],
                data.mean,
                checkpoint=saved,
                shown=shown,
            )
            write_model_card(run.path / "model", run.path / "results.json")
        run.set_stage("done")
        return model, run.path


def _run_with_main(
    settings: Mapping[str, Any],
    processes: Processes,
    data: RunData | None,
    backbone: Backbone | None,
    loss: nn.Module | None,
) -> tuple[IGROTModel, Path]:
    """Train together with rank 0, in its folder, and print nothing."""
    run = json.loads(processes.broadcast("run"))
    if run is None:
        raise SystemExit(2)
    folder, stage = Path(run[0]), run[1]
    if stage == "trained":
        return IGROTModel.load(folder / "model", backbone, settings["model"]["weights"]), folder
    try:
        data = data or RunData.read(settings["data"], evaluate=False)
        return train_heads(settings, data, folder, processes, backbone, loss), folder
    except UnionError:
        # Rank 0 meets and prints the same mistake; this process is ended before it repeats it.
        time.sleep(30)
        raise


def train_heads(
    settings: Mapping[str, Any],
    data: RunData,
    folder: Path,
    processes: Processes,
    backbone: Backbone | None = None,
    loss: nn.Module | None = None,
) -> IGROTModel:
    """Train the heads, alone or with the other processes of the run; see `run_training`.

    Returns:
        The model with the best epoch's weights, in evaluation mode; complete on rank 0.
    """
    lightning.seed_everything(settings["seed"], workers=True, verbose=False)
    samples, recipe, hashed = data.samples, Recipe(**settings["recipe"]), hashed_settings(settings)
    assert samples is not None
    facts = {"data": samples.name, "classes": list(samples.classes), "samples": len(samples.triplets)}
    facts["validation"] = describe_validation(data.validation)
    model = build_model(settings, {**facts, "skipped": samples.skipped, "config": hashed}, backbone)
    extractor = open_extractor(settings, model.backbone, shown=processes.is_main)
    tuned = _ENCODERS[settings["model"]["finetune"]]
    model.tune(tuned)
    if recipe.checkpointing:
        model.backbone.checkpoint_activations()
    loss = loss or build_loss(**settings["loss"])
    learner = Learner(model, loss, recipe, data.validation)
    batches = IGROTDataModule(
        samples,
        data.validation,
        extractor,
        query_tokens=model.fusion.needs_tokens,
        target_tokens=model.target.needs_tokens,
        batch_size=recipe.batch_size,
        seed=settings["seed"],
        tuned=tuned,
        bank_size=loss.bank_size if isinstance(loss, BankLoss) else None,
        fused_targets=isinstance(loss, BankLoss) and loss.auxiliary > 0 and model.fusion.needs_tokens,
    )
    where, devices, nodes = settings["strategy"], settings["strategy"]["devices"], settings["strategy"]["nodes"]
    if processes.world > 1:
        devices, nodes = processes.per_machine, processes.world // processes.per_machine
    trainer = TrainerConfig(where["accelerator"], devices, nodes, where["name"], settings["precision"]["trainer"])
    checkpoints, progress = folder / "checkpoints", settings["progress"]
    begin, resumed = time.perf_counter(), (checkpoints / "last.ckpt").exists()
    with open_loggers(folder=folder, settings=hashed, main=processes.is_main, **settings["logger"]) as logger:
        best = fit(learner, batches, checkpoints, trainer=trainer, logger=logger, progress=progress)
    leave_process_group()
    if processes.is_main:
        seconds, device = timedelta(seconds=round(time.perf_counter() - begin)), device_name(model.device)
        spent = {"seconds": round(seconds.total_seconds()), "device": device, "processes": processes.world}
        model.metadata["training"] = spent | ({"resumed": True} if resumed else {})
        trained = f"trained on {samples.name} in {seconds} on {device}, best epoch {best['epoch'] + 1:.0f}"
        print_line(f"{trained} of {recipe.epochs}", stderr=True)
    if where["name"].startswith("fsdp") and processes.is_main:
        model = build_model(settings, model.metadata)
        load_best(model, checkpoints)
        model.tuned = bool(tuned)
    model.metadata["best"] = best
    if processes.is_main:
        if isinstance(loss, BankLoss) and loss.distillation and can_distill(model):
            changed = open_extractor(settings, model.backbone) if tuned else extractor  # as its weights have changed
            distill_target(model, samples, changed, loss.distillation, settings["seed"])
        model.calibration = calibration_queries(model, samples, extractor, settings["seed"], tuned=bool(tuned))
    model.training_images = image_identities(side for one in samples.triplets for side in (one.image, one.target))
    return model


@torch.no_grad()
def calibration_queries(
    model: IGROTModel, samples: TrainingSet, extractor: FeatureExtractor, seed: int, *, tuned: bool
) -> dict[str, Tensor]:
    """Embed training queries of each task, at most `CALIBRATION_QUERIES`, for `evaluation.calibration`.

    Args:
        model: The trained model, in evaluation mode.
        samples: Its training samples.
        extractor: Extractor with its backbone, as it was before training.
        seed: Seed of the choice.
        tuned: Whether the backbone has changed since, so that its cached features are not used.
    """
    found: dict[str, Tensor] = {}
    for task in sorted({one.task for one in samples.triplets}):
        some = [one for one in samples.triplets if one.task == task]
        some = random.Random(f"calibration {seed}").sample(some, min(len(some), CALIBRATION_QUERIES))
        images, texts = [one.image for one in some], [one.text for one in some]
        if tuned:
            found[task] = model.encode_queries(images, texts, workers=extractor.workers).half()
            continue
        tokens = model.fusion.needs_tokens
        keys = extractor.extract_images(images, tokens=tokens), extractor.extract_texts(texts)
        parts = []
        for at in range(0, len(some), extractor.batch_size):
            block = (extractor.lookup(side[at : at + extractor.batch_size], tokens=tokens) for side in keys)
            parts.append(model.embed_queries(*block).half().cpu())
        found[task] = torch.cat(parts)
    return found


def evaluate_and_report(
    model: IGROTModel,
    benchmarks: Sequence[Benchmark],
    extractor: FeatureExtractor,
    folder: Path,
    launch: Launch,
    seed: int,
    mean: str = "",
    *,
    checkpoint: str | None,
    shown: bool = True,
    **options: Any,
) -> EvaluationResult:
    """Evaluate on each benchmark, write the results after each, print the tables.

    Writes `results.json`, `results.csv`, `queries-<benchmark>-<split>.safetensors` (the metrics of every query),
    `contact-<benchmark>.png` and `report.html`. A split without published targets gets submission files instead of
    metrics.

    Args:
        model: The model.
        benchmarks: The benchmarks.
        extractor: Extractor with the model's backbone.
        folder: The run's folder.
        launch: How the run was started.
        seed: Seed of the random baseline and of the bootstrap.
        mean: Name of the mean over the benchmarks, if they are parts of one.
        checkpoint: Where the trained heads were loaded from; None evaluates the baselines of the backbone alone.
        shown: Whether to print the tables.
        **options: `calibration`, `query_expansion`, `fusions` and `corpora` of `evaluate_benchmark`.
    """
    result, parts = EvaluationResult(), []
    opener = partial(open_image, at_least=TILE_SIDE)
    for benchmark in benchmarks:
        if not any(query.targets for query in benchmark.queries):
            corrections = options.get("calibration", 0.0), options.get("query_expansion", 0)
            result += EvaluationResult(scored=(submit(model, benchmark, extractor, folder, *corrections),))
            continue
        found = evaluate_benchmark(
            model,
            benchmark,
            extractor,
            seed,
            trained=checkpoint is not None,
            checkpoint=checkpoint,
            **options,
        )
        parts.append(found)
        result += found
        write_results(folder, result)
        (scored,), (one,) = found.scored, found.benchmarks
        write_query_values(folder, scored)
        benchmark_sheet(folder / f"contact-{benchmark.name}.png", scored, one.main.method, opener)
    if mean and len(parts) > 1:
        result += average_parts(parts, mean, seed)
        write_results(folder, result)
    _report(result, folder, launch, model.metadata, seed, shown=shown)
    return result


def report_predictions(path: Path, benchmarks: Sequence[Benchmark], folder: Path, launch: Launch, seed: int) -> None:
    """Score a file of rankings, made by any method, and print and write its metrics.

    Raises:
        ConfigError: If there is more than one benchmark, or it has no such files.
        DataError: If the file does not fit the benchmark, or the benchmark's targets are not published.
    """
    if len(benchmarks) != 1:
        raise ConfigError(f"predictions are of one benchmark, not {len(benchmarks)}; choose data=cirr or data=circo")
    rankings = read_predictions(path, benchmarks[0])
    if not any(query.targets for query in benchmarks[0].queries):
        problems = check_submission(path, benchmarks[0])
        raise DataError(
            f"{path}: this split's targets are not published; " + ("; ".join(problems[:5]) or "the file is valid")
        )
    benchmark, scores = score_predictions(benchmarks[0], rankings)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    method = method_result(benchmark, "predictions", scores, {"file": path.name, "sha256": digest}, {}, seed)
    result = EvaluationResult((method,), (ScoredBenchmark(benchmark, {"predictions": scores}),))
    write_results(folder, result)
    _report(result, folder, launch, {}, seed)


def submit(
    model: IGROTModel,
    benchmark: Benchmark,
    extractor: FeatureExtractor,
    folder: Path,
    calibration: float = 0.0,
    query_expansion: int = 0,
) -> ScoredBenchmark:
    """Write the submission files of a split whose targets are not published (CIRR, CIRCO).

    Raises:
        ConfigError: If no server accepts such files; before anything is encoded.
    """
    if benchmark.name not in _SUBMITTED:
        raise ConfigError(
            f"the targets of {benchmark.name} {benchmark.split} are not published, and no server scores it; choose a "
            f"split with targets, or one of {', '.join(_SUBMITTED)}"
        )
    embedded = embed_benchmark(model, benchmark, extractor)
    queries, gallery, used = correct_embeddings(model, benchmark, embedded, calibration, query_expansion)
    for line in correction_lines(used):
        print_line(line)
    scores = score(benchmark, queries, gallery)
    names = [item.id for item in benchmark.gallery]
    rankings = [[names[at] for at in row] for row in scores.ranking.positions.tolist()]
    if benchmark.name == "circo":
        written: tuple[Path, ...] = (write_circo(folder / "submission_circo.json", benchmark, rankings),)
    else:
        subsets = [] if scores.subsets is None else scores.subsets.tolist()
        written = write_cirr(folder, benchmark, rankings, [[names[at] for at in row if at >= 0] for row in subsets])
    for path in written:
        print_line(f"submission file {path}")
    return ScoredBenchmark(benchmark, {"submitted": scores})


def _report(
    result: EvaluationResult,
    folder: Path,
    launch: Launch,
    metadata: Mapping[str, Any],
    seed: int,
    *,
    shown: bool = True,
) -> None:
    """Write the report of a run and print its tables."""
    names = dict.fromkeys(one.benchmark.name for one in result.scored)
    provenance = Provenance(
        title=f"{launch.program}: {', '.join(names)}",
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        command=launch.command,
        folder=_relative_to_home(Path.cwd()),
        config=launch.config,
        card=metadata,
        versions=versions(),
        seed=seed,
    )
    curves = read_curves(sorted(folder.glob("logs/version_*/metrics.csv")))
    losses = [name for name in curves if name.startswith("train/loss_")] or ["train/loss"]
    drawn = {name: x for name, x in curves.items() if name in {*losses, "val/score"} or "/mAP" in name}
    # Only thumbnails are shown, so photos are decoded at a fraction of their size.
    write_page(folder / PAGE, result, drawn, provenance, partial(open_image, at_least=SIDE))
    if shown:
        print_results(result)
        print_line(f"written to {folder}; open {folder / PAGE}")


def _relative_to_home(folder: Path) -> str:
    """Return a folder without the user's name: reports are shared."""
    with suppress(ValueError, RuntimeError):
        return str(Path("~") / folder.relative_to(Path.home()))
    return str(folder)
