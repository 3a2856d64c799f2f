"""`union-convert`: convert a checkpoint of the published code into a model of this package."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from union_igrot.cli.command import check_new_folder, run_command
from union_igrot.storage.files import expand_user

if TYPE_CHECKING:
    from omegaconf import DictConfig


def convert(config: "DictConfig", _: Path) -> None:
    """Read the authors' file and write heads, the backbone's weights, `model.json` and a model card."""
    from union_igrot.models.reference import load_reference_checkpoint
    from union_igrot.reporting.model_card import write_model_card
    from union_igrot.terminal import print_line

    folder = check_new_folder("output_dir", config.output_dir)
    tokenizer = None if config.tokenizer is None else expand_user(config.tokenizer)
    model = load_reference_checkpoint(
        expand_user(config.checkpoint),
        config.model.name,
        config.target.kind,
        config.mask,
        sum_form=config.target.get("form", "training"),
        tokenizer=tokenizer,
        text_heads=config.text_heads,
    )
    model.save(folder, half=config.half)
    write_model_card(folder, folder / "results.json")
    heads = sum(x.numel() for x in model.head_parameters())
    backbone = sum(x.numel() for x in model.backbone.parameters())
    described = model.describe()
    print_line(f"backbone {described['backbone']}, {backbone:,} weights of the file, images of {model.preprocess.size}")
    print_line(f"heads {described['fusion']['kind']} and {described['target']['kind']}, {heads:,} weights")
    print_line(f'written to {folder}; union_igrot.load("{folder}"), or union-eval checkpoint={folder}')


main = partial(run_command, "convert", convert)
if __name__ == "__main__":
    main()
