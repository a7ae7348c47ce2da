"""HTML and SVG elements. Text is escaped unless it was made here."""

import html


class Markup(str):
    """Text that is HTML already."""


def tag(name: str, /, *children: str, **attributes: str | float | None) -> Markup:
    """One element.

    Args:
        children: elements, or text that gets escaped.
        attributes: `class_` for class, `aria_label` for aria-label; None leaves one out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ("meta", "link"):
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """Elements and text one after the other."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else html.escape(child, quote=False)
            for child in children
        )
    )
