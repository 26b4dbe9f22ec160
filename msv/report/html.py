"""HTML without a template language: text is escaped unless it is markup that was made here."""

import base64
import re
from html import escape

_MARKS = (
    (re.compile(r"`([^`]+)`"), r"<code>\1</code>"),
    (re.compile(r"\*\*([^*]+)\*\*"), r"<strong>\1</strong>"),
    (re.compile(r"(?<![\w*])\*(?=\S)([^*]+)(?<=\S)\*(?![\w*])"), r"<em>\1</em>"),
)
_VOID = frozenset({"img", "meta"})


class Html(str):
    """Markup, which is not escaped again."""


def tag(element: str, /, *children: str | None, **attributes: str | float | bool | None) -> Html:
    """An element.

    Args:
        element: its name.
        children: markup as it is, text escaped; None is nothing.
        attributes: ``class_`` for ``class``, ``data_key`` for ``data-key``; True is the name alone, None and False
            are nothing.
    """
    told = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    start = f"<{element}{told}>"
    return Html(start if element in _VOID else f"{start}{join(*children)}</{element}>")


def join(*children: str | None) -> Html:
    """Markup and text one after the other."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children if child is not None))


def marked(text: str) -> Html:
    """A line of Markdown with code, strong and emphasised words; all else in it is text."""
    out = escape(text)
    for mark, element in _MARKS:
        out = mark.sub(element, out)
    return Html(out)


def picture(svg: bytes, alt: str) -> Html:
    """An SVG inside the page, as an image of its own, so that nothing in it meets anything else."""
    data = base64.b64encode(svg).decode("ascii")
    return tag("img", src=f"data:image/svg+xml;base64,{data}", alt=alt)
