import re
import subprocess
import sys

import pytest
import yaml
from hydra import compose as outer_compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import example, given, settings, strategies as st
from omegaconf import OmegaConf

from union_igrot.cli.config import compose, conf_dir, has_file, options_of, parse_arguments, read_option
from union_igrot.cli.help import help_text
from union_igrot.cli.settings import COMMANDS, GROUPS
from union_igrot.cli.sweep import check_sweep
from union_igrot.errors import ConfigError
from union_igrot.settings import declared, show

SWEPT = [name for name, command in COMMANDS.items() if command.hydra]
NASTY = [
    "it's red, not blue",
    "\"taken by\" in ('Ann', 'Bo')",
    "a=b",
    "${oc.env:HOME}",
    "\\${text}",
    "\\\\${a}\\\\'\\",
    "[a,b]",
    "{a: b}",
    "null",
    "true",
    "3",
    "",
    "  two  blanks  ",
    "tab\tand\nnewline",
    "C:\\photos\\new\\",
    "# no comment",
    "猫の写真.jpg",
    "odd byte \udcff",
    "--help me",
]


def message(*overrides: str, name: str = "train") -> str:
    with pytest.raises(ConfigError) as caught:
        compose(name, overrides)
    return str(caught.value)


def test_every_problem_is_named_at_once():
    said = message(
        *("seed=-1", "recipe.epoch=0", "recipe.clip=abc", "nonsense=1", "data=cirko", "model=larg", "fusion.layers=two")
    )
    for part in ("seed: -1", "recipe.epochs?", "clip: abc", "nonsense", "circo?", "large?", "fusion.layers: two"):
        assert part in said
    assert len(said.splitlines()) == 8


@pytest.mark.parametrize("form", ["{}={}", "--{} {}", "--{}={}"])
def test_three_forms_of_an_argument(form, tmp_path):
    words = [word for k, v in (("recipe.epochs", 3), ("model", "large"), ("progress", "false"), ("output_dir", "a b"))
             for word in form.format(k, v).split(" ", 1 if form == "--{} {}" else 0)]  # fmt: skip
    config = compose("train", words)
    assert (config.recipe.epochs, config.model.name, config.progress, config.output_dir) == (3, "large", False, "a b")
    assert compose("convert", ["--half", f"checkpoint={tmp_path}", "--output-dir", "x"]).half is True


@pytest.mark.parametrize("group", GROUPS)
def test_an_unknown_option_names_the_known_ones(group):
    said = message(f"{group}=nope")
    assert f"{group}=nope" in said
    assert all(option in said for option in options_of(group))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("modle=tiny", "did you mean model?"),
        ("epochs=3", "did you mean recipe.epochs?"),
        ("+recipe.epoch=3", "did you mean recipe.epochs?"),
        ("features=3", "features.dtype"),
        ("data.triplet=3", "did you mean data.triplets?"),
        ("seed=1.5", "an integer"),
        ("seed=true", "an integer"),
        ("recipe.rate=inf", "recipe.rate: inf"),
        ("recipe.rate=nan", "recipe.rate: nan"),
        ("recipe.rate=0", "> 0"),
        ("recipe.warmup=1.1", "<= 1"),
        ("recipe.batch_size=1", ">= 2"),
        ("recipe.monitor=val/shapes_cir/R@0", "val/BENCHMARK/METRIC"),
        ("loss.symmetric=1", "true or false"),
        ("features.dtype=int8", "float32 or float16"),
        ("features.workers=-1", "or null"),
        ("strategy.devices=some", "auto or an integer"),
        ("model.weights=/not/there", "an existing file or null"),
        ("data.split=train", "val or test"),
        ("fusion.mask=exlude", "did you mean exclude?"),
        ("seed=${nope}", "seed: ${nope}"),
        ("~model", "unexpected argument '~model'"),
        ("seed", "KEY=VALUE"),
        ("--seed", "--seed needs a value"),
        ("cache_limit=much", "a number of bytes"),
        ("hydra.nope=1", "nope"),
    ],
)
def test_a_wrong_argument_is_one_line_with_what_is_expected(override, part):
    said = message(override)
    assert part in said
    assert "\n" not in said


def test_a_folder_needs_a_root_that_exists(tmp_path):
    assert "data.root is required" in message("data=folder")
    assert "an existing folder" in message("data=folder", f"data.root={tmp_path / 'nowhere'}")
    assert compose("train", ["data=folder", f"data.root={tmp_path}"]).data.root == str(tmp_path)


@pytest.mark.parametrize("fusion", ["image", "text", "sum"])
@pytest.mark.parametrize("target", ["frozen", "sum", "shared"])
def test_heads_without_weights_are_refused_before_anything_is_encoded(fusion, target):
    if target != "sum":
        assert "nothing to train" in message(f"fusion={fusion}", f"target={target}")


def test_an_unknown_command_names_the_known_ones():
    assert "train" in message(name="trian")


def test_compose_keeps_the_state_of_a_program_under_hydra():
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        compose("train", ["seed=3"])
        message("model=nope")
        assert outer_compose("eval").checkpoint == "tiny"
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize("text", NASTY)
def test_text_arrives_as_typed(text):
    config = compose("search", ["index=x", f"text={text}", f"--where={text}", f"liked={text}a", f"liked={text}b"])
    assert (config.text, config.where, list(config.liked)) == (text, text, [f"{text}a", f"{text}b"])
    values = OmegaConf.to_container(compose("train", [f"output_dir={text}"]), resolve=True)
    assert values["output_dir"] == (None if text == "null" else text)


