"""Which indexes of earlier versions a model opens."""

import pytest

from union_igrot.errors import CheckpointError
from union_igrot.gallery.metadata import check_metadata, index_metadata
from union_igrot.models.backbones.base import without_settings
from union_igrot.models.factory import build_backbone
from union_igrot.models.model import baseline, model_fingerprint


def earlier(metadata):
    """Return what an earlier version stored for the same model."""
    hashed = without_settings(metadata["model"]["backbone_fingerprint"])
    described = {**metadata["model"], "backbone_fingerprint": hashed}
    return {"format": 1, "fingerprint": model_fingerprint(described), "model": described, "checkpoint": "x"}


def test_an_earlier_index_opens_only_if_the_name_of_its_model_proves_the_settings():
    model = baseline(build_backbone("tiny"), "sum")
    metadata = index_metadata(model, "tiny")
    check_metadata(earlier(metadata), metadata, "a.lance")
    with pytest.raises(CheckpointError, match=r"did not record activation and tokenizer, which may differ\); use that"):
        check_metadata({**earlier(metadata), "weights": "mine.pt"}, metadata, "a.lance")
    own = index_metadata(model, "tiny", "mine.pt")
    model.backbone.is_described_by_name = False
    for other in (own, index_metadata(model, "tiny")):
        with pytest.raises(CheckpointError, match=r"a.lance was made with .* which may differ\)") as error:
            check_metadata(earlier(other), other, "a.lance")
        assert "\n" not in str(error.value)
        check_metadata(other, other, "a.lance")
