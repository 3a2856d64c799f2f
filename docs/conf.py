"""Sphinx configuration of `nox -s docs`; the reference comes from `--help` and docstrings. Warnings are errors."""

from pathlib import Path

from union_igrot import __version__
from union_igrot.cli.command import help_text
from union_igrot.cli.settings import COMMANDS

HERE = Path(__file__).resolve().parent

project = "union-igrot"
author = "The union-igrot developers"
copyright = f"2026, {author}"  # noqa: A001 - Sphinx wants this name
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]
html_theme = "furo"
html_title = f"union-igrot {version}"
html_favicon = "../src/union_igrot/demo/static/icon.svg"
html_static_path: list[str] = []
templates_path: list[str] = []
default_role = "literal"
napoleon_use_ivar = True  # attributes as a list; else each would be described twice
nb_execution_mode = "auto"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # no page asks another host
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
copybutton_exclude = ".linenos, .gp, .go"

MODULES = {
    "Data types and errors": ["types", "errors"],
    "Python API": ["api", "experiment"],
    "Configuration": ["cli.config"],
    "Models": [
        "models.model",
        "models.registry",
        "models.factory",
        "models.backbones.base",
        "models.heads.query",
        "models.heads.target",
        "models.reference",
    ],
    "Images and datasets": [
        "images.decode",
        "images.transforms",
        "datasets.registry",
        "datasets.loading",
        "datasets.folder",
        "datasets.submission",
        "synthetic.shapes",
    ],
    "Evaluation": [
        "evaluation.results",
        "evaluation.evaluate",
        "evaluation.scoring",
        "evaluation.ranking",
        "metrics.names",
        "metrics.functional",
        "metrics.statistics",
    ],
    "Training": [
        "training.settings",
        "training.losses",
        "training.datamodule",
        "training.learner",
        "training.processes",
    ],
    "Galleries": [
        "gallery.gallery",
        "gallery.results",
        "gallery.engines.base",
        "gallery.engines.factory",
        "gallery.engines.filters",
    ],
    "Features": ["features.extractor", "features.store", "storage.cache"],
}
"""Modules of the reference, in this order."""


def write_reference() -> None:
    """Write a page per module, and one that lists them."""
    place = HERE / "reference" / "modules"
    place.mkdir(parents=True, exist_ok=True)
    index = ["# Modules\n"]
    for theme, modules in MODULES.items():
        index += [f"## {theme}\n", "```{toctree}\n:maxdepth: 1\n", *modules, "```\n"]
        for module in modules:
            page = f"{module}\n{'=' * len(module)}\n\n.. automodule:: union_igrot.{module}\n"
            (place / f"{module}.rst").write_text(page)
    (place / "index.md").write_text("\n".join(index))


def write_commands() -> None:
    """Write what `--help all` of each command says."""
    lines = ["# Commands\n", "What `--help all` of each command prints.\n"]
    for name in sorted(COMMANDS):
        lines += [f"## union-{name}\n", "```text", help_text(name, "all"), "```\n"]
    (HERE / "reference" / "commands.md").write_text("\n".join(lines))


write_reference()
write_commands()
