"""The index of a gallery: when it is made, whose it is, and that exact search is the evaluation's ranking."""

from pathlib import Path

import pytest

import union_igrot
from small_backbones import CLIP_CONFIG, write_open_clip
from small_gallery import COUNT, names, picture
from small_world import DIM, LinearBackbone, cir_benchmark, extractor, sbir_benchmark, trainable
from union_igrot.datasets.folder import folder_benchmark
from union_igrot.errors import CheckpointError, ConfigError, DataError
from union_igrot.evaluation import scoring
from union_igrot.features.embedding import embed_benchmark
from union_igrot.gallery import metadata as cards
from union_igrot.gallery.engines.factory import open_index
from union_igrot.gallery.gallery import Gallery
from union_igrot.models.model import IGROTModel
from union_igrot.types import Benchmark

REAL = Path(__file__).parents[2] / "../shared/data/caltech_quickdraw"


def test_describe_says_what_it_is(gallery, model):
    said = gallery.describe()
    assert (said["uri"], said["images"], said["dim"]) == ("memory:", COUNT, DIM)
    assert said["columns"]["year"] == "int"
    assert said["model"] == model.describe()
    assert said["fingerprint"] == model.fingerprint()


def test_optimise_is_a_deprecated_alias(gallery):
    with pytest.warns(DeprecationWarning, match="optimize"):
        gallery.optimise()


def test_nothing_is_made_before_a_picture_is_added(model, tmp_path):
    place = tmp_path / "photos.lance"
    gallery = Gallery.open(place, model)
    assert (len(gallery), gallery.describe()["images"]) == (0, 0)
    for ask in (lambda: gallery.search(text="red"), lambda: gallery.delete("x"), gallery.optimize):
        with pytest.raises(DataError, match=r"no gallery at .*photos\.lance yet"):
            ask()
    gallery.close()
    assert not place.exists()
    with pytest.raises(ConfigError, match=r"pass a model"):
        Gallery.open(place)
    with pytest.raises(ConfigError):
        Gallery.open(place, model, create=False)
    with pytest.raises(ConfigError, match="not the name of an index"):
        Gallery.open("photos.txt", model).add(picture(1))


class TestOnDisk:
    @pytest.fixture(autouse=True)
    def needs_the_engine(self):
        pytest.importorskip("lance", reason='needs pip install "union-igrot[gallery]"')

    def test_a_gallery_is_there_for_the_next(self, model, tmp_path):
        place = tmp_path / "photos.lance"
        with Gallery.open(place, model) as gallery:
            gallery.add([picture(n) for n in range(COUNT)], names(), {"year": list(range(COUNT))})
            first = gallery.search(picture(40), where="year > 3")
        with Gallery.open(place, model, create=False) as again:
            second = again.search(picture(40), where="year > 3")
        assert (second.ids, second.scores) == (first.ids, first.scores)
        assert second[0].thumbnail is not None

    def test_another_model_is_refused_and_both_are_named(self, model, tmp_path):
        place = tmp_path / "photos.lance"
        with Gallery.open(place, model) as gallery:
            gallery.add(picture(1), "x")
        other = trainable(backbone=LinearBackbone(seed=1), target="sum").eval()
        for create in (True, False):
            with pytest.raises(CheckpointError) as caught:
                Gallery.open(place, other, create=create)
            said = str(caught.value)
            for one in (model, other):
                assert one.backbone.fingerprint() in said
                assert one.describe()["heads"] in said
            assert "transagg + union" in said
            assert "transagg + sum" in said
            assert "index again" in said

    def test_the_index_knows_its_model(self, tmp_path):
        place = tmp_path / "photos.lance"
        with Gallery.open(place, "tiny") as gallery:
            gallery.add(picture(1), "x")
        with Gallery.open(place) as again:
            assert again.search(picture(1)).ids == ["x"]
            assert again.describe()["checkpoint"] == "tiny"

    def test_heads_without_weights_are_told_apart(self, tmp_path):
        plain, summed = (trainable("sum", target).eval() for target in ("frozen", "sum"))
        assert plain.fingerprint() != summed.fingerprint()
        with Gallery.open(tmp_path / "x.lance", plain) as gallery:
            gallery.add(picture(1), "x")
        with pytest.raises(CheckpointError, match=r"heads sum \+ frozen .*, not with .* heads sum \+ sum"):
            Gallery.open(tmp_path / "x.lance", summed)

    def test_another_backbone_is_refused_before_its_weights_are_fetched(self, model, tmp_path, monkeypatch):
        with Gallery.open(tmp_path / "x.lance", model) as gallery:
            gallery.add(picture(1), "x")
        monkeypatch.setattr(cards, "load", None)
        for create in (True, False):
            with pytest.raises(
                CheckpointError, match=r"was made with backbone linear .*, not with backbone base; search"
            ):
                Gallery.open(tmp_path / "x.lance", "base", create=create)

    def test_an_index_of_no_known_model_is_refused(self, model, tmp_path):
        with Gallery.open(tmp_path / "a.lance", model) as gallery:
            gallery.add(picture(1), "x")
        with pytest.raises(ConfigError, match=r"does not say where its model is.*linear"):
            Gallery.open(tmp_path / "a.lance")
        open_index(str(tmp_path / "b.lance"), dim=DIM, create=True).close()
        with pytest.raises(CheckpointError, match="does not say which model"):
            Gallery.open(tmp_path / "b.lance", model)

    def test_a_saved_model_is_found_again_by_its_folder(self, tmp_path, monkeypatch):
        tiny = union_igrot.load("tiny")
        tiny.save(tmp_path / "run" / "model")
        monkeypatch.chdir(tmp_path)
        with Gallery.open("x.lance", "run") as gallery:
            gallery.add(picture(1), "x")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        with Gallery.open("../x.lance") as again:
            assert again.describe()["checkpoint"] == str(tmp_path / "run")


