"""Models exported to ONNX, compared with torch."""

from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
from jaxtyping import config

from union_igrot.models import onnx

needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason='the extra "onnx" is not installed',
)


@contextmanager
def untyped():
    """Check no shapes: the exporter passes tensors of symbolic shapes."""
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        config.update("jaxtyping_disable", False)


@untyped()
def assert_exported_equals(model, folder, texts):
    """Export a model and compare each file with torch; return the names of the files."""
    files, size = onnx.export_onnx(model, folder), model.preprocess.size
    images = torch.randn(len(texts), 3, size, size, generator=torch.Generator().manual_seed(0))
    words = model.backbone.text_inputs(texts)
    with torch.no_grad():
        expected = model.embed_gallery(images), model.embed_queries(None, texts), model.embed_queries(images, texts)
    for file, inputs, embeddings in zip(files, ((images,), words, (images, *words)), expected, strict=True):
        found = onnx.OnnxSession(folder / file)(*inputs)
        torch.testing.assert_close(found, torch.nn.functional.normalize(embeddings, dim=-1), atol=1e-4, rtol=0)
    return files
