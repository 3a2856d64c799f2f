import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose as outer_compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import example, given, settings, strategies as st

from union_igrot.cli.command import help_text
from union_igrot.cli.config import (
    _known,
    compose,
    conf_dir,
    options_of,
    parse_arguments,
    parseable,
    plain,
    read_option,
)
from union_igrot.cli.groups import GROUPS
from union_igrot.cli.settings import COMMANDS
from union_igrot.cli.sweep import _read_override, check_sweep
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


def test_all_problems_are_reported_at_once():
    printed = message(
        *("seed=-1", "recipe.epoch=0", "recipe.clip=abc", "nonsense=1", "data=cirko", "model=larg", "fusion.layers=two")
    )
    for part in ("seed: -1", "recipe.epochs?", "clip: abc", "nonsense", "circo?", "large?", "fusion.layers: two"):
        assert part in printed
    assert len(printed.splitlines()) == 8


@pytest.mark.slow
@pytest.mark.parametrize("form", ["{}={}", "--{} {}", "--{}={}"])
def test_three_forms_of_an_argument(form, tmp_path):
    words = [word for k, v in (("recipe.epochs", 3), ("model", "large"), ("progress", "false"), ("output_dir", "a b"))
             for word in form.format(k, v).split(" ", 1 if form == "--{} {}" else 0)]  # fmt: skip
    config = compose("train", words)
    assert (config.recipe.epochs, config.model.name, config.progress, config.output_dir) == (3, "large", False, "a b")
    assert compose("convert", ["--half", f"checkpoint={tmp_path}", "--output-dir", "x"]).half is True


@pytest.mark.parametrize("group", GROUPS)
def test_an_unknown_option_lists_the_known_ones(group):
    printed = message(f"{group}=nope")
    assert f"{group}=nope" in printed
    assert all(option in printed for option in options_of(group))


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
        ("loss.auxiliary=-1", ">= 0"),
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
def test_an_invalid_argument_is_one_line_with_the_expected_values(override, part):
    printed = message(override)
    assert part in printed
    assert "\n" not in printed


@pytest.mark.slow
@pytest.mark.parametrize(("fusion", "target"), [("image", "frozen"), ("text", "shared"), ("sum", "sum")])
def test_heads_without_weights_are_not_trained(fusion, target):
    assert "nothing to train" in message(f"fusion={fusion}", f"target={target}")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "eval"])
@pytest.mark.parametrize("name", ["hf:some/clip", "hf-hub:some/clip", "open_clip:ViT-B-16/laion2b_s34b_b88k"])
def test_a_backbone_of_a_hub_is_a_model(command, name):
    values = plain(compose(command, [f"model={name}", "model.feedforward=64"]))["model"]
    assert values == plain(compose(command, ["model=base", f"model.name={name}", "model.feedforward=64"]))["model"]
    assert values["name"] == name


def test_an_unknown_model_lists_the_forms_of_others():
    with pytest.raises(ConfigError, match=r"expected base, .*tinyclip, open_clip:<architecture>/<tag>, hf-hub:<rep"):
        compose("train", ["model=some/clip"])


def test_an_unknown_command_lists_the_known_ones():
    assert "train" in message(name="trian")


@pytest.mark.slow
def test_compose_keeps_the_state_of_a_program_under_hydra():
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        compose("train", ["seed=3"])
        message("model=nope")
        assert outer_compose("eval").data.name == "shapes"
    assert not GlobalHydra.instance().is_initialized()


def test_text_is_taken_as_typed():
    for text in NASTY:
        config = compose("search", ["index=x", f"text={text}", f"--where={text}", f"liked={text}a", f"liked={text}b"])
        assert (config.text, config.where, list(config.liked)) == (text, text, [f"{text}a", f"{text}b"])
        values = plain(compose("demo", [f"index={text}"]))
        assert values["index"] == (None if text == "null" else text)


