"""The index of a gallery: creation, its model, and exact search equal to the ranking of the evaluation."""

from pathlib import Path

import pytest

import union_igrot
from small_backbones import CLIP_CONFIG, write_open_clip
from small_gallery import COUNT, names, noise_image
from small_world import DIM, LinearBackbone, cir_benchmark, extractor, sbir_benchmark, trainable
from union_igrot.datasets.folder import folder_benchmark
from union_igrot.errors import CheckpointError, ConfigError, DataError
from union_igrot.evaluation import scoring
from union_igrot.features.embedding import embed_benchmark
from union_igrot.gallery import metadata
from union_igrot.gallery.engines.factory import open_index
from union_igrot.gallery.gallery import Gallery
from union_igrot.models.model import IGROTModel
from union_igrot.types import Benchmark

REAL = Path(__file__).parents[2] / "../shared/data/caltech_quickdraw"


def test_describe(gallery, model):
    described = gallery.describe()
    assert (described["uri"], described["images"], described["dim"]) == ("memory:", COUNT, DIM)
    assert described["columns"]["year"] == "int"
    assert described["model"] == model.describe()
    assert described["fingerprint"] == model.fingerprint()


def test_optimise_is_a_deprecated_alias(gallery):
    with pytest.warns(DeprecationWarning, match="optimize"):
        gallery.optimise()


def test_an_index_is_created_by_the_first_image(model, tmp_path):
    path = tmp_path / "photos.lance"
    gallery = Gallery.open(path, model)
    assert (len(gallery), gallery.describe()["images"]) == (0, 0)
    for call in (lambda: gallery.search(text="red"), lambda: gallery.delete("x"), gallery.optimize):
        with pytest.raises(DataError, match=r"no gallery at .*photos\.lance yet"):
            call()
    gallery.close()
    assert not path.exists()
    with pytest.raises(ConfigError, match=r"there is no index"):
        Gallery.open(path, create=False)
    with pytest.raises(ConfigError):
        Gallery.open(path, model, create=False)
    with pytest.raises(ConfigError, match="not the name of an index"):
        Gallery.open("photos.txt", model).add(noise_image(1))


class TestOnDisk:
    @pytest.fixture(autouse=True)
    def needs_lance(self):
        pytest.importorskip("lance", reason='needs pip install "union-igrot[gallery]"')

    def test_a_gallery_is_opened_again(self, model, tmp_path):
        path = tmp_path / "photos.lance"
        with Gallery.open(path, model) as gallery:
            gallery.add([noise_image(n) for n in range(COUNT)], names(), {"year": list(range(COUNT))})
            first = gallery.search(noise_image(40), where="year > 3")
        with Gallery.open(path, model, create=False) as again:
            second = again.search(noise_image(40), where="year > 3")
        assert (second.ids, second.scores) == (first.ids, first.scores)
        assert second[0].thumbnail is not None

    def test_another_model_is_refused(self, model, tmp_path):
        path = tmp_path / "photos.lance"
        with Gallery.open(path, model) as gallery:
            gallery.add(noise_image(1), "x")
        other = trainable(backbone=LinearBackbone(seed=1), target="sum").eval()
        for create in (True, False):
            with pytest.raises(CheckpointError) as caught:
                Gallery.open(path, other, create=create)
            described = str(caught.value)
            for one in (model, other):
                assert one.backbone.fingerprint() in described
                assert one.describe()["heads"] in described
            assert "transagg + union" in described
            assert "transagg + sum" in described
            assert "index again" in described

    @pytest.mark.slow
    def test_an_index_loads_its_model(self, tmp_path):
        path = tmp_path / "photos.lance"
        with Gallery.open(path, "tiny") as gallery:
            gallery.add(noise_image(1), "x")
        with Gallery.open(path) as again:
            assert again.search(noise_image(1)).ids == ["x"]
            assert again.describe()["checkpoint"] == "tiny"

    def test_heads_without_weights_are_distinguished(self, tmp_path):
        plain, summed = (trainable("sum", target).eval() for target in ("frozen", "sum"))
        assert plain.fingerprint() != summed.fingerprint()
        with Gallery.open(tmp_path / "x.lance", plain) as gallery:
            gallery.add(noise_image(1), "x")
        with pytest.raises(CheckpointError, match=r"heads sum \+ frozen .*, not with .* heads sum \+ sum"):
            Gallery.open(tmp_path / "x.lance", summed)

    def test_another_backbone_is_refused_before_its_weights_are_fetched(self, model, tmp_path, monkeypatch):
        with Gallery.open(tmp_path / "x.lance", model) as gallery:
            gallery.add(noise_image(1), "x")
        monkeypatch.setattr(metadata, "load", None)
        for create in (True, False):
            with pytest.raises(
                CheckpointError, match=r"was made with backbone linear .*, not with backbone base; use that"
            ):
                Gallery.open(tmp_path / "x.lance", "base", create=create)

    def test_an_index_of_an_unknown_model_is_refused(self, model, tmp_path):
        with Gallery.open(tmp_path / "a.lance", model) as gallery:
            gallery.add(noise_image(1), "x")
        with pytest.raises(ConfigError, match=r"does not say where its model is.*linear"):
            Gallery.open(tmp_path / "a.lance")
        open_index(str(tmp_path / "b.lance"), dim=DIM, create=True).close()
        with pytest.raises(CheckpointError, match="does not say which model"):
            Gallery.open(tmp_path / "b.lance", model)

    @pytest.mark.slow
    def test_a_saved_model_is_found_by_its_folder(self, tmp_path, monkeypatch):
        tiny = union_igrot.load("tiny")
        tiny.save(tmp_path / "run" / "model")
        monkeypatch.chdir(tmp_path)
        with Gallery.open("x.lance", "run") as gallery:
            gallery.add(noise_image(1), "x")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        with Gallery.open("../x.lance") as again:
            assert again.describe()["checkpoint"] == str(tmp_path / "run")


