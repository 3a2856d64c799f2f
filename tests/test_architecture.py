"""Rules of the code base: imports, sizes, every configuration."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml

import union_igrot
from union_igrot.cli.config import compose, conf_dir, plain, read_option
from union_igrot.cli.groups import GROUPS
from union_igrot.cli.settings import COMMANDS
from union_igrot.experiment import build_model
from union_igrot.models.registry import QUERY_HEADS, TARGET_HEADS
from union_igrot.settings import declared
from union_igrot.training.learner import Recipe, TrainerConfig
from union_igrot.training.losses import build_loss

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "union_igrot"
FILES = sorted(SRC.rglob("*.py"))
PACKAGES = {
    "_lazy": set(),
    "types": set(),
    "errors": set(),
    "terminal": {"errors"},
    "settings": {"errors", "storage"},
    "storage": set(),
    "metrics": set(),
    "images": {"storage"},
    "datasets": {"images", "storage"},
    "models": {"images", "storage"},
    "synthetic": {"datasets", "images", "storage"},
    "features": {"models", "images", "storage"},
    "evaluation": {"features", "models", "datasets", "metrics", "images", "storage"},
    "training": {"evaluation", "features", "models", "datasets", "synthetic", "metrics", "images", "storage"},
    "gallery": {"models", "images", "evaluation", "features", "storage"},
    "reporting": {"evaluation", "metrics", "images", "storage"},
}
LEAVES = {"types", "errors", "terminal", "settings", "_lazy"}
TOP = {"experiment", "api", "cli", "demo", "service", "__init__"}
# Functions of one protocol, which several modules implement.
SHARED_NAMES = {"main", "filter_text"}
LINES, FUNCTION_LINES = 600, 60


def package_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Return the full names of all modules that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages_used(path: Path) -> set[str]:
    names = imported(path)
    used = {name.split(".")[1] for name in names if name.startswith("union_igrot.")}
    return used & (PACKAGES.keys() | TOP)


def test_every_package_is_in_the_layout():
    assert {package_of(path) for path in FILES} == PACKAGES.keys() | TOP


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_imports_follow_the_layout(path):
    package = package_of(path)
    allowed = PACKAGES.get(package, PACKAGES.keys() | TOP) | LEAVES | {package}
    assert packages_used(path) <= allowed, f"{package} must not import {sorted(packages_used(path) - allowed)}"


def test_the_import_check_can_fail(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from union_igrot.cli import config\n    import union_igrot.models.x\n")
    assert packages_used(file) == {"cli", "models"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_a_file_follows_the_rules(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "opens with no docstring"
    assert len(text.splitlines()) <= LINES
    assert path.stem != "utils"
    if package_of(path) != "cli":
        assert not {name.split(".")[0] for name in imported(path)} & {"hydra", "omegaconf"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert "*" not in {alias.name for alias in node.names}, "star import"
            assert node.module != "__future__", "jaxtyping needs evaluated annotations"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            described = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
            lines = node.end_lineno - node.lineno + 1 - described
            assert lines <= FUNCTION_LINES, f"{node.name} has {lines} lines"


def test_first_lines_of_attribute_docstrings_have_no_colon():
    """Sphinx's Napoleon reads the text before a colon as the type."""
    for path in FILES:
        texts = []
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef):
                pairs = zip(node.body, node.body[1:], strict=False)
                texts += [b.value.value for a, b in pairs if isinstance(a, ast.Assign | ast.AnnAssign) and is_text(b)]
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(one) == "property" for one in node.decorator_list):
                texts.append(ast.get_docstring(node) or "")
        found = [one for one in texts if re.search(r":( |$)", re.sub(r"`[^`]*`", "", one.partition("\n")[0]))]
        assert not found, path


def test_names_of_classes_and_public_functions_are_defined_once():
    places = defaultdict(set)
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                places[node.name].add(str(path.relative_to(SRC)))
    assert {name: sorted(files) for name, files in places.items() if len(files) > 1 and name not in SHARED_NAMES} == {}