FOLDERS = ["José", "图片", "a (1)", "R&D", "O'Brien", "a#b", "a,b", "x=y", "[a]", "{a:b}", 'say "a"', "$a ${b}", "a\\'"]
"""Names of folders that Hydra's grammar does not take as they are."""


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_folders_of_any_name_in_every_setting_of_every_command(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [FOLDERS[0], "".join(FOLDERS)] if COMMANDS[name].hydra else FOLDERS  # Hydra is slow
    needed = {one.key: FOLDERS[0] for one in declared(COMMANDS[name].settings) if one.default == "???"}
    settings = [one for one in declared(COMMANDS[name].settings) if not {"accepts", "choices"} & one.options.keys()]
    groups = {"train": ["data=folder", "model=tiny"], "eval": ["data=folder"], "check": ["data=folder"]}.get(name, [])
    for folder in names:
        Path(folder).mkdir()
        given = needed | {one.key: folder for one in settings if str in one.types and one.key != "remove"}
        given |= {"data.root": folder} if "data=folder" in groups else {}
        given |= {"model.weights": folder} if "model=tiny" in groups else {}
        values = plain(compose(name, [*groups, *(f"{key}={value}" for key, value in given.items())]))
        for key in given:
            section, _, last = key.rpartition(".")
            assert (values[section] if section else values)[last] == folder, key


@pytest.mark.slow
def test_folders_of_any_name_in_sweeps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in FOLDERS:
        Path(folder).mkdir()
    for folder in FOLDERS:
        override = parseable("data.root", folder if folder != "a,b" else f"'{folder}'")
        assert _read_override(override) == ("data.root", [folder])
    words = ["data=folder", "data.root='a,b',José", "seed=0,1", f"cache_dir={FOLDERS[4]}"]
    with pytest.raises(ConfigError, match=r"data\.root: 'a,b',José"):
        check_sweep("eval", parse_arguments("eval", words))
    check_sweep("eval", parse_arguments("eval", [*words[2:], "data=folder", "data.root='a,b','José'"]))
    assert parse_arguments("eval", ["hydra.run.dir=Läufe/1"]).hydra == ["hydra.run.dir='Läufe/1'"]


def test_lists_are_repeated_or_bracketed():
    assert compose("search", ["index=x", "image=[a.jpg,'b, c.jpg']"]).image == ["a.jpg", "b, c.jpg"]
    assert compose("search", ["index=x", "image=a.jpg", "--image", "b, c.jpg"]).image == ["a.jpg", "b, c.jpg"]
    assert "image=A image=B" in message("index=x", "image=a.jpg", "image=[b.jpg]", name="search")
    assert "index is given twice" in message("index=x", "index=y", name="search")
    assert "index is required" in message("text=a", name="search")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_two_screens_and_help_all_lists_every_setting(name):
    short, whole = help_text(name), help_text(name, "all")
    assert len(short.splitlines()) <= 48
    assert max(map(len, whole.splitlines())) <= 80
    assert f"usage: union-{name}" in short
    assert ("[-m]" in short) == COMMANDS[name].hydra
    assert all(f"\n  {example}" in short for example in COMMANDS[name].examples)
    for word in ("--version", "--help"):
        assert word in short
    for one in declared(COMMANDS[name].settings):
        assert f"{one.key}={show(one.default)}" in whole
        assert "." in one.key or one.key in short
    for group in COMMANDS[name].groups:
        text = help_text(name, group)
        assert all(option in text for option in options_of(group))
    with pytest.raises(ConfigError, match="all"):
        help_text(name, "nope")


def test_the_examples_of_the_help_are_valid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, command in COMMANDS.items():
        for line in command.examples:
            arguments = parse_arguments(name, shlex.split(line)[1:])
            assert not arguments.problems
            known = {*command.groups, *(one.key for one in _known(name).values())}
            assert {key for key, _ in arguments.settings} <= known, line


def test_positional_values(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x=y").mkdir()
    assert parse_arguments("compare", ["x=y", "second=x=y"]).settings == [("first", "x=y"), ("second", "x=y")]
    assert parse_arguments("compare", ["a", "--rounds", "9", "b"]).settings == [
        ("first", "a"), ("rounds", "9"), ("second", "b")]  # fmt: skip
    assert "unexpected argument 'c'" in parse_arguments("compare", ["a", "b", "c"]).problems[0]


@pytest.mark.parametrize("group", GROUPS)
def test_options_hold_declared_settings(group):
    for option in options_of(group):
        values = read_option(group, option)
        schema = {one.key: one for one in GROUPS[group].settings(values.get(GROUPS[group].key))}
        assert values.keys() == schema.keys(), option
        for key, one in schema.items():
            assert values[key] == "???" or one.allows(values[key]), f"{group}={option}: {key}"
            assert one.help or key in ("name", "kind"), key
            assert all(show(choice) in f"{one.help} null" for choice in one.choices if one.help), key


@pytest.mark.parametrize("name", SWEPT)
def test_groups_have_one_default(name):
    values = yaml.safe_load((conf_dir() / f"{name}.yaml").read_text())
    groups = {key: option for one in values["defaults"] if isinstance(one, dict) for key, option in one.items()}
    assert {key: one for key, one in groups.items() if not key.startswith("override")} == {
        group: default for group, (default, _) in COMMANDS[name].groups.items()
    }


@pytest.mark.slow
def test_each_value_of_a_sweep_is_validated_before_the_first_run():
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


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
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
def test_any_arguments_give_settings_or_a_config_error(name, overrides):
    try:
        config = compose(name, overrides)
    except ConfigError:
        pass
    else:
        assert 0 <= config.seed < 2**32
    assert not GlobalHydra.instance().is_initialized()


HEAVY = ("torch", "numpy", "transformers", "lightning", "PIL", "lance", "starlette", "jinja2")


def test_help_and_usage_errors_import_nothing_heavy():
    code = (
        "import sys; from importlib import import_module\n"
        f"mains = [import_module(f'union_igrot.cli.{{name}}').main for name in {list(COMMANDS)}]\n"
        "for main in mains:\n"
        "    for words in (['--help'], ['--version'], ['--help', 'all']): main(words)\n"
        "print('after help:', *[m for m in ('hydra', 'omegaconf') if m in sys.modules])\n"
        "for main in mains:\n"
        "    for words in (['data=nope'], ['seed=-1', 'nonsense=2']):\n"
        "        try: main(words)\n"
        "        except SystemExit as stop: assert stop.code == 2\n"
        f"print('heavy:', *[m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "after help:\n" in done.stdout
    assert done.stdout.splitlines()[-1] == "heavy:"
