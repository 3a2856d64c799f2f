"""Models shared on a hub and loaded from there, without a network: what would be sent, and errors."""

import json
import shutil
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors

from small_world import LinearBackbone, trainable
from union_igrot.errors import CheckpointError, ConfigError
from union_igrot.models import hub
from union_igrot.models.factory import build_backbone, build_query_head, build_target_head
from union_igrot.models.hub import CLIENT_ERROR
from union_igrot.models.model import IGROTModel, load

CLIENT = import_module(CLIENT_ERROR.__module__.partition(".")[0])
"""The HTTP client of this version of the hub's library."""
FILES = {"README.md", "heads.safetensors", "model.json"}


def small(tuned=False):
    """Small heads on the embedded backbone, tuned or not."""
    torch.manual_seed(0)
    fusion = build_query_head("transagg", 128, layers=1, heads=2, feedforward=32)
    model = IGROTModel(build_backbone("tiny"), fusion, build_target_head("sum", 128), {"data": "shapes", "samples": 12})
    if tuned:
        model.tune(["text"])
        with torch.no_grad():
            model.backbone.network.text_projection.weight.mul_(1.5)
        model.finish_training()
    return model.eval()


class Hub:
    """Keeps what would have been sent."""

    def __init__(self, folder):
        self.folder, self.requests, self.sent, self.fails = folder, [], {}, None

    def __call__(self, **_):
        return self

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        if self.fails is not None:
            raise self.fails
        assert exist_ok
        self.requests.append((repo_id, private))
        return SimpleNamespace(repo_id=repo_id)

    def model_info(self, *_, **__):
        if self.fails is not None:
            raise self.fails

    def create_branch(self, repo_id, *, branch, exist_ok):
        assert exist_ok
        self.requests.append((repo_id, branch))

    def upload_folder(self, *, repo_id, folder_path, **options):
        self.sent = options
        shutil.copytree(folder_path, self.folder / repo_id)
        return f"https://hub.example/{repo_id}"

    def snapshot_download(self, repository, *, revision=None, allow_patterns=None, **options):
        self.requests.append((repository, revision, options))
        if self.fails is not None:
            raise self.fails
        assert {"model.json", "heads.safetensors", "backbone.safetensors", "tokenizer/*"} <= set(allow_patterns)
        return str(self.folder / repository)


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    made = Hub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", made)
    monkeypatch.setattr(hub, "snapshot_download", made.snapshot_download)
    return made


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@torch.no_grad()
def equal(one, other):
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    assert one.embed_queries(images, ["red circle", None]).equal(other.embed_queries(images, ["red circle", None]))
    assert one.embed_gallery(images).equal(other.embed_gallery(images))


@pytest.mark.slow
@pytest.mark.parametrize("tuned", [False, True])
def test_what_is_pushed_is_loaded_again(hub_folder, tuned):
    model = small(tuned)
    address = model.push_to_hub("someone/shapes", private=True, commit_message="First")
    assert address == "https://hub.example/someone/shapes"
    assert hub_folder.requests == [("someone/shapes", True)]
    assert hub_folder.sent["commit_message"] == "First"
    sent = hub_folder.folder / "someone" / "shapes"
    # A frozen backbone is named, not sent; a tuned one's weights are nowhere else.
    assert names(sent) == FILES | ({"backbone.safetensors"} if tuned else set())
    for name in ("someone/shapes", "someone/shapes@v1"):
        again = load(name)
        assert again.fingerprint() == model.fingerprint()
        assert (again.tuned, again.training) == (tuned, False)
        equal(again, model)
    assert hub_folder.requests[1:] == [("someone/shapes", None, {}), ("someone/shapes", "v1", {})]
    IGROTModel.from_pretrained("someone/shapes", revision="v2", token="t", local_files_only=True)
    assert hub_folder.requests[-1] == ("someone/shapes", "v2", {"token": "t", "local_files_only": True})


def test_the_card_that_is_pushed_loads_the_model_by_its_name(hub_folder, tmp_path):
    model = small()
    model.save(tmp_path / "mine")
    assert names(tmp_path / "mine") == FILES
    text = (tmp_path / "mine" / "README.md").read_text()
    assert 'union_igrot.load("OWNER/NAME")' in text
    (tmp_path / "mine" / "README.md").write_text(text + "\nWritten by hand.\n")
    load(tmp_path / "mine").push_to_hub("someone/shapes")
    sent = (hub_folder.folder / "someone" / "shapes" / "README.md").read_text()
    assert 'union_igrot.load("someone/shapes")' in sent
    assert "union-eval checkpoint=someone/shapes\n" in sent
    assert "OWNER/NAME" not in sent
    assert sent.endswith("Written by hand.\n")