def count_differences(model: IGROTModel, benchmark: Benchmark, folder: Path, uri: str) -> int:
    """Count the queries that exact search ranks differently from the evaluation, to the last image."""
    queries, rows, _ = embed_benchmark(
        model, benchmark, extractor(folder / "store", model.backbone, batch_size=256, shard=2048)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "RANKING_DEPTH", len(benchmark.gallery))
        ranking = scoring.score(benchmark, queries, rows).ranking.positions
    assert ranking.shape[1] >= len(benchmark.gallery) - 2  # all but the excluded images
    excluded = benchmark.protocol.exclude_reference
    with Gallery.open(uri, model) as gallery:
        gallery.add([item.image for item in benchmark.gallery], [item.id for item in benchmark.gallery])
        found = gallery.search_many(
            [{"image": q.image, "text": q.text, "exclude": q.exclude if excluded else ()} for q in benchmark.queries],
            ranking.shape[1],
            mode="exact",
            thumbnails=False,
        )
    expected = [[benchmark.gallery[position].id for position in row] for row in ranking.tolist()]
    return sum(hits.ids != row for hits, row in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", [cir_benchmark(), sbir_benchmark(9, 19)], ids=["cir", "sbir"])
def test_exact_search_equals_the_ranking_of_the_evaluation(model, benchmark, tmp_path):
    assert count_differences(model, benchmark, tmp_path, "memory:") == 0


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the micro benchmark of real images is not at ../shared/data")
@pytest.mark.parametrize("engine", ["memory", "lance"])
def test_exact_search_equals_the_ranking_of_the_evaluation_on_real_images(tmp_path, engine):
    if engine == "lance":
        pytest.importorskip("lance", reason='needs pip install "union-igrot[gallery]"')
    uri = "memory:" if engine == "memory" else str(tmp_path / "photos.lance")
    assert count_differences(union_igrot.load("tiny"), folder_benchmark(REAL, "test"), tmp_path, uri) == 0


@pytest.mark.slow
def test_a_backbone_without_heads_is_found_with_its_weights(tmp_path, monkeypatch):
    pytest.importorskip("lance", reason='needs pip install "union-igrot[gallery]"')
    (tmp_path / "clip").mkdir()
    write_open_clip(tmp_path / "clip", CLIP_CONFIG, 1)
    monkeypatch.chdir(tmp_path)
    uri = tmp_path / "x.lance"
    with Gallery.open(uri, "open_clip:mine", weights="clip") as gallery:
        gallery.add([noise_image(n) for n in range(4)], names(4))
        found = gallery.search(noise_image(2), "in red")
        assert found.ids[0] == names(4)[2]
        assert gallery.describe()["checkpoint"] == "open_clip:mine"
        kinds = [gallery.model.describe()[side]["kind"] for side in ("fusion", "target")]
        assert kinds == ["sum", "frozen"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with Gallery.open(uri) as again:
        assert again.search(noise_image(2), "in red").ids == found.ids
    with Gallery.open(tmp_path / "padded.lance", "open_clip:mine", weights="../clip", preprocess="pad") as gallery:
        gallery.add([noise_image(n) for n in range(4)], names(4))
        assert gallery.describe()["model"]["preprocess"] == "pad"
    with Gallery.open(tmp_path / "padded.lance") as again:
        assert again.model.preprocess.fit == "pad"
    for choice in ({"preprocess": "model"}, {"model": "open_clip:mine", "weights": "../clip"}):
        with pytest.raises(CheckpointError, match=r"heads sum.*, preprocess=pad\), not with .*, preprocess=model"):
            Gallery.open(tmp_path / "padded.lance", **choice)
    (tmp_path / "elsewhere" / "base").mkdir()
    with pytest.raises(CheckpointError, match=r"base"):  # a folder of that name takes precedence, and holds no model
        Gallery.open(uri, "base", weights="../clip")