def differing(model: IGROTModel, benchmark: Benchmark, folder: Path, uri: str) -> int:
    """Count the queries that a gallery's exact search ranks otherwise than the evaluation, to the last image."""
    asked, kept, _ = embed_benchmark(
        model, benchmark, extractor(folder / "store", model.backbone, batch_size=256, shard=2048)
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(scoring, "RANKING_DEPTH", len(benchmark.gallery))
        truth = scoring.score(benchmark, asked, kept).ranking.positions
    assert truth.shape[1] >= len(benchmark.gallery) - 2  # all but what a query leaves out
    left_out = benchmark.protocol.exclude_reference
    with Gallery.open(uri, model) as gallery:
        gallery.add([item.image for item in benchmark.gallery], [item.id for item in benchmark.gallery])
        found = gallery.search_many(
            [{"image": q.image, "text": q.text, "exclude": q.exclude if left_out else ()} for q in benchmark.queries],
            truth.shape[1],
            mode="exact",
            thumbnails=False,
        )
    wanted = [[benchmark.gallery[position].id for position in row] for row in truth.tolist()]
    return sum(answers.ids != row for answers, row in zip(found, wanted, strict=True))


@pytest.mark.parametrize("benchmark", [cir_benchmark(), sbir_benchmark(9, 19)], ids=["cir", "sbir"])
def test_exact_search_is_the_evaluations_ranking(model, benchmark, tmp_path):
    assert differing(model, benchmark, tmp_path, "memory:") == 0


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the micro benchmark of real images is not at ../shared/data")
@pytest.mark.parametrize("engine", ["memory", "lance"])
def test_exact_search_is_the_evaluations_ranking_to_the_last_id(tmp_path, engine):
    if engine == "lance":
        pytest.importorskip("lance", reason='needs pip install "union-igrot[gallery]"')
    uri = "memory:" if engine == "memory" else str(tmp_path / "photos.lance")
    assert differing(union_igrot.load("tiny"), folder_benchmark(REAL, "test"), tmp_path, uri) == 0


def test_a_backbone_alone_makes_a_gallery_and_is_found_again_with_its_weights(tmp_path, monkeypatch):
    pytest.importorskip("lance", reason='needs pip install "union-igrot[gallery]"')
    (tmp_path / "clip").mkdir()
    write_open_clip(tmp_path / "clip", CLIP_CONFIG, 1)
    monkeypatch.chdir(tmp_path)
    uri = tmp_path / "x.lance"
    with Gallery.open(uri, "base", weights="clip") as gallery:
        gallery.add([picture(n) for n in range(4)], names(4))
        found = gallery.search(picture(2), "in red")
        assert found.ids[0] == names(4)[2]
        assert gallery.describe()["checkpoint"] == "base"
        kinds = [gallery.model.describe()[side]["kind"] for side in ("fusion", "target")]
        assert kinds == ["sum", "frozen"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with Gallery.open(uri) as again:
        assert again.search(picture(2), "in red").ids == found.ids
    (tmp_path / "elsewhere" / "base").mkdir()
    with pytest.raises(CheckpointError, match=r"base"):  # a folder of that name goes first, and holds no model
        Gallery.open(uri, "base", weights="../clip")
