"""Models in ONNX (extra `onnx`): exported for other programs, and run by ONNX Runtime on a CPU, also in 8 bits."""

import json
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from union_igrot.errors import CheckpointError, first_line, require_packages
from union_igrot.models.model import IGROTModel
from union_igrot.storage.cache import default_root
from union_igrot.storage.locks import acquire_exclusive, lock_path

Precision = Literal["fp32", "int8"]
GALLERY_FILE: Final = "gallery.onnx"
QUERY_FILE: Final = "query.onnx"
TEXT_FILE: Final = "text.onnx"
DESCRIPTION_FILE: Final = "onnx.json"
_AT_ONCE: Final = 8  # images that a thread computes at once
_WAIT_SECONDS: Final = 600.0
_EXAMPLES: Final = ("with longer sleeves", "in red")


@final
class _Tower(nn.Module):
    """Part of a model as a function of tensors alone."""

    def __init__(self, model: IGROTModel, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.compute = model, compute

    def forward(self, *inputs: Tensor) -> Tensor:
        return F.normalize(self.compute(*inputs), dim=-1)


def export_onnx(model: IGROTModel, folder: Path, precision: Precision = "fp32", *, texts: bool = True) -> list[str]:
    """Write a model's towers and heads as ONNX files, whose outputs are unit embeddings.

    `gallery.onnx` takes preprocessed images, `text.onnx` the token ids of texts, `query.onnx` both. `onnx.json` names
    the model, its preprocessing, and the inputs of each file.

    Args:
        model: A model, moved to the CPU.
        folder: An existing folder.
        precision: `int8` stores the weights of linear layers in 8 bits and rounds their inputs at each call;
            convolutions, norms and attention stay in float32.
        texts: Whether to write `text.onnx` and `query.onnx`, too.

    Returns:
        The names of the files.

    Raises:
        ConfigError: If a package is missing, or the backbone does not say how its texts become tensors.
        CheckpointError: If the exporter cannot convert the model, or the folder cannot be written.
    """
    require_onnx()
    model.to("cpu").eval()
    size = model.preprocess.size
    images = torch.zeros(2, 3, size, size)
    jobs: dict[str, tuple[Callable[..., Tensor], dict[str, Tensor]]] = {
        GALLERY_FILE: (model.embed_gallery, {"images": images})
    }
    if texts:
        backbone = model.backbone
        words = {f"text_{at}": x for at, x in enumerate(backbone.text_inputs(_EXAMPLES))}
        jobs[TEXT_FILE] = (lambda *text: backbone.text_features(*text).pooled, words)
        jobs[QUERY_FILE] = (
            lambda pixels, *text: model.embed_queries(pixels, backbone.text_features(*text)),
            {"images": images, **words},
        )
    model.null_text()  # a constant of the files
    for file, (compute, inputs) in jobs.items():
        try:
            _export(_Tower(model, compute), inputs, folder / file, precision)
        except OSError as error:
            raise CheckpointError(f"cannot write {folder / file} ({first_line(error)}); give another folder") from None
        except Exception as error:  # torch's exporter has many
            raise CheckpointError(
                f"cannot export {file} of backbone {model.backbone.name} ({type(error).__name__}: "
                f"{first_line(error)}); export another model, or index with precision=fp32"
            ) from error
    described = {
        "model": model.describe(),
        "precision": precision,
        "preprocess": asdict(model.preprocess),
        "files": {file: list(inputs) for file, (_, inputs) in jobs.items()},
    }
    (folder / DESCRIPTION_FILE).write_text(json.dumps(described, indent=2) + "\n")
    return list(jobs)


def require_onnx() -> None:
    """Raise a ConfigError if a package of the extra `onnx` is missing."""
    require_packages("ONNX", "onnx", "onnx", "onnxscript", "onnxruntime")


def _export(tower: nn.Module, inputs: dict[str, Tensor], path: Path, precision: Precision) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 - an extra
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415

    shapes = tuple(dict.fromkeys(range(2 if name != "images" else 1), torch.export.Dim.AUTO) for name in inputs)
    with TemporaryDirectory() as place, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's, on its own parts
        whole = path if precision == "fp32" else Path(place, "float32.onnx")
        torch.onnx.export(
            tower,
            tuple(inputs.values()),
            str(whole),
            input_names=list(inputs),
            output_names=["embeddings"],
            dynamic_shapes=(shapes,),
            dynamo=True,
            verbose=False,
        )
        if precision == "int8":
            prepared = Path(place, "prepared.onnx")
            quant_pre_process(str(whole), str(prepared), skip_symbolic_shape=True, save_as_external_data=True)
            quantize_dynamic(
                prepared,
                path,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                reduce_range=True,  # products of 8 bits overflow on CPUs without VNNI
                weight_type=QuantType.QInt8,
            )


@final
class OnnxSession:
    """An exported file in ONNX Runtime, on a CPU.

    Each of torch's number of threads computes a few rows at a time, so that none waits for another.

    Args:
        path: The file.

    Raises:
        ConfigError: If ONNX Runtime is not installed.
        CheckpointError: If the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        require_onnx()
        import onnxruntime  # noqa: PLC0415 - an extra

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common class
            raise CheckpointError(f"cannot read {path} ({first_line(error)}); remove it and export again") from None
        self._names = [one.name for one in self._session.get_inputs()]

    def __call__(self, *inputs: Tensor) -> Float[Tensor, "batch dim"]:
        """Return the embeddings of a batch of at least one.

        Args:
            inputs: The file's inputs in order, on the CPU.
        """

        def run(parts: Sequence[Tensor]) -> Tensor:
            named: dict[str, Any] = {name: x.numpy() for name, x in zip(self._names, parts, strict=True)}
            return torch.from_numpy(self._session.run(None, named)[0])

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return torch.cat(list(pool.map(run, zip(*(x.split(_AT_ONCE) for x in inputs), strict=True))))


def open_gallery_session(model: IGROTModel, precision: Precision) -> OnnxSession:
    """Return a model's image tower and target head in ONNX Runtime; exported to the cache at the first call.

    Args:
        model: The model.
        precision: As for `export_onnx`.
    """
    folder = default_root() / "onnx" / f"{model.fingerprint()}-{precision}"
    folder.mkdir(parents=True, exist_ok=True)
    held = acquire_exclusive(lock_path(folder), wait=_WAIT_SECONDS)
    if held is None:
        raise CheckpointError(f"another process has been exporting to {folder} for long; wait until it ends")
    with held:
        if not (folder / DESCRIPTION_FILE).is_file():  # written last
            export_onnx(model, folder, precision, texts=False)
    return OnnxSession(folder / GALLERY_FILE)
