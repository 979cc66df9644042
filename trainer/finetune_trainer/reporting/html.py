"""HTML that cannot be broken into: what is not marked as HTML is text, and is escaped where it is put in. Pure."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING
from unicodedata import category

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

VOID = ("meta", "line", "path", "circle", "br")
"""Elements without content, as they are used here."""
UNSHOWN = ("Cc", "Cs")
"""Control characters, and halves of surrogate pairs, which no file in UTF-8 can hold."""
TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""What sets the direction of the text after it."""


class Html(str):
    """Text that is HTML already. Only `tag` and constants of this package are made so."""

    __slots__ = ()


def escape(text: str) -> Html:
    """Text as HTML. What would not be shown, or would turn the text around it, is shown as U+FFFD."""
    return Html(html.escape("".join(character if _is_shown(character) else "\ufffd" for character in text)))


def _is_shown(character: str) -> bool:
    return character in "\t\n\r" or (category(character) not in UNSHOWN and character not in TURNING)


def tag(name: str, /, *content: str, **attributes: str | float) -> Html:
    """An element. Content and attributes are escaped, unless they are Html; `class_` is the attribute class."""
    given = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items())
    if name in VOID:
        return Html(f"<{name}{given}/>")
    inside = "".join(part if isinstance(part, Html) else escape(part) for part in content)
    return Html(f"<{name}{given}>{inside}</{name}>")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: int | None = None) -> Html:
    """A table; columns from `numbers` on are figures."""
    start = len(head) if numbers is None else numbers

    def line(kind: str, cells: Sequence[str]) -> Html:
        return tag(
            "tr", *(tag(kind, cell, class_="figure" if place >= start else "text") for place, cell in enumerate(cells))
        )

    body = tag("tbody", *(line("td", row) for row in rows))
    return tag("div", tag("table", tag("thead", line("th", head)), body), class_="wide")


def pairs(entries: Iterable[tuple[str, str]]) -> Html:
    """Names and their values."""
    rows = (tag("tr", tag("th", name, scope="row"), tag("td", value)) for name, value in entries)
    return tag("div", tag("table", tag("tbody", *rows), class_="pairs"), class_="wide")
