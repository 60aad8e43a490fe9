"""Speaks JSON to a portal over one kept-alive connection, for benchmarks."""

from __future__ import annotations

import http.client
import json
import ssl
import sys
from typing import Any
from urllib.parse import urlsplit

from bench.client import DEVICE


class Api:
    """The portal over one kept-alive connection."""

    def __init__(self, access: dict[str, str]) -> None:
        url = urlsplit(access["PORTAL_URL"])
        context = ssl.create_default_context(cafile=access["PORTAL_CA"])
        self._connection = http.client.HTTPSConnection(url.hostname or "", url.port, context=context, timeout=60)
        self._headers = {"Authorization": f"Bearer {access['PORTAL_TOKEN']}", "Content-Type": "application/json"}

    def post(self, path: str, body: dict[str, Any], wanted: int) -> dict[str, Any]:
        """Send a request and read its answer; ends the benchmark where the status is not the one wanted."""
        return self._call("POST", path, json.dumps(body), wanted)

    def post_for_text(self, path: str, body: dict[str, Any], wanted: int) -> str:
        """As ``post``, for an answer that is no JSON."""
        return self._text("POST", path, json.dumps(body), wanted)

    def get(self, path: str) -> dict[str, Any]:
        """As ``post``, for a GET answered 200."""
        return self._call("GET", path, None, 200)

    def get_text(self, path: str) -> str:
        """As ``get``, for an answer that is no JSON."""
        return self._text("GET", path, None, 200)

    def register(self, name: str, csr: str) -> dict[str, Any]:
        """Register a device with its own key."""
        return self.post("/register", {**DEVICE, "name": name, "csr": csr}, 201)

    def _call(self, method: str, path: str, body: str | None, wanted: int) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._text(method, path, body, wanted))
        return answer

    def _text(self, method: str, path: str, body: str | None, wanted: int) -> str:
        self._connection.request(method, path, body, self._headers)
        response = self._connection.getresponse()
        text = response.read().decode(errors="replace")
        if response.status != wanted:
            sys.exit(f"The portal answered {response.status}: {text}")
        return text
