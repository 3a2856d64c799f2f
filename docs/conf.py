"""How the documentation is built: `nox -s docs`.

The pages of the commands come from their configurations and the pages of the modules from their
docstrings, so that neither can fall behind. A warning is an error.
"""

from pathlib import Path

from union_igrot import __version__
from union_igrot.cli.help import help_text
from union_igrot.config import conf_dir

HERE = Path(__file__).resolve().parent

project = "union-igrot"
author = "The union-igrot developers"
copyright = f"2026, {author}"  # noqa: A001 - Sphinx wants this name
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"union-igrot {version}"
html_static_path: list[str] = []
templates_path: list[str] = []
default_role = "literal"
napoleon_use_ivar = True  # attributes as a list; else each would be described twice
nb_execution_mode = "auto"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
copybutton_exclude = ".linenos, .gp, .go"

ROOMS = {
    "Vocabulary and errors": ["types", "errors"],
    "Models": [
        "model",
        "reference",
        "backbones.base",
        "backbones.build",
        "heads.fusion",
        "heads.target",
        "heads.projector",
    ],
    "Benchmarks and data": [
        "data.registry",
        "data.folder",
        "data.shapes",
        "data.pictures",
        "data.transforms",
        "data.submission",
    ],
    "Evaluation": [
        "evaluate",
        "scoring",
        "predictions",
        "metrics.functional",
        "metrics.intervals",
        "metrics.significance",
    ],
    "Training": ["losses", "datamodule", "learner", "processes"],
    "Galleries": [
        "gallery.gallery",
        "gallery.answers",
        "indexing.run",
        "indexing.work",
        "index.base",
        "index.where",
        "index.exact",
        "index.open",
    ],
    "Features": ["encode", "store.features", "store.space"],
}
"""What stands in the reference, in this order; what another program builds on."""


def write_reference() -> None:
    """Write a page a room and one that lists them."""
    place = HERE / "reference" / "modules"
    place.mkdir(parents=True, exist_ok=True)
    index = ["# Modules\n"]
    for theme, rooms in ROOMS.items():
        index += [f"## {theme}\n", "```{toctree}\n:maxdepth: 1\n", *rooms, "```\n"]
        for room in rooms:
            name = f"union_igrot.{room}"
            (place / f"{room}.rst").write_text(f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n")
    (place / "index.md").write_text("\n".join(index))


def write_commands() -> None:
    """Write what each command says to `--help`."""
    lines = ["# Commands\n", "What `--help` says, which is read from the configurations themselves.\n"]
    for path in sorted(conf_dir().glob("*.yaml")):
        lines += [f"## union-{path.stem}\n", "```text", help_text(path.stem), "```\n"]
    (HERE / "reference" / "commands.md").write_text("\n".join(lines))


write_reference()
write_commands()
