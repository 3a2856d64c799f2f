"""Models on a hub: their names, their files fetched and shared, and one clear line where that fails.

The transfer is huggingface_hub's, through its `ModelHubMixin`. Knows which files a saved model has.
Does not know what is in them.
"""

import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

from huggingface_hub import HfApi, ModelCard, ModelHubMixin, constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from union_igrot.errors import CheckpointError, first_line
from union_igrot.models.checkpoint import NOTES, README, read_saved
from union_igrot.reporting.model_card import rename_model_card, render_model_card
from union_igrot.storage.paths import expand_user

M = TypeVar("M", bound="HubModel")

FILES = (
    "model.json",
    "heads.safetensors",
    "backbone.safetensors",
    "tokenizer/*",
    "training_images.txt",
    "README.md",
)
"""What is fetched of a model's repository; anything else in it is left there."""
# Errors of the library's HTTP client that it hands on as they are: their kind is the base of its own.
_CLIENT = cast(type[Exception], HfHubHTTPError.__mro__[1])
_FAILURES = (OSError, EntryNotFoundError, HFValidationError, _CLIENT)


def split_name(name: str) -> tuple[str, str | None] | None:
    """Part `owner/name@revision` into repository and revision; None where it is no such name."""
    found = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?:@(\S+))?", name)
    return None if found is None else (found[1], found[2])


def fetch_model(repository: str, revision: str | None = None, **options: Any) -> Path:
    """Fetch a saved model, or find what was fetched before.

    Args:
        repository: `owner/name`.
        revision: A branch, tag or commit; the latest of `main` where None.
        options: As `huggingface_hub.snapshot_download` takes them.

    Returns:
        A folder with the model's files, in the library's cache.

    Raises:
        CheckpointError: Where there is no such model or revision, it is not open to this user, or it cannot be
            reached and was not fetched before.
    """
    with hub_errors(repository, revision, f"{repository} is no folder here, and "):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(FILES), **options))