def test_a_card_of_other_heads_is_written_anew(tmp_path):
    model = small()
    model.save(tmp_path)
    loaded = load(tmp_path)
    with torch.no_grad():
        loaded.fusion.sep_token += 1
    loaded.save(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert loaded.describe()["heads"] in text
    assert model.describe()["heads"] not in text


def test_paths_of_this_machine_stay_here(hub_folder, tmp_path):
    model = small()
    model.metadata["config"] = {
        "data": {"name": "folder", "root": "somewhere/of/mine/birds"},
        "model": {"weights": "somewhere/of/mine/weights.pt"},
    }
    before = json.dumps(model.metadata)
    model.push_to_hub("someone/birds")
    hub.push_folder(model.save(tmp_path / "model"), "someone/twice")
    assert json.dumps(model.metadata) == before
    for name in ("birds", "twice"):
        sent = hub_folder.folder / "someone" / name
        assert "of/mine" not in (sent / "model.json").read_text() + (sent / "README.md").read_text()
        assert json.loads((sent / "model.json").read_text())["card"]["config"]["data"]["root"] == "birds"
        assert load(f"someone/{name}").fingerprint() == model.fingerprint()


def test_a_folder_is_pushed_without_its_backbone_being_there(hub_folder, tmp_path):
    folder = trainable(backbone=LinearBackbone()).save(tmp_path / "model")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="unknown backbone 'linear'"):
        load(folder)
    assert (
        hub.push_folder(folder, "someone/linear", private=False, branch="next") == "https://hub.example/someone/linear"
    )
    assert hub_folder.requests == [("someone/linear", False), ("someone/linear", "next")]
    assert hub_folder.sent["revision"] == "next"
    sent = hub_folder.folder / "someone" / "linear"
    assert names(sent) == FILES
    assert (
        IGROTModel.load(sent, LinearBackbone()).fingerprint() == IGROTModel.load(folder, LinearBackbone()).fingerprint()
    )


def test_a_folder_that_is_no_model_is_not_pushed(hub_folder, tmp_path):
    with pytest.raises(CheckpointError, match="is not a saved model"):
        hub.push_folder(tmp_path, "someone/x")
    assert hub_folder.requests == []


@pytest.mark.parametrize("name", ["shapes", "a/b/c", "someone/", "someone/x@v1", "", "../x/y"])
def test_names_that_are_none_are_refused_before_anything_is_sent(hub_folder, name, tmp_path):
    for push in (small().push_to_hub, lambda repo: hub.push_folder(tmp_path, repo)):
        with pytest.raises(CheckpointError, match="expected owner/name"):
            push(name)
    assert hub_folder.requests == []


def failure(kind, code=404):
    request = CLIENT.Request("GET", "https://hub.example")
    return kind(f"{code} Client Error\nmore of it", response=CLIENT.Response(code, request=request))


FAILURES = [
    (
        failure(errors.RepositoryNotFoundError),
        "someone/x is not a folder here, and .*/someone/x at revision v1 does not exist or is private",
    ),
    (failure(errors.GatedRepoError, 403), "is open to some users only"),
    (failure(errors.RevisionNotFoundError), r"at revision v1 does not exist; give a branch, tag or commit"),
    (failure(errors.HfHubHTTPError, 500), r"refused the request \(status 500\); try again later"),
    (errors.LocalEntryNotFoundError("Cannot find it"), r"someone/x is not a folder here, .*HF_HUB_OFFLINE=1 allows no"),
    (errors.OfflineModeIsEnabled("offline"), r"HF_HUB_OFFLINE=1 allows no request, and someone/x is not in the cache"),
    (errors.LocalTokenNotFoundError("no token"), "needs an account; run `hf auth login`"),
    (errors.HFValidationError("two dots"), "two dots"),
    (CLIENT.ConnectError("no route"), "no route"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("failure", "message"), FAILURES, ids=lambda x: type(x).__name__)
def test_a_failure_is_one_line_that_says_what_was_tried(hub_folder, failure, message):
    hub_folder.fails = failure
    with pytest.raises(CheckpointError, match=message) as error:
        load("someone/x", revision="v1")
    assert "someone/x" in str(error.value)
    assert "\n" not in str(error.value)
    if not isinstance(failure, errors.RevisionNotFoundError):
        with pytest.raises(CheckpointError) as error:
            small().push_to_hub("someone/x")
        assert "folder here" not in str(error.value)
        assert "\n" not in str(error.value)


def test_without_network_the_line_says_where_it_looked(tmp_path, monkeypatch):
    """Through the library itself, which is error to be offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"outputs/small is not a folder here, and \S+/outputs/small") as error:
        load("outputs/small")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "deep/down/nowhere", Path("deep/down/nowhere"), "~/nowhere/at/all"])
def test_what_is_neither_a_folder_nor_a_name_is_not_looked_for(hub_folder, name):
    with pytest.raises(CheckpointError, match=r"no model .*give a folder .* owner/name .* or a backbone") as error:
        load(name)
    assert str(name) in str(error.value)
    assert hub_folder.requests == []


def test_a_folder_comes_before_a_name(hub_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small().save("someone/x")
    assert load("someone/x").metadata == {"data": "shapes", "samples": 12}
    assert hub_folder.requests == []


def test_a_repository_that_holds_something_else_is_named(hub_folder):
    (hub_folder.folder / "someone" / "x").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"someone/x is not a saved model"):
        load("someone/x")
