"""The model for MTEB: its batches without mteb, and a task of local data if mteb is installed."""

import numpy as np
import pytest
import torch
from PIL import Image

from small_world import trainable
from union_igrot.errors import DataError
from union_igrot.evaluation.mteb import encode_batches, mteb_model

COLORS = ("red", "green", "blue", "yellow", "black", "white")


def pictures():
    return [Image.new("RGB", (24, 20), color) for color in COLORS]


def test_queries_and_documents_go_through_their_own_heads():
    model, images = trainable(), pictures()
    texts = [f"more {color}" for color in COLORS]
    batches = [{"image": images[:4], "text": texts[:4]}, {"image": images[4:], "text": texts[4:]}]
    queries = encode_batches(model, batches, documents=False)
    torch.testing.assert_close(torch.from_numpy(queries), model.encode_queries(images, texts))
    documents = encode_batches(model, [{"image": images}], documents=True)  # without a text, as in the task of CIRR
    torch.testing.assert_close(torch.from_numpy(documents), model.encode_gallery(images))
    assert not np.allclose(queries, documents)
    alone = encode_batches(model, [{"text": texts}], documents=False)
    torch.testing.assert_close(torch.from_numpy(alone), model.encode_queries(texts=texts))
    with pytest.raises(DataError, match="a document without an image"):
        encode_batches(model, [{"text": texts}], documents=True)


@pytest.mark.filterwarnings("default")
def test_a_task_of_local_data(tmp_path):
    mteb = pytest.importorskip("mteb", reason="mteb is not installed (extra mteb)")
    from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: PLC0415
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData  # noqa: PLC0415
    from mteb.mocks.mock_tasks.retrieval import general_args  # noqa: PLC0415

    from datasets import Dataset  # noqa: PLC0415 - of mteb

    class Colors(AbsTaskRetrieval):
        metadata = mteb.TaskMetadata(
            type="Any2AnyRetrieval",
            name="Colors",
            main_score="ndcg_at_10",
            **{**general_args, "modalities": ["image", "text"], "category": "it2i"},
        )

        def load_data(self, *_, **__):
            names = [str(at) for at in range(len(COLORS))]
            queries = Dataset.from_dict(
                {"id": [f"q{n}" for n in names], "image": pictures(), "text": [""] * len(names)}
            )
            documents = Dataset.from_dict({"id": [f"d{n}" for n in names], "image": pictures()})
            relevant = {f"q{n}": {f"d{n}": 1} for n in names}
            data = RetrievalSplitData(queries=queries, corpus=documents, relevant_docs=relevant, top_ranked=None)
            self.dataset = {"default": {"test": data}}
            self.data_loaded = True

    model = trainable("image", "frozen")
    found = mteb.evaluate(mteb_model(model), tasks=[Colors()], cache=None, overwrite_strategy="always")
    assert found.task_results[0].get_score() == pytest.approx(1.0)
