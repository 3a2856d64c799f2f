"""`union-push`: a trained model shared on a hub.

Knows which folder is meant and which card goes with it. Does not know how anything is transferred.
"""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from union_igrot.cli.command import run_command
from union_igrot.storage.paths import expand_user


def main(argv: Sequence[str] | None = None) -> None:
    """Run `union-push`."""
    run_command("push", push, argv, literal=("checkpoint", "repo", "branch", "results"))


def push(config: DictConfig, fresh: Path) -> None:
    """Push a saved model's files and its card, and print where they are."""
    # Heavy parts are imported here: --help and mistakes in the configuration answer at once.
    from rich.console import Console

    from union_igrot.errors import ConfigError
    from union_igrot.evaluation.results import EvaluationResult
    from union_igrot.models.hub import push_folder

    del fresh
    folder = expand_user(config.checkpoint)
    folder = folder / "model" if (folder / "model").is_dir() else folder
    if config.license is not None and config.results is None:
        raise ConfigError("license goes into a card that is written anew; give results=results.json along with it")
    told = {}
    if config.results is not None:
        results = expand_user(config.results)
        results = results / "results.json" if results.is_dir() else results
        result = EvaluationResult.load(results) if results.is_file() else EvaluationResult()
        told = {"result": result, "license": config.license}
        if not result.methods:
            raise ConfigError(f"{results} holds no metrics; give a results.json of union-train or union-eval")
    address = push_folder(folder, config.repo, private=config.private, branch=config.branch, **told)
    console = Console()
    for line in (address, f'union_igrot.load("{config.repo}"), or union-eval checkpoint={config.repo}'):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
