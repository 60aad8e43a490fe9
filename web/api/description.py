"""The interface described: as OpenAPI for programs, as a page for people."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from flask import render_template

from web.api.openapi import openapi
from web.api.routing import Answers, Call, Reply, Route, Routes

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
}


def description_of(others: Sequence[Route]) -> Routes:
    """Routes that describe ``others`` with themselves."""
    description = Routes("Operation")

    @functools.cache
    def described(server_url: str) -> dict[str, Any]:
        return openapi([*others, *description.routes], server_url=server_url)

    @functools.cache
    def text(server_url: str) -> bytes:
        return json.dumps(described(server_url)).encode()

    @functools.cache
    def page(server_url: str) -> bytes:
        return render_template("docs.html", api=described(server_url)).encode()

    @description.route("GET", "/openapi.json", permission=None, answers=Answers(media_type="application/json"))
    def openapi_json(call: Call) -> Reply:
        """Describe the interface in OpenAPI 3.1."""
        return Reply(content=text(call.portal.settings.public_url))

    @description.route("GET", "/docs", permission=None, answers=Answers(media_type="text/html"))
    def docs(call: Call) -> Reply:
        """Show the interface to people."""
        content = page(call.portal.settings.public_url)
        return Reply(content=content, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    return description