@contextmanager
def hub_errors(repository: str, revision: str | None = None, before: str = "") -> Iterator[None]:
    """Turn what may go wrong between here and a hub into one line that says what was tried and what to do.

    Args:
        repository: `owner/name`.
        revision: A branch, tag or commit.
        before: What the line begins with.

    Raises:
        CheckpointError: In place of the library's own errors.
    """
    tried = f"{before}{constants.ENDPOINT}/{repository}" + (f" at revision {revision}" if revision else "")
    try:
        yield
    except GatedRepoError:
        raise CheckpointError(
            f"{tried} is open to some users only; ask for access there, then `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{tried} does not exist or is private; check the name, or `hf auth login` with an account that may use it"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{tried} does not exist; give a branch, tag or commit of {repository}") from None
    except LocalTokenNotFoundError:
        raise CheckpointError(f"{tried} needs an account; run `hf auth login`, or set HF_TOKEN") from None
    except _FAILURES as error:
        raise CheckpointError(
            f"{tried} cannot be reached or does not accept this ({first_line(error)}); check name, network and account "
            "(`hf auth login`)"
        ) from None


def push_folder(
    folder: Path, repository: str, *, private: bool | None = None, branch: str | None = None, **told: Any
) -> str:
    """Share a saved model without building it, so that its backbone need not be there.

    Args:
        folder: What `save` wrote; its card goes along, under the model's new name.
        repository: `owner/name`; made where it does not exist.
        private: Whether a new repository is private; the account's default where None.
        branch: Where to push; `main` where None.
        told: `result` and `license` for a card that is written anew, as `report.card.model_card` takes them.

    Returns:
        The address of what was pushed.

    Raises:
        CheckpointError: Where the folder holds no whole model, the name is not one, or the hub refuses.
    """
    _check_name(repository)
    saved = read_saved(folder)
    notes = json.loads((folder / NOTES).read_text(encoding="utf-8"))
    if told or saved.readme is None:
        card = render_model_card(notes, name=repository, **told)
    else:
        card = rename_model_card(saved.readme, repository)
    with TemporaryDirectory() as place, hub_errors(repository):
        for pattern in FILES:
            for path in sorted(folder.glob(pattern)):
                copy = Path(place) / path.relative_to(folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
        notes["card"] = without_places(saved.card)
        (Path(place) / NOTES).write_text(json.dumps(notes, indent=2) + "\n", encoding="utf-8")
        (Path(place) / README).write_text(card, encoding="utf-8")
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(repository, branch=branch, exist_ok=True)
        return str(
            api.upload_folder(repo_id=repository, folder_path=place, revision=branch, commit_message="Push model")
        )


def _check_name(repository: str) -> None:
    if split_name(repository) != (repository, None):
        raise CheckpointError(f"{repository} is no name on the hub; give owner/name")


def without_places(card: dict[str, Any]) -> dict[str, Any]:
    """Keep of this machine's paths in a training's settings the last name alone: they are no one else's business."""
    config = deepcopy(card.get("config") or {})
    for group, key in (("data", "root"), ("model", "weights")):
        place = (config.get(group) or {}).get(key)
        if place is not None:
            config[group][key] = Path(str(place)).name
    return {**card, "config": config} if config else card


class HubModel(ModelHubMixin, ABC):
    """A saved model that can be shared on a hub and loaded from there.

    Attributes:
        card: What a reader has to know of the training.
        readme: The model card that lay beside the files this model was loaded from, or None.
        readme_for: Hash of the heads that this card is of.
    """

    metadata: dict[str, Any]
    readme: str | None = None
    readme_for: str = ""

    @abstractmethod
    def save(self, folder: str | Path) -> Path:
        """Write the model's files."""

    @classmethod
    @abstractmethod
    def load(cls: type[M], folder: str | Path, backbone: Any = None, weights: str | Path | None = None) -> M:
        """Read the model's files."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Say which model this is."""

    @classmethod
    def from_pretrained(
        cls: type[M],
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        backbone: Any = None,
        weights: str | Path | None = None,
        **options: Any,
    ) -> M:
        """Load a model from a folder or a hub.

        Args:
            pretrained_model_name_or_path: A folder written by `save`, or `owner/name` of a model on the Hugging
                Face hub, also `owner/name@revision`. A folder of that name comes first.
            revision: A branch, tag or commit on the hub; the latest of `main` where None.
            backbone: As `load`.
            weights: As `load`.
            options: Further ones of `huggingface_hub.snapshot_download`: `token`, `cache_dir`,
                `force_download`, `local_files_only`.

        Returns:
            The model in evaluation mode.

        Raises:
            CheckpointError: As `load`; where there is no such model; where the hub cannot be reached and the
                model was not fetched before.
        """
        folder = expand_user(pretrained_model_name_or_path)
        if folder.is_dir():
            return cls.load(folder, backbone, weights)
        named = split_name(str(pretrained_model_name_or_path))
        if named is None:
            raise CheckpointError(
                f"{pretrained_model_name_or_path} is not a saved model; give a folder with model.json and "
                "heads.safetensors, owner/name of a model on the Hugging Face hub, or a backbone such as base"
            )
        return cls.load(fetch_model(named[0], revision or named[1], **options), backbone, weights)

    def _save_pretrained(self, save_directory: Path) -> None:
        """Write the model's files for `save_pretrained` and `push_to_hub`; drop a card of other heads."""
        kept, self.metadata = self.metadata, without_places(self.metadata)
        try:
            self.save(save_directory)
        finally:
            self.metadata = kept
        card = save_directory / README
        if card.is_file() and self.describe()["heads"] not in card.read_text(encoding="utf-8"):
            card.unlink()

    def generate_model_card(self, *_: Any, name: str | None = None, **told: Any) -> ModelCard:
        """Return the model card: the one that lay beside the model's files, or one written from what it knows.

        Args:
            name: How the model is loaded, a folder or `owner/name`.
            told: `result`, an evaluation of the model; `license`, a name the hub
                knows. Where any is given, the card is written anew.
        """
        described = self.describe()
        if self.readme is not None and self.readme_for == described["heads"] and not told:
            return ModelCard(rename_model_card(self.readme, name))
        return ModelCard(render_model_card({**described, "card": self.metadata}, name=name, **told))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Share the heads, their description and a model card on the Hugging Face hub.

        Weights of a frozen backbone stay where they are; a tuned one's are shared along.

        Args:
            repo_id: `owner/name`; made where it does not exist.
            options: As `ModelHubMixin.push_to_hub` takes them: `private`, `token`, `branch`, `create_pr`,
                `commit_message`; `model_card_kwargs` are those of `generate_model_card`.

        Returns:
            The address of what was pushed.

        Raises:
            CheckpointError: Where the name is not one, or the hub cannot be reached or refuses.
        """
        _check_name(repo_id)
        options["model_card_kwargs"] = {"name": repo_id, **(options.get("model_card_kwargs") or {})}
        options = {"commit_message": "Push model", **options}
        with hub_errors(repo_id):
            return str(super().push_to_hub(repo_id, **options))
