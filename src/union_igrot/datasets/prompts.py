"""The texts of queries: how each public repository words them, by name.

A prompt is one of the names in `PROMPTS`, of which the first of each benchmark, the UNION authors' wording, is the
default; or a template written out, such as `find {condition}`, with the benchmark's own fields in braces. Templates
of repositories that learn a word for the reference image keep its mark, `$` or `*`. Does not read files.

Where a repository averages the embeddings of several wordings (SEARLE and LinCIR on FashionIQ), the prompt gives all of
them; `types.Query.text` says what becomes of them.
"""

import re
from collections.abc import Callable, Mapping
from string import Formatter

from union_igrot.errors import ConfigError

Fields = Mapping[str, str]
Wording = str | tuple[str, ...]
"""A text, or several wordings of it."""
Template = Callable[[Fields], Wording]


def _pre_caption(text: str, words: int) -> str:
    """Clean a caption as BLIP does (salesforce/BLIP, data/utils.py, `pre_caption`)."""
    plain = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    return " ".join(re.sub(r"\s{2,}", " ", plain).strip(" \n").split(" ")[:words])


def _clip4cir(fields: Fields) -> str:
    """Join two captions as CLIP4Cir does for validation (`data_utils.py`, `generate_input_captions`)."""
    return f"{fields['c1'].strip('.?, ').capitalize()} and {fields['c2'].strip('.?, ')}"


def _form(template: str) -> Callable[[Fields], str]:
    return template.format_map


def _both_orders(fields: Fields) -> tuple[str, ...]:
    """Word two captions in both orders (miccunifi/SEARLE, src/validate.py; navervision/lincir, validate.py)."""
    first, second = fields["c1"], fields["c2"]
    return f"a photo of $ that {first} and {second}", f"a photo of $ that {second} and {first}"


_FASHIONIQ: Mapping[str, Template] = {
    "union": _form("{c1} and {c2}"),
    "magiclens": _form("{c1} and {c2}"),
    "clip4cir": _clip4cir,
    "sprc": lambda fields: _pre_caption(_clip4cir(fields), 50),
    "searle": _both_orders,
    "searle_swapped": _form("a photo of $ that {c2} and {c1}"),
    "pic2word": _form("a photo of * , {c2} and {c1}"),
    "covr": lambda fields: _pre_caption("{c1} and {c2}".format_map(fields), 30),
}
_CIRR: Mapping[str, Template] = {
    "union": lambda fields: f"find a photo that {fields['caption'].lower()}",
    "clip4cir": _form("{caption}"),
    "transagg": lambda fields: fields["caption"].lower(),
    "searle": _form("a photo of $ that {caption}"),
    "pic2word": _form("a photo of * , {caption}"),
    "covr": lambda fields: _pre_caption(fields["caption"], 30),
}
_CIRCO: Mapping[str, Template] = {
    "union": lambda fields: f"{fields['shared_concept'].lower()} but {fields['relative_caption'].lower()}",
    "magiclens": _form("find {shared_concept} but {relative_caption}"),
    "searle": _form("a photo of $ that {relative_caption}"),
    "covr": _form("{relative_caption}"),
}
_DTIN: Mapping[str, Template] = {
    "union": _form("the similar image with {domain} style"),
    "magiclens": _form("find this object in {domain}"),
    "pic2word": _form("a {domain} of *"),
}
_LLAVASCO: Mapping[str, Template] = {
    "union": _form("{relative_caption}"),
    "union_llava": _form("{relative_caption} with {llava_target_caption}"),
}
_SKETCHY: Mapping[str, Template] = {"union": _form("a real image of sketch"), "none": _form("")}
_NO_TEXT: Mapping[str, Template] = {"union": _form("")}

PROMPTS: Mapping[str, Mapping[str, Template]] = {
    "fashioniq": _FASHIONIQ,
    "cirr": _CIRR,
    "circo": _CIRCO,
    "genecis": {"clip": _form("{condition}")},  # the UNION authors have no reader of it
    "lasco": {"union": _form("{query_text}")},
    "llavasco": _LLAVASCO,
    "dtin": _DTIN,
    "sketchy": _SKETCHY,
    "training_sketchy": _SKETCHY,
    "tuberlin": _NO_TEXT,
    "quickdraw": _NO_TEXT,
}
"""For each benchmark its prompts by name; the first is the default."""

FIELDS: Mapping[str, tuple[str, ...]] = {
    "fashioniq": ("c1", "c2"),
    "cirr": ("caption",),
    "circo": ("shared_concept", "relative_caption"),
    "genecis": ("condition",),
    "lasco": ("query_text",),
    "llavasco": ("relative_caption",),
    "dtin": ("domain",),
    "sketchy": ("class",),
    "training_sketchy": ("class",),
    "tuberlin": ("class",),
    "quickdraw": ("class",),
}
"""For each benchmark the fields that a written-out template may use."""


def default_prompt(benchmark: str) -> str:
    """Return the name of a benchmark's default prompt."""
    return next(iter(PROMPTS[benchmark]))


def template(benchmark: str, prompt: str) -> Template:
    """Return the function that words a benchmark's queries.

    Args:
        benchmark: Name of the benchmark.
        prompt: Name of one of its prompts, or a template with its fields in braces. A text with neither blank nor
            brace counts as a name.

    Raises:
        ConfigError: Where there is no such prompt, or the template uses what is not a field.
    """
    named = PROMPTS[benchmark]
    if prompt in named:
        return named[prompt]
    allowed = f"one of {', '.join(named)}, or a template with {', '.join('{' + f + '}' for f in FIELDS[benchmark])}"
    if not re.search(r"[\s{]", prompt):
        raise ConfigError(f"prompt {prompt!r} is not known for {benchmark}; give {allowed}")
    try:
        parts = list(Formatter().parse(prompt))
    except ValueError as error:
        raise ConfigError(f"prompt {prompt!r} is no template ({error}); give {allowed}") from None
    for _, field, form, conversion in parts:
        if field is not None and (field not in FIELDS[benchmark] or form or conversion):
            raise ConfigError(f"prompt {prompt!r} uses {{{field}}}, which is no plain field; give {allowed}")
    return _form(prompt)