def is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def in_new_interpreter(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_is_light():
    code = (
        "import sys; import union_igrot;"
        "dir(union_igrot); union_igrot.__version__;"
        "print('heavy:', *[m for m in ('torch', 'numpy', 'PIL', 'hydra', 'lightning') if m in sys.modules])"
    )
    assert in_new_interpreter(code) == "heavy:"


@pytest.mark.parametrize("name", [name for name in dir(union_igrot) if not name.startswith("__")])
def test_public_names_exist_and_are_documented(name):
    thing = getattr(union_igrot, name)
    assert inspect.getdoc(thing), f"{name} has no docstring"


LAZY = [path.parent for path in FILES if path.name == "__init__.py" and "if TYPE_CHECKING:" in path.read_text()]


@pytest.mark.parametrize("folder", LAZY, ids=lambda folder: folder.name)
def test_lazy_names_exist(folder):
    module = importlib.import_module(".".join(folder.relative_to(SRC.parent).parts))
    assert all(hasattr(module, name) for name in dir(module))


def test_an_unknown_name_lists_the_public_ones():
    with pytest.raises(AttributeError, match=r"it has .*load"):
        union_igrot.nonsense  # noqa: B018 - the access is what is tested


EXPERIMENTS = sorted((conf_dir() / "experiment").glob("*.yaml"))
OPTIONS = sorted(path for path in conf_dir().glob("*/*.yaml") if path not in EXPERIMENTS)
PARTNER = {"fusion": "target=union", "target": "fusion=transagg"}


def chosen(path: Path, place: Path, command: str) -> list[str]:
    """Return the settings that choose an option, with the required ones and a head that can be trained."""
    group, option = path.parent.name, path.stem
    needed = [f"{group}.{key}={place}" for key, value in read_option(group, option).items() if value == "???"]
    required = [one.key for one in declared(COMMANDS[command].settings) if one.default == "???"]
    partner = [PARTNER[group]] if group in PARTNER and command == "train" else []
    return [f"{group}={option}", *needed, *(f"{key}={place}" for key in required), *partner]


@pytest.mark.slow
@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_option_of_every_group_is_composed_and_built(path, tmp_path):
    group = path.parent.name
    takers = [name for name, command in COMMANDS.items() if group in command.groups]
    assert takers, f"no command takes the group {group}"
    for command in takers:
        if command == "convert" and path.stem in ("shared", "residual"):
            continue  # the published code has no such target
        config = compose(command, chosen(path, tmp_path, command))
        assert plain(config)[group].items() >= yaml.safe_load(path.read_text()).items()
        if command == "train" and (group != "model" or path.stem == "tiny"):
            Recipe(**config.recipe)
            build_loss(**config.loss)
            where = config.strategy
            TrainerConfig(where.accelerator, where.devices, where.nodes, where.name, config.precision.trainer)
            model = build_model(plain(config), {})
            assert (model.fusion.kind, model.target.kind) == (config.fusion.kind, config.target.kind)
            assert any(weight.requires_grad for weight in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_is_composed_and_its_heads_are_built(path):
    name = path.stem.split("_")
    config = compose("train", [f"experiment={path.stem}"])
    assert config.data.name == {"llavasco": "llavasco", "sketchy": "training_sketchy"}[name[0]]
    assert config.model.name == name[1]
    assert config.target.kind == {"original": "frozen", "sum": "sum", "union": "union"}[name[2]]
    assert config.model.projector == ("mlp" if name[3:] else "none")
    assert (config.loss.scale, config.recipe.batch_size, config.recipe.schedule) == (100.0, 32, "restarts")
    # The weights of the backbone are not available here.
    small = compose("train", [f"experiment={path.stem}", "model=tiny"])
    assert small.model.projector == config.model.projector
    model = build_model(plain(small), {})
    assert (model.fusion.kind, model.target.kind) == ("transagg", config.target.kind)
    assert "Published" in path.read_text() or "No published result" in path.read_text()


def test_every_head_that_can_be_built_is_an_option():
    kinds = {
        group: {yaml.safe_load(p.read_text())["kind"] for p in OPTIONS if p.parent.name == group} for group in PARTNER
    }
    assert kinds == {"fusion": set(QUERY_HEADS.builtin), "target": set(TARGET_HEADS.builtin)}


@pytest.mark.parametrize(("group", "registry"), [("fusion", QUERY_HEADS), ("target", TARGET_HEADS)])
def test_settings_of_heads_are_the_arguments_of_their_classes(group, registry):
    for kind in registry.builtin:
        head = registry.get(kind)
        arguments = inspect.signature(head).parameters.values() if "__init__" in vars(head) else ()
        expected = {
            one.name: (one.default, get_args(one.annotation) if get_origin(one.annotation) is Literal else ())
            for one in arguments
            if one.name != "width" and one.name not in head.model_sizes
        }
        settings = [one for one in GROUPS[group].settings(kind) if one.key != "kind"]
        assert {one.key: (one.default, one.choices) for one in settings} == expected


def test_every_configuration_starts_with_a_line_for_the_help():
    for path in [*OPTIONS, *EXPERIMENTS, *conf_dir().glob("*.yaml")]:
        first = path.read_text().removeprefix("# @package _global_\n").splitlines()[0]
        assert re.match(r"# \S.*\.$", first), f"{path}: {first}"


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_names_a_machine_or_a_registry():
    # Written in pieces, so that this file passes its own test.
    places = [
        r"/ho" + r"me/(?!someone)\w",
        r"/Use" + r"rs/\w",
        r"/ro" + r"ot/",
        r"/work" + r"/\w",
        r"/tm" + r"p/\w",
        r"C:\\Us" + "ers",
    ]
    hosts = [
        "pypi" + r"\.org",
        "pythonhosted" + r"\.org",
        "index-" + "url",
        "download" + r"\.pytorch",
        "reg" + r"istry\.[\w.]+\.(com|net|org|io)\b",
    ]
    forbidden = re.compile("|".join(places + hosts))
    found = []
    for path in tracked():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}:{n}: {line}" for n, line in enumerate(lines, 1) if forbidden.search(line)]
    assert found == []


def test_weights_in_the_package_stay_small():
    assert sum(path.stat().st_size for path in (SRC / "weights").rglob("*") if path.is_file()) <= 16 * 2**20
