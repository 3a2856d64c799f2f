"""Models on the Hugging Face hub: names, download, upload and the model card, with one-line errors."""

import json
import re
import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, ModelCardData, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from union_igrot.errors import CheckpointError
from union_igrot.models.checkpoint import (
    BACKBONE_FILE,
    HEADS_FILE,
    IMAGES_FILE,
    MODEL_FILE,
    README_FILE,
    TOKENIZER_FOLDER,
    read_checkpoint,
)
from union_igrot.models.download import CLIENT_ERROR, hub_errors, probe_timeout

UNNAMED = "OWNER/NAME"
"""The name of a model that has none on the hub yet, in its model card."""
TAGS = ("composed-image-retrieval", "sketch-based-image-retrieval", "image-retrieval", "union-igrot")
FILES = (MODEL_FILE, HEADS_FILE, BACKBONE_FILE, f"{TOKENIZER_FOLDER}/*", IMAGES_FILE, README_FILE)
"""Files of a model's repository; other files are neither downloaded nor uploaded."""
_LOADED = re.compile(r'union_igrot\.load\("([^"]+)"\)')


def split_name(name: str) -> tuple[str, str | None] | None:
    """Split `owner/name@revision` into repository and revision; return None for any other form."""
    found = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?:@(\S+))?", name)
    return None if found is None else (found[1], found[2])


def fetch_model(repository: str, revision: str | None = None, **options: Any) -> Path:
    """Download a saved model; without a network, find it in the library's cache.

    Args:
        repository: `owner/name`.
        revision: A branch, tag or commit; None for the latest of `main`.
        options: Further options of `huggingface_hub.snapshot_download`.

    Returns:
        A folder with the model's files.

    Raises:
        CheckpointError: If the model or revision does not exist or is not accessible, or the hub cannot be reached
            and the model is not in the cache.
    """
    with hub_errors(repository, revision, f"{repository} is not a folder here, and "):
        if not options.get("local_files_only"):
            try:
                HfApi(token=options.get("token")).model_info(repository, revision=revision, timeout=probe_timeout())
            except HfHubHTTPError:
                raise
            except (CLIENT_ERROR, OSError):
                folder = _cached_folder(repository, revision, options)
                if folder is None:
                    raise
                return folder
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(FILES), **options))


def _cached_folder(repository: str, revision: str | None, options: Mapping[str, Any]) -> Path | None:
    given = {**options, "local_files_only": True, "force_download": False}
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(FILES), **given))
    except OSError:
        return None
    return folder if all((folder / file).is_file() for file in (MODEL_FILE, HEADS_FILE)) else None


def push_folder(
    folder: Path,
    repository: str,
    *,
    private: bool | None = None,
    branch: str | None = None,
    token: str | None = None,
    commit_message: str = "Push model",
    card: str | None = None,
    **options: Any,
) -> str:
    """Upload a saved model, without building it.

    Paths in the settings of its training are shortened to their last name.

    Args:
        folder: A folder that `IGROTModel.save` wrote.
        repository: `owner/name`; created if it does not exist.
        private: Whether a new repository is private; None for the account's default.
        branch: The branch; None for `main`.
        token: Access token; None for the one of `hf auth login`.
        commit_message: Message of the commit.
        card: Text of the model card; None for the folder's own, under the model's new name.
        options: Further options of `huggingface_hub.HfApi.upload_folder`, such as `create_pr`.

    Returns:
        The address of the upload.

    Raises:
        CheckpointError: If the folder holds no saved model, the name is invalid, or the hub cannot be reached or
            refuses.
    """
    check_repository(repository)
    saved = read_checkpoint(folder)
    description = json.loads((folder / MODEL_FILE).read_text(encoding="utf-8"))
    description["card"] = strip_paths(saved.metadata)
    if card is None:
        card = rename_model_card(saved.readme or short_card(description), repository)
    with TemporaryDirectory() as copied, hub_errors(repository):
        for pattern in FILES:
            for path in sorted(folder.glob(pattern)):
                copy = Path(copied) / path.relative_to(folder)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
        (Path(copied) / MODEL_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        (Path(copied) / README_FILE).write_text(card, encoding="utf-8")
        api = HfApi(token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(repository, branch=branch, exist_ok=True)
        options = {"revision": branch, "commit_message": commit_message, **options}
        return str(api.upload_folder(repo_id=repository, folder_path=copied, **options))


def check_repository(repository: str) -> None:
    """Raise CheckpointError unless a name has the form `owner/name`."""
    if split_name(repository) != (repository, None):
        raise CheckpointError(f"invalid name on the hub: {repository!r} (expected owner/name)")


def strip_paths(metadata: dict[str, Any]) -> dict[str, Any]:
    """Shorten the paths of this machine in a training's settings to their last name."""
    config = deepcopy(metadata.get("config") or {})
    for group, key in (("data", "root"), ("model", "weights")):
        path = (config.get(group) or {}).get(key)
        if path is not None:
            config[group][key] = Path(str(path)).name
    return {**metadata, "config": config} if config else metadata


def short_card(description: Mapping[str, Any]) -> str:
    """Return a model card from a model's description alone, as Markdown after the metadata of the hub.

    Args:
        description: Contents of `model.json`.
    """
    data = ModelCardData(library_name="union-igrot", pipeline_tag="image-feature-extraction", tags=list(TAGS))
    metadata = description.get("card") or {}
    facts = {
        "backbone": f"`{description['backbone']}`, hash `{description['backbone_fingerprint']}`",
        "heads": f"hash `{description['heads']}`",
        "training data": metadata.get("data"),
    }
    target, query = (description[head]["kind"] for head in ("target", "fusion"))
    return "\n".join(
        [
            f"---\n{data.to_yaml()}\n---\n",
            f"# {target} target, {query} queries, on {description['backbone']}\n",
            "Heads for composed and sketch-based image retrieval with one model (union-igrot).\n",
            f'```python\nimport union_igrot\n\nmodel = union_igrot.load("{UNNAMED}")\n```\n',
            f"```\nunion-eval checkpoint={UNNAMED}\n```\n",
            *(f"- {name}: {value}" for name, value in facts.items() if value),
            "",
        ]
    )


def rename_model_card(text: str, name: str | None) -> str:
    """Put a model's new name into its model card, also one that was edited by hand.

    Args:
        text: The model card.
        name: The new name; None leaves the card unchanged.
    """
    old = _LOADED.search(text)
    if old is None or name is None:
        return text
    before = re.escape(old[1])
    return re.sub(rf'(union_igrot\.load\("|checkpoint=){before}(?=["\s]|$)', lambda found: found[1] + name, text)
