"""`union-export`: write the towers and heads of a model as ONNX files."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from union_igrot.cli.command import check_new_folder, run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def export(config: "DictConfig", _: Path) -> None:
    """Export a model as configured."""
    folder = check_new_folder("output", config.output)
    from union_igrot.gallery.metadata import load_checkpoint
    from union_igrot.models.onnx import export_onnx, require_onnx
    from union_igrot.storage.sizes import format_size
    from union_igrot.terminal import print_line

    require_onnx()
    model, _name = load_checkpoint(config.checkpoint, config.weights, config.preprocess)
    folder.mkdir(parents=True, exist_ok=True)
    for file in export_onnx(model, folder, config.precision):
        size = sum(path.stat().st_size for path in folder.glob(f"{file}*"))
        print_line(f"{folder / file}: {format_size(size)}")


main = partial(run_command, "export", export)
if __name__ == "__main__":
    main()
