"""Screens as HTML, rendered by templates that escape their values."""

import base64
from importlib.resources import files
from typing import Any, Final, final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from union_igrot.demo.controller import MAX_TEXT, MAX_WHERE, DemoController, Screen
from union_igrot.demo.uploads import Limits
from union_igrot.errors import escape_controls

STATIC: Final = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
"""Static files and their media types."""


def data_uri(image: bytes) -> Markup:
    """Return a PNG or JPEG as a data URI, so that no image has a URL on the server."""
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return Markup(f"data:image/{kind};base64,{base64.b64encode(image).decode()}")


def show_controls(value: object) -> object:
    """Make control and bidi characters of a text visible, so that a name cannot look like another one."""
    return escape_controls(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def static_file(name: str) -> bytes:
    """Read a static file."""
    return (files("union_igrot.demo") / "static" / name).read_bytes()


@final
class PageRenderer:
    """Renders the page and its regions.

    Args:
        controller: Provides the backends.
        limits: Limits of uploaded photos.
    """

    def __init__(self, controller: DemoController, limits: Limits) -> None:
        self._controller, self._limits = controller, limits
        self._environment = Environment(
            loader=PackageLoader("union_igrot.demo"),
            autoescape=True,
            undefined=StrictUndefined,
            finalize=show_controls,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._environment.filters["uri"] = data_uri

    def page(self) -> str:
        """Return the initial page."""
        first = self._controller.backends[0]
        return self._render(
            "page",
            gallery=first.gallery,
            hint=first.hint,
            count=len(first),
            others=[(number, backend.name) for number, backend in enumerate(self._controller.backends)][1:],
            model=first.model,
            warning=first.warning,
            limits=self._limits,
            max_text=MAX_TEXT,
            columns=[name if name.isidentifier() else f'"{name}"' for name in first.columns],
            example=first.example,
            max_where=MAX_WHERE,
            pixelated=first.pixelated,
        )

    def regions(self, screen: Screen) -> dict[str, Any]:
        """Return the regions that change after an action; None leaves one unchanged."""
        session = screen.session
        results = None
        if screen.columns is not None:
            results = self._render(
                "results",
                session=session,
                columns=screen.columns,
                last=screen.last,
                shared=screen.shared,
                count=len(self._controller.backends[0]),
                heading=screen.heading,
            )
        return {
            "token": screen.token,
            "message": screen.message,
            "heading": screen.heading,
            "link": "" if session.present is None else session.present.link,
            "history": self._render("history", session=session) if screen.moved else None,
            "can": {"undo": session.can_undo, "redo": session.can_redo, "restart": bool(session.turns)},
            "reference": self._render("reference", reference=session.reference),
            "marked": self._render("marks", marks=session.marks),
            "pending": session.has_pending_changes,
            "marks": {mark.id: mark.liked for mark in session.marks},
            "results": results,
            "large": None if screen.large is None else self._render("large", large=screen.large),
            "compared": session.compared,
            "text": screen.text,
            "where": screen.where,
            "strokes": screen.strokes,
        }

    def _render(self, name: str, **values: Any) -> str:
        return self._environment.get_template(f"{name}.html").render(values)
