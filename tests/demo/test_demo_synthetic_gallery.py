import pytest
import torch
from PIL import Image

from small_world import LinearBackbone, extractor, trainable
from union_igrot import shapes_cir, shapes_sbir
from union_igrot.demo.backends import SearchRequest, heads_name, sketch_scale
from union_igrot.demo.synthetic_gallery import SyntheticGallery
from union_igrot.demo.uploads import decode_thumbnail
from union_igrot.errors import DataError
from union_igrot.images.transforms import image_batch
from union_igrot.models.model import baseline


@pytest.fixture(scope="module")
def small() -> SyntheticGallery:
    return SyntheticGallery(20)


@pytest.mark.parametrize("target", ["union", "shared"])
def test_answers_are_the_literal_ranking(small, tmp_path, target):
    model = trainable(target=target)
    filling = extractor(tmp_path, model.backbone)
    engine = small.engine("trained", model, filling)
    query = shapes_cir("test", 20, distractors=5).queries[0]
    picture = query.image.open()
    with torch.inference_mode():
        asked = model.embed_queries(image_batch([picture], model.preprocess), [query.text])[0]
        pictures = image_batch([item.image for item in small.items], model.preprocess)
        scores = (model.embed_gallery(pictures) @ asked).tolist()
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    gone = small.items[order[2]].id
    wanted = [small.items[place].id for place in order if small.items[place].id != gone]
    asked = SearchRequest(picture, query.text, exclude=(gone,))
    found = engine.search(asked, 0, 30)
    assert [one.id for one in found[:10]] == wanted[:10]
    assert [one.score for one in found[:2]] == pytest.approx([scores[place] for place in order[:2]], abs=1e-5)
    assert [one.id for one in engine.search(asked, 12, 5)] == [one.id for one in found[12:17]]
    rest = engine.search(SearchRequest(picture, query.text), len(engine) - 3, 10)
    assert len(rest) == 3


def test_pictures_are_embedded_once_and_kept(small, tmp_path):
    for _ in range(2):
        backbone = LinearBackbone()
        small.engine("trained", trainable(backbone=backbone), extractor(tmp_path, backbone))
        seen = sum(backbone.image_batches)
        assert seen in (0, len({item.image.key for item in small.items}), len(small.items))
    assert seen == 0


def test_the_gallery_is_that_of_both_benchmarks(small, tmp_path):
    cir, sbir = shapes_cir("test", 20, distractors=5).gallery, shapes_sbir("test", 1, gallery=20).gallery
    assert [item.image for item in small.items] == [item.image for item in (*cir, *sbir)]
    assert len({item.id for item in small.items}) == len(small.items) == len(cir) + len(sbir)
    model = trainable("sum", "frozen")
    engine = small.engine("sum", model, extractor(tmp_path, model.backbone))
    assert len(engine) == len(small.items)
    one = engine.answer(small.items[-1].id)
    assert (one.title, one.details, one.path) == (small.items[-1].caption, {"class": small.items[-1].label}, None)
    assert (
        decode_thumbnail(one.thumbnail).tobytes()
        == small.items[-1].image.open().tobytes()
        == engine.image(one.id).tobytes()
    )
    for ask in (engine.answer, engine.image):
        with pytest.raises(DataError):
            ask("photo-99999")


def test_the_world_is_filtered_and_refined(small, tmp_path):
    model = trainable("sum", "frozen")
    engine = small.engine("sum", model, extractor(tmp_path, model.backbone))
    labels = {item.id: item.label for item in small.items}
    captions = {item.id: item.caption for item in small.items}
    label = next(label for label in labels.values() if label)
    found = engine.search(SearchRequest(None, "red", f"class = '{label}'"), 0, 100)
    assert {one.id for one in found} == {name for name, given in labels.items() if given == label}
    found = engine.search(SearchRequest(None, "red", engine.example), 0, 1000)
    assert {one.id for one in found} == {n for n in labels if labels[n] == "star" or "red" in captions[n]}
    liked, disliked = small.items[3].id, small.items[4].id
    found = engine.search(SearchRequest(liked=(liked,), disliked=(disliked,)), 0, len(engine))
    assert found[0].id == liked
    assert disliked not in {one.id for one in found}
    assert len(found) == len(engine) - 1


def test_text_alone_and_a_picture_alone(small, tmp_path):
    model = baseline(LinearBackbone(), "sum")
    engine = small.engine("sum", model, extractor(tmp_path, model.backbone))
    by_text = engine.search(SearchRequest(None, "a red star"), 0, 5)
    assert len({one.id for one in by_text}) == 5
    by_image = engine.search(SearchRequest(Image.new("RGB", (60, 60), "red"), exclude=("not in this gallery",)), 0, 5)
    assert [one.score for one in by_image] == sorted((one.score for one in by_image), reverse=True)


def test_the_same_deal_gives_the_same_pictures(small, tmp_path):
    model = trainable("sum", "frozen")
    engine = small.engine("sum", model, extractor(tmp_path, model.backbone))
    dealt = [[one.id for one in engine.some(9, sample_seed)] for sample_seed in (3, 3, 4)]
    assert dealt[0] == dealt[1] != dealt[2]
    assert len(engine.some(10**6, 0)) == len(engine)


def test_models_are_named_by_their_heads():
    model = trainable("transagg", "union")
    assert (heads_name(model), sketch_scale(model)) == ("transagg + union", 1.0)
    model.backbone.name = "tiny"
    assert sketch_scale(model) == 0.55
