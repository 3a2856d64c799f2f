import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose as outer_compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import example, given, settings, strategies as st
from omegaconf import OmegaConf

from union_igrot.cli.config import check_sweep, compose, conf_dir, options_of
from union_igrot.cli.help import help_text
from union_igrot.errors import ConfigError

GROUPS = sorted(path.name for path in conf_dir().iterdir() if path.is_dir() and not path.name.startswith("_"))
COMMANDS = ("train", "eval")


def message(*overrides: str, name: str = "train") -> str:
    with pytest.raises(ConfigError) as caught:
        compose(name, overrides)
    return str(caught.value)


def test_defaults_are_right_and_whole():
    config = compose()
    assert (config.model.name, config.data.name, config.fusion.kind, config.target.kind) == (
        "tiny",
        "shapes",
        "transagg",
        "union",
    )
    assert "hydra" not in config
    assert compose("eval").checkpoint == "tiny"


def test_every_problem_is_named_at_once():
    said = message("seed=-1", "recipe.epochs=0", "recipe.clip=abc", "+nonsense=1", "data=folder", "fusion.layers=two")
    for key in ("seed=-1", "recipe.epochs=0", "recipe.clip=abc", "nonsense", "data.root", "fusion.layers=two"):
        assert key in said
    assert len(said.strip().splitlines()) == 6


@pytest.mark.parametrize("group", GROUPS)
def test_an_unknown_option_is_answered_with_the_allowed_ones(group):
    said = message(f"{group}=nope", name="eval" if group == "data" else "train")
    assert f"{group}=nope" in said
    assert all(option in said for option in options_of(group))


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("+recipe.epoch=3", "recipe.epochs"),
        ("+data.querys=3", "data.queries"),
        ("+features.dtyp=float16", "features.dtype"),
    ],
)
def test_a_typo_inside_a_group_names_what_was_meant(override, near):
    assert f"did you mean {near}?" in message(override)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("modle=tiny", "modle is not a setting"),
        ("data.triplet=3", "data.triplet is not a setting"),
        ("checkpoint=tiny", "checkpoint is not a setting"),
        ("seed=1.5", "whole number"),
        ("seed=true", "whole number"),
        ("recipe.rate=inf", "recipe.rate=inf"),
        ("recipe.rate=nan", "recipe.rate=nan"),
        ("recipe.rate=0", "above 0"),
        ("recipe.warmup=1.1", "at most 1"),
        ("recipe.batch_size=1", "at least 2"),
        ("loss.symmetric=1", "true or false"),
        ("features.dtype=int8", "float32, float16"),
        ("features.workers=-1", "or null"),
        ("strategy.devices=some", "auto or a whole number"),
        ("model.weights=/not/there", "an existing file, or null"),
        ("data.split=train", "val, test"),
        ("fusion.mask=both", "exclude, legacy"),
        ("target.start=zero", "image, reference"),
        ("fusion.kind=union", "image, text, sum, transagg"),
        ("seed=${nope}", "seed="),
        ("seed=[1", "[1"),
        ("~model", "model.name is missing"),
    ],
)
def test_a_wrong_value_is_answered_with_what_is_allowed(override, part):
    assert part in message(override)


def test_a_folder_needs_a_root_that_exists(tmp_path):
    assert "data.root is not given" in message("data=folder")
    assert "an existing folder" in message("data=folder", f"data.root={tmp_path / 'nowhere'}")
    assert compose("train", ["data=folder", f"data.root={tmp_path}"]).data.root == str(tmp_path)
    assert compose("eval", ["data=folder", f"data.root={tmp_path}"]).data.on_missing == "error"


@pytest.mark.parametrize("fusion", ["image", "text", "sum"])
@pytest.mark.parametrize("target", ["frozen", "sum", "shared"])
def test_heads_without_weights_are_refused_before_anything_is_encoded(fusion, target):
    assert "nothing is left to train" in message(f"fusion={fusion}", f"target={target}")