def test_lists_are_repeated_or_bracketed():
    assert compose("search", ["index=x", "image=[a.jpg,'b, c.jpg']"]).image == ["a.jpg", "b, c.jpg"]
    assert compose("search", ["index=x", "image=a.jpg", "--image", "b, c.jpg"]).image == ["a.jpg", "b, c.jpg"]
    assert "image=A image=B" in message("index=x", "image=a.jpg", "image=[b.jpg]", name="search")
    assert "index is given twice" in message("index=x", "index=y", name="search")
    assert "index is required" in message("text=a", name="search")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_short_help_fits_two_screens_and_all_names_every_setting(name):
    short, whole = help_text(name), help_text(name, "all")
    assert len(short.splitlines()) <= 50
    assert max(map(len, whole.splitlines())) <= 100
    assert f"usage: union-{name}" in short
    assert all(f"\n  {example}" in short for example in COMMANDS[name].examples)
    for word in ("--version", "--help"):
        assert word in short
    for one in declared(COMMANDS[name].settings):
        assert f"{one.key}={show(one.default)}" in whole
        assert "." in one.key or f"{one.key}={show(one.default)}" in short
    for group in COMMANDS[name].groups:
        assert all(option in help_text(name, group) for option in options_of(group))
    with pytest.raises(ConfigError, match="all"):
        help_text(name, "nope")


def test_the_examples_parse():
    for name, command in COMMANDS.items():
        for line in command.examples:
            assert not parse_arguments(name, line.split()[1:] if '"' not in line else []).problems


@pytest.mark.parametrize("group", GROUPS)
def test_yaml_files_agree_with_the_declared_settings(group):
    for option in options_of(group):
        values = read_option(group, option)
        schema = {one.key: one for one in GROUPS[group].settings(values.get(GROUPS[group].key))}
        assert values.keys() == schema.keys(), option
        text = (conf_dir() / group / f"{option}.yaml").read_text() if has_file(group, option) else ""
        for key, one in schema.items():
            place = f"{group}={option}: {key}"
            assert values[key] == "???" or one.allows(values[key]), place
            assert f"# {one.help}\n" in text or not (text and one.help), place
            assert one.help or key in ("name", "kind"), place
            assert all(show(choice) in f"{one.help} null" for choice in one.choices if one.help), place


@pytest.mark.parametrize("name", SWEPT)
def test_the_yaml_of_a_command_agrees_with_its_settings(name):
    text = (conf_dir() / f"{name}.yaml").read_text()
    values = yaml.safe_load(text)
    groups = {key: option for one in values["defaults"] if isinstance(one, dict) for key, option in one.items()}
    assert {key: one for key, one in groups.items() if not key.startswith("override")} == {
        group: default for group, (default, _) in COMMANDS[name].groups.items()
    }
    for one in declared(COMMANDS[name].settings):
        section, _, key = one.key.rpartition(".")
        assert (values[section] if section else values)[key] == one.default
        assert f"# {one.help}\n" in text


def test_a_sweep_is_checked_value_by_value_before_its_first_run():
    check_sweep("train", parse_arguments("train", ["target=frozen,union", "seed=0,1", "recipe.rate=1e-3"]))
    check_sweep("train", parse_arguments("train", ["seed=1", "output_dir=here"]))
    check_sweep("eval", parse_arguments("eval", ["seed=range(3)"]))
    for overrides, part in [
        (["target=frozen,nope"], "target=nope"),
        (["seed=0,-1"], "seed: -1"),
        (["seed=0,1", "recipe.clip=0"], "recipe.clip: 0"),
        (["seed=0,1", "output_dir=here"], "output_dir is the folder of one run"),
        (["target=glob(*)"], "list the values"),
        (["seed=[0,"], "[0,"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(part)):
            check_sweep("train", parse_arguments("train", overrides))


_KEYS = ["seed", "model", "data", "data.root", "recipe.rate", "fusion.kind", "target", "hydra", "hydra.run", "", "a.b"]
_KEYS += ["+x", "~fusion", "--recipe", "++recipe.epochs", "features", "model@here", "defaults", "hydra/launcher"]
_TEXTS = ["null", "true", "[]", "{a:1}", "[1,2]", "${seed}", "${nope}", "???", "''", "tiny", "1.5", "nan", "-3"]


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(SWEPT),
    overrides=st.lists(
        st.tuples(
            st.sampled_from(_KEYS),
            st.sampled_from(["=", "=", ""]),
            st.one_of(st.sampled_from(_TEXTS), st.text(max_size=6)),
        ).map("".join),
        max_size=3,
    ),
)
@example("train", ["model=[1,2]"])
def test_whatever_is_given_only_a_clear_error_comes_out(name, overrides):
    try:
        config = compose(name, overrides)
    except ConfigError:
        pass
    else:
        assert 0 <= config.seed < 2**32
    assert not GlobalHydra.instance().is_initialized()


HEAVY = ("torch", "numpy", "transformers", "lightning", "PIL", "lance", "starlette", "jinja2")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_mistakes_import_nothing_heavy(name):
    code = (
        f"import sys; from union_igrot.cli.{name} import main\n"
        "for words in (['--help'], ['--version'], ['--help', 'all']):\n"
        "    main(words)\n"
        "print('after help:', *[m for m in ('hydra', 'omegaconf') if m in sys.modules])\n"
        "for words in (['data=nope'], ['seed=-1', 'nonsense=2']):\n"
        "    try: main(words)\n"
        "    except SystemExit as stop: assert stop.code == 2\n"
        f"print('heavy:', *[m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "after help:\n" in done.stdout
    assert done.stdout.splitlines()[-1] == "heavy:"
