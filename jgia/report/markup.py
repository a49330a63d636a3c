"""HTML made of elements: text is always escaped, because only :class:`Html` is not.

A plain string can never become markup by accident: every child that is not an :class:`Html` goes
through :func:`html.escape`, and so does every attribute value.
"""

from __future__ import annotations

import html
import string
from collections.abc import Iterable, Sequence

_VOID = frozenset({"br", "hr", "img", "meta"})


class Html(str):
    """Markup that is already escaped. Made by :func:`element` and :func:`join` only."""

    __slots__ = ()


def join(*parts: str, separator: str = "") -> Html:
    """Concatenate parts; plain strings are escaped, :class:`Html` is kept.

    >>> join("a < b ", element("b", "bold"))
    'a &lt; b <b>bold</b>'
    """
    return Html(separator.join(p if isinstance(p, Html) else html.escape(p) for p in parts))


def element(name: str, *children: str, **attributes: str | int | float | None) -> Html:
    """One element. ``class_`` stands for ``class``; an attribute that is ``None`` is left out.

    >>> element("p", "1 < 2", class_="note")
    '<p class="note">1 &lt; 2</p>'
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{shown}>")
    return Html(f"<{name}{shown}>{join(*children)}</{name}>")


def section(title: str, *children: str, id_: str) -> Html:
    """A titled section; its heading names it for assistive technology."""
    heading = element("h2", title, id_=f"{id_}-title")
    return element("section", heading, *children, id_=id_, aria_labelledby=f"{id_}-title")


def table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str, class_: str = "wide"
) -> Html:
    """A table with a caption, column headers, and the first cell of each row as its header.

    Cells beyond the first are aligned as numbers where the class says so. The wrapper scrolls
    sideways on narrow screens, by keyboard too.
    """
    head = element("tr", *(element("th", header, scope="col") for header in headers))
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell) for cell in row[1:]),
        )
        for row in rows
    ]
    inner = element(
        "table",
        element("caption", caption),
        element("thead", head),
        element("tbody", *body),
        class_=class_,
    )
    return element("div", inner, class_="scroll", tabindex=0, role="region", aria_label=caption)


def definitions(pairs: Iterable[tuple[str, str]]) -> Html:
    """A list of terms and their descriptions."""
    return element(
        "dl",
        *(element("div", element("dt", term), element("dd", text)) for term, text in pairs),
    )


_PAGE = string.Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'">
<title>$title</title>
<style>
$css
</style>
</head>
<body>
$body
</body>
</html>
""")


def page(*, title: str, css: str, body: Html) -> str:
    """A whole document that loads nothing: its content security policy forbids it to.

    Args:
      title: plain text.
      css: trusted style sheet, from this package.
      body: the content.
    """
    return _PAGE.substitute(title=html.escape(title), css=css, body=body)
