"""The Hugging Face hub: files from its cache or downloaded, models, upload and the model card, with one-line errors.

The cache, the requests and their settings (`HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`,
`HF_HUB_ETAG_TIMEOUT`, `HF_HUB_DOWNLOAD_TIMEOUT`) are those of huggingface_hub. Its `hf_hub_download` is not called: it
deletes partial files if it is interrupted, and asks a hub that fell silent again for minutes.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from json import JSONDecodeError
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

from huggingface_hub import HfApi, ModelCardData, constants, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers, logging as hub_logging  # type: ignore[attr-defined]

from union_igrot.errors import CheckpointError, first_line
from union_igrot.models.backbones.weights import WEIGHTS_OPTION
from union_igrot.models.checkpoint import (
    BACKBONE_FILE,
    HEADS_FILE,
    IMAGES_FILE,
    MODEL_FILE,
    README_FILE,
    TOKENIZER_FOLDER,
    read_checkpoint,
)
from union_igrot.storage.files import write_atomic
from union_igrot.storage.sizes import format_size

log = logging.getLogger("union_igrot.models")
_TEXTS = (".json", ".txt", ".model")  # configurations and tokenizers
_LARGE = 10**7
_CONNECT_SECONDS = 4.0
_FORBIDDEN, _BUSY = (401, 403), (429, 500, 502, 503, 504)
_PAUSES = (1.0, 2.0)
_HASH = re.compile(r"[0-9a-f]{40,64}")
# The library passes on errors of its HTTP client, whose base class is the base of its own.
CLIENT_ERROR = cast(type[Exception], HfHubHTTPError.__mro__[1])
_FAILURES = (OSError, EntryNotFoundError, JSONDecodeError, CLIENT_ERROR)


class _RemoteFile(NamedTuple):
    """A file of a repository at a commit.

    `digest` names its content in the cache: the SHA-256 of a file in LFS, else Git's hash.
    """

    name: str
    size: int
    digest: str
    is_lfs: bool
    commit: str


def probe_timeout() -> Any:
    """Return the seconds after which the first request fails, as the HTTP client takes them."""
    wait = float(constants.HF_HUB_ETAG_TIMEOUT)
    return min(_CONNECT_SECONDS, wait), wait, wait, wait


def fetch_files(repository: str, needed: Sequence[Sequence[str]], *, texts: bool = True) -> Path:
    """Download the files of a model, or find them in the cache without a request.

    Configurations and tokenizers come first and weights last, so that weights in the cache have the rest beside them.

    Args:
        repository: `owner/name`.
        needed: Groups of file names; of each group the first that exists is taken. A group of weights comes last.
            `*.safetensors.index.json` and `*.bin.index.json` stand for the shards that are listed in them.
        texts: Whether all configurations and tokenizers are downloaded with them.

    Returns:
        The file of the last group, in the folder of all files.

    Raises:
        CheckpointError: If the repository does not exist, is not accessible, lacks a group, or cannot be reached.
    """
    with hub_errors(repository):  # an invalid name
        cached = [_cached_file(repository, group) for group in needed]
    if cached and all(cached):
        return cast(Path, cached[-1])
    wanted = next(group[0] for group, path in zip(needed, cached, strict=True) if not path)
    with hub_errors(repository, file=wanted):
        files = {file.name: file for file in _list_files(repository)}
        chosen = [_choose(repository, group, files) for group in needed]
    described = [name for name in files if "/" not in name and name.endswith(_TEXTS)]
    names = [name for name in described if texts and not name.endswith(".index.json")] + chosen[:-1]
    if chosen[-1].endswith(".index.json"):
        stem, kind = chosen[-1].removesuffix(".index.json").split(".")
        names += [name for name in files if name.startswith(f"{stem}-") and name.endswith(f".{kind}")]
    return [_download(repository, files[name]) for name in dict.fromkeys([*names, chosen[-1]])][-1]


def _cached_file(repository: str, group: Sequence[str]) -> Path | None:
    """Return the first file of a group that is in the cache, of an index only with all its shards."""
    for name in group:
        path = try_to_load_from_cache(repository, name)
        if not isinstance(path, str):
            continue
        shards = json.loads(Path(path).read_text())["weight_map"].values() if name.endswith(".index.json") else ()
        if all(Path(path).with_name(shard).is_file() for shard in shards):
            return Path(path)
    return None


def _list_files(repository: str) -> list[_RemoteFile]:
    """List the files of a repository; the first request, which fails soon without a network."""
    for wait in (*_PAUSES, None):
        try:
            info = HfApi().model_info(repository, files_metadata=True, timeout=probe_timeout())
            break
        except HfHubHTTPError as error:
            if wait is None or error.response.status_code not in _BUSY:
                raise
            time.sleep(wait)
    commit, found = str(info.sha), []
    for file in info.siblings or []:
        digest = file.lfs.sha256 if file.lfs is not None else file.blob_id
        if file.size is None or digest is None:
            raise OSError(f"the list of its files lacks the size or hash of {file.rfilename}")
        unsafe = ".." in re.split(r"[/\\]", file.rfilename) or file.rfilename.startswith(("/", "\\"))
        if unsafe or not all(_HASH.fullmatch(one) for one in (commit, digest)):  # they become paths of the cache
            raise CheckpointError(
                f"{constants.ENDPOINT}/{repository} lists a file {file.rfilename!r} with hash {digest!r} at commit "
                f"{commit!r}; expected a path inside the repository and hexadecimal hashes; use another hub or mirror"
            )
        found.append(_RemoteFile(file.rfilename, file.size, digest, file.lfs is not None, commit))
    return found


def _choose(repository: str, group: Sequence[str], files: dict[str, _RemoteFile]) -> str:
    for name in group:
        if name in files:
            return name
    if "adapter_config.json" in files:
        raise CheckpointError(
            f"{repository} holds a LoRA adapter, not a model; merge it into its model (merge_and_unload() of peft) and "
            "save that"
        )
    raise CheckpointError(f"{constants.ENDPOINT}/{repository} holds none of {', '.join(group)}; choose another model")


def _download(repository: str, file: _RemoteFile) -> Path:
    """Download a file into the cache, in the layout of huggingface_hub, unless it is there."""
    storage = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    content, named = storage / "blobs" / file.digest, storage / "snapshots" / file.commit / file.name
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / storage.name / f"{file.digest}.lock"
    main = storage / "refs" / "main"
    with hub_errors(repository, file=file.name):
        for path in (content, named, lock, main):
            path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if not named.exists():
                if not content.exists():
                    _download_content(repository, file, content)
                _link(content, named)
        write_atomic(main, file.commit)
    return named


def _link(content: Path, named: Path) -> None:
    """Make a file's content appear under its name, as huggingface_hub does."""
    named.unlink(missing_ok=True)
    try:
        named.symlink_to(os.path.relpath(content, named.parent))
    except OSError:  # Windows, without the right to create links
        content.replace(named)