@pytest.mark.parametrize("heads", [("fusion=transagg", "target=frozen"), ("fusion=sum", "target=union")])
def test_one_head_with_weights_is_enough(heads):
    compose("train", heads)


def test_an_unknown_command_names_the_known_ones():
    assert "eval" in message(name="evaluate")
    assert "train" in message(name="evaluate")


def test_compose_leaves_the_state_of_hydra_as_it_was():
    state = GlobalHydra.instance()
    assert not state.is_initialized()
    compose()
    message("seed=-1")
    message("model=nope")
    assert not GlobalHydra.instance().is_initialized()


def test_compose_inside_a_program_under_hydra_gives_that_program_its_state_back():
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        compose("train", ["seed=3"])
        message("model=nope")
        assert outer_compose("eval").checkpoint == "tiny"
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_group_option_and_setting_with_its_meaning(name):
    text = help_text(name)
    config = compose(name)
    own = [group for group in GROUPS if group in config]
    assert max(map(len, text.splitlines())) <= 120
    for group in own:
        (said,) = re.findall(rf"^  {group} .*(?:\n {{13}}.*)*", text, re.MULTILINE)
        assert all(re.search(rf"[ ,]{option}\b", said) for option in options_of(group)), group
    for key in OmegaConf.to_container(config):
        assert re.search(rf"^\s*{key}[=. ]", text, re.MULTILINE), key
    for group in own:
        for key in config[group]:
            repeats = key in {"name", "kind"}
            assert repeats or f"{group}.{key}=" in text
    assert all(
        re.search(r"\S=\S+ {2,}\S|\S=\S{20,} \S", line) for line in text.splitlines() if line.startswith("  seed=")
    )
    assert not re.search(r"[ \t]$", text, re.MULTILINE)


def test_a_sweep_is_checked_value_by_value_before_its_first_run():
    check_sweep("train", ["target=frozen,union", "seed=0,1", "recipe.rate=1e-3"])
    check_sweep("eval", ["seed=range(3)"])
    for overrides, part in [
        (["target=frozen,nope"], "target=nope does not exist"),
        (["seed=0,-1"], "seed=-1"),
        (["seed=0,1", "recipe.clip=0"], "recipe.clip=0"),
        (["seed=0,1", "output_dir=here"], "output_dir is the folder of one run"),
        (["target=glob(*)"], "list the values"),
        (["seed=[0,"], "'[0,'"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(part)):
            check_sweep("train", overrides)


def test_a_sweep_of_one_run_may_name_its_folder():
    check_sweep("train", ["seed=1", "output_dir=here"])


_KEYS = st.sampled_from(
    [
        "seed",
        "model",
        "data",
        "data.root",
        "recipe.rate",
        "fusion.heads",
        "target",
        "hydra",
        "hydra.run",
        "",
        "a.b",
        "+x",
        "~fusion",
        "~data.split",
        "++recipe.epochs",
        "output_dir",
        "features",
        "model@here",
        "defaults",
        "hydra/launcher",
    ]
)
_VALUES = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["null", "true", "[]", "{}", "{a:1}", "[1,2]", "${seed}", "${nope}", "${now:%Y}", "???", "''", "tiny"]
    ),
    st.text(max_size=6),
)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(COMMANDS),
    overrides=st.lists(st.tuples(_KEYS, st.sampled_from(["=", "=", "=", ""]), _VALUES).map("".join), max_size=3),
)
@example("train", ["model=[1,2]"])
def test_whatever_is_given_only_a_clear_error_comes_out(name, overrides):
    try:
        config = compose(name, overrides)
    except ConfigError:
        pass
    else:
        assert 0 <= config.seed < 2**32
        assert config.features.batch_size >= 1
    assert not GlobalHydra.instance().is_initialized()


def test_composing_imports_nothing_heavy():
    code = (
        "import sys; from union_igrot.cli.config import compose; compose('train'); compose('eval');"
        "print([m for m in ('torch', 'numpy', 'transformers', 'lightning', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.home())
    assert done.stdout.strip() == "[]"
