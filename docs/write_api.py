"""Write `api.md`: the public names of each package, with the first line of their docstrings.

python docs/write_api.py
"""

import inspect
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import union_igrot

PAGE = Path(__file__).resolve().parent / "api.md"
HEAD = """# Python API

The public names by package, with the first line of what `help(name)` prints; most are imported as `union_igrot.NAME`.
`python docs/write_api.py` writes this page."""
_DEPRECATED = ("Encoder", "picture_batch")
_WITH_METHODS = ("EvaluationResult", "Gallery", "IGROTModel")


def api_page() -> str:
    """Return the page."""
    packages = ["union_igrot", *(f"union_igrot.{one.name}" for one in iter_modules(union_igrot.__path__) if one.ispkg)]
    sections = [HEAD]
    for package in packages:
        module = import_module(package)
        names = sorted((name for name in dir(module) if name not in _DEPRECATED), key=str.lower)
        # A package without exports of its own is a command or the demo, or its modules are imported themselves.
        rows = [_row(name, getattr(module, name)) for name in names if hasattr(module, "__getattr__")]
        for name in _WITH_METHODS if module is union_igrot else ():
            for key, value in vars(getattr(module, name)).items():
                method = inspect.unwrap(getattr(value, "__func__", value))
                rows += [_row(f"{name}.{key}", method)] if inspect.isfunction(method) and key[0] != "_" else []
        if rows:
            summary = str(module.__doc__).partition("\n")[0].replace("`", "")
            sections.append("\n".join([f"## {package}\n\n{summary}\n\n| name | what it is |\n| --- | --- |", *rows]))
    return "\n\n".join(sections) + "\n"


def _row(name: str, value: object) -> str:
    function = inspect.unwrap(value) if inspect.isfunction(value) else None
    names = [one for one in inspect.signature(function).parameters if one not in ("self", "cls")] if function else []
    arguments = f"({', '.join(names)})" if function else ""
    summary = str(inspect.getdoc(value)).partition("\n")[0].replace("|", "\\|")
    return f"| `{name}{arguments}` | {summary} |"


if __name__ == "__main__":
    PAGE.write_text(api_page(), encoding="utf-8")