def _download_content(repository: str, file: _RemoteFile, content: Path) -> None:
    """Download the content of a file; that of one in LFS resumes if it was interrupted before."""
    partial = content.with_name(f"{content.name}.partial")
    done = partial.stat().st_size if file.is_lfs and partial.exists() else 0
    if done > file.size or not done:
        partial.unlink(missing_ok=True)
        done = 0
    if file.is_lfs and file.size > _LARGE:
        there = f" ({format_size(done)} are there)" if done else ""
        size, cache = format_size(file.size), constants.HF_HUB_CACHE
        log.warning("downloading %s of %s, %s%s, to %s", file.name, repository, size, there, cache)
    url, headers = hf_hub_url(repository, file.name, revision=file.commit), build_hf_headers()
    with partial.open("ab") as opened:
        http_get(
            url,
            opened,
            resume_size=done,
            headers=headers,
            expected_size=file.size,
            displayed_filename=file.name,
            _nb_retries=1,  # more once data came: 21 s if nothing does, 65 s if a hub falls silent later
        )
    with partial.open("rb") as opened:
        start = b"" if file.is_lfs else b"blob %d\0" % file.size
        digest = hashlib.sha256() if file.is_lfs else hashlib.sha1(usedforsecurity=False)
        digest.update(start)
        found = hashlib.file_digest(opened, lambda: digest).hexdigest()
    if found != file.digest:
        partial.unlink()
        raise CheckpointError(
            f"{file.name} of {repository} was damaged on its way (hash {found[:12]}..., expected "
            f"{file.digest[:12]}...); run the command again"
        )
    partial.replace(content)


@contextmanager
def hub_errors(
    repository: str, revision: str | None = None, before: str = "", file: str | None = None
) -> Iterator[None]:
    """Turn errors of the hub's library into one line that names what was tried and what to do.

    Args:
        repository: `owner/name`.
        revision: A branch, tag or commit.
        before: Start of the line.
        file: The file that is wanted, if files can be given in place of the repository.

    Raises:
        CheckpointError: In place of the library's errors.
    """
    tried = f"{before}{constants.ENDPOINT}/{repository}" + (f" at revision {revision}" if revision else "")
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)  # the line below says what its warnings on retries say
    try:
        yield
    except GatedRepoError:
        raise CheckpointError(f"{tried} is open to some users only; request access, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"{tried} does not exist or is private; check the name, or `hf auth login` with an account that has access"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{tried} does not exist; give a branch, tag or commit of {repository}") from None
    except LocalTokenNotFoundError:
        raise CheckpointError(f"{tried} needs an account; run `hf auth login`, or set HF_TOKEN") from None
    except HFValidationError as error:
        raise CheckpointError(
            f"{before}{repository!r} is no name on the hub ({first_line(error)}); give owner/name or an existing folder"
        ) from None
    except _FAILURES as error:
        raise CheckpointError(_failure(tried, repository, file, error)) from None
    finally:
        hub_logging.set_verbosity(level)


def _failure(tried: str, repository: str, file: str | None, error: Exception) -> str:
    wanted = f" for {file}" if file else ""
    copy = f", or copy the files of {repository} and give {WEIGHTS_OPTION}" if file else ""
    if constants.is_offline_mode() and isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        wanted = f"{file} of {repository}" if file else repository
        return (
            f"{tried} cannot be reached: HF_HUB_OFFLINE=1 allows no request, and {wanted} is not in the cache "
            f"{constants.HF_HUB_CACHE}; unset HF_HUB_OFFLINE to download it{copy}"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{tried}: the disk of {constants.HF_HUB_CACHE} is full; free it, or set HF_HOME to another folder"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        advice = "check your account (`hf auth login`)" if status in _FORBIDDEN else "try again later"
        return f"{tried} refused the request{wanted} (status {status}); {advice}{copy}"
    if isinstance(error, JSONDecodeError):
        return (
            f"{tried} sent no valid answer{wanted}: a firewall, a proxy or a login page may answer in its place{copy}"
        )
    return (
        f"{tried} cannot be reached{wanted} ({first_line(error)}); check the network, or set HF_ENDPOINT to a mirror, "
        f"or HF_HUB_OFFLINE=1 to use the cache {constants.HF_HUB_CACHE} alone{copy}"
    )


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
    description["card"] = strip_paths(saved.description["card"])
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
