"""QR codes as SVG, made by the server: what they hold reaches no other site."""

from __future__ import annotations

import io

from markupsafe import Markup

MAX_TEXT = 1200  # characters; what a phone still reads from a screen


def qr_code(text: str) -> Markup:
    """Return a QR code of a text as an SVG without size and colour, which the page's classes give it.

    Raise ``ValueError`` if the text is longer than ``MAX_TEXT``.
    """
    import segno

    if len(text) > MAX_TEXT:
        raise ValueError("the text is too long for a QR code that can be read")
    written = io.BytesIO()
    segno.make(text, error="m", micro=False).save(
        written, kind="svg", xmldecl=False, svgns=False, omitsize=True, border=3, svgclass="qr", lineclass="qr-line"
    )
    return Markup(written.getvalue().decode().strip())  # noqa: S704 - numbers of a path alone, nothing of the text
