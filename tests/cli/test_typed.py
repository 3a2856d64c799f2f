"""Settings taken as typed: whatever a person writes arrives letter for letter."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings, strategies as st
from omegaconf import OmegaConf

from union_igrot.cli.command import run_command
from union_igrot.cli.typed import as_typed
from union_igrot.errors import ConfigError

NASTY = [
    "it's red, not blue",
    "class = 'dog' and year > 2020",
    "\"taken by\" in ('Ann', 'Bo')",
    "a=b",
    "${oc.env:HOME}",
    "\\${text}",
    "${",
    "[a,b]",
    "{a: b}",
    "range(1,3)",
    "1,2",
    "null",
    "true",
    "3",
    "",
    "  two  blanks  ",
    "tab\tand\nnewline",
    "C:\\photos\\new\\",
    "a \\' quote",
    "# no comment",
    "~/photos",
    "猫の写真.jpg",
    "odd byte \udcff",
    "--help me",
    "s3://bucket/a b.lance",
    "a\\",
    "\\\\",
    "'",
    '"',
    "%(x)s !!python/object",
]
PARSER = OverridesParser.create()


def read(arguments: list[str]) -> dict:
    config = OmegaConf.create({"text": None, "image": [], "k": 1})
    for override in PARSER.parse_overrides(arguments):
        OmegaConf.update(config, override.key_or_group, override.value())
    return OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize("text", ["\n".join(NASTY), NASTY[0], "", "[a,b]"])
def test_a_command_gets_what_was_typed(text, tmp_path, monkeypatch):
    """Through the whole of Hydra: composed, checked, run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.lance").mkdir()
    seen = []
    arguments = [
        f"text={text}",
        f"where={text}",
        "index=x.lance",
        f"image={text}",
        f"liked={text} 2",
        f"liked={text} 3",
    ]
    if text in ("", "[a,b]"):
        arguments[3] = "image=a.jpg"
    run_command(
        "search",
        lambda config, _: seen.append(OmegaConf.to_container(config, resolve=True)),
        arguments,
        literal=("text", "where", "index"),
        several=("image", "liked"),
    )
    (config,) = seen
    assert config["text"] == config["where"] == text
    assert config["image"] == (["a.jpg"] if text in ("", "[a,b]") else [text])
    assert config["liked"] == [f"{text} 2", f"{text} 3"]
    assert list(tmp_path.iterdir()) == [tmp_path / "x.lance"]


# `???` alone is OmegaConf's word for what is missing; a command answers that it is not given.
@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("\\'\"${}[]()=,: \t\n#?!~%a1é"), max_size=12).filter(lambda text: text.strip() != "???"))
@example("\\\\${a}\\\\'\\")
def test_any_text_arrives(text):
    assert read(as_typed([f"text={text}", "k=3"], ["text"])) == {"text": text, "image": [], "k": 3}
    if not (text.startswith("[") and text.endswith("]")):
        found = read(as_typed([f"image={text}", "k=2", f"image={text}b"], [], ["image"]))
        assert found == {"text": None, "image": [text, f"{text}b"], "k": 2}


@pytest.mark.parametrize("text", NASTY)
def test_nasty_text_arrives(text):
    assert read(as_typed([f"text={text}"], ["text"]))["text"] == text


def test_lists_are_given_in_either_form():
    assert read(as_typed(["image=[a.jpg,'b, c.jpg']"], [], ["image"]))["image"] == ["a.jpg", "b, c.jpg"]
    assert read(as_typed(["image=a.jpg", "text=x", "image=b, c.jpg"], ["text"], ["image"]))["image"] == [
        "a.jpg",
        "b, c.jpg",
    ]
    with pytest.raises(ConfigError, match=r"image=\[A,B\], or image=A image=B"):
        as_typed(["image=a.jpg", "image=[b.jpg]"], [], ["image"])


def test_a_bare_null_means_none_but_for_words():
    typed = as_typed(["contact=null", "text=null", "where=null"], ["contact", "text", "where"])
    found = OmegaConf.create({"contact": "x", "text": None, "where": None})
    for override in PARSER.parse_overrides(typed):
        OmegaConf.update(found, override.key_or_group, override.value())
    assert OmegaConf.to_container(found) == {"contact": None, "text": "null", "where": "null"}


def test_other_arguments_stay_as_they_are():
    arguments = ["k=3", "--help", "seed=0,1", "+text=a", "texts=b", "data.text=c", "text"]
    assert as_typed(arguments, ["text"], ["image"]) == arguments


def test_what_is_missing_is_said_to_be_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments in (["index=???", "text=a"], ["text=a"], ["index=x", "image=???"]):
        with pytest.raises(SystemExit) as stopped:
            run_command("search", lambda *_: None, arguments, literal=("index", "text"), several=("image",))
        assert stopped.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
