"""A browser for tests of the console, as far as the server sees one: cookies, where a request comes from, forms."""

from __future__ import annotations

import html
import re
from typing import Any

from flask import Flask

from core.roles import Role
from tests.support.harness import api_as
from web.console.serving import COOKIE

ORIGIN = "https://localhost"
FORM_TOKEN = re.compile(r'name="form_token" value="([0-9a-f]{64})"')


class Browser:
    """Keeps cookies, and says where its requests come from, as browsers do."""

    def __init__(self, app: Flask, *, agent: str = "Mozilla/5.0 (X11; Linux x86_64) Firefox/140.0") -> None:
        self.client = app.test_client()
        self.agent = agent

    def get(self, path: str, *, htmx: bool = False, **options: Any) -> Any:
        """Open a page, or with ``htmx`` ask for a part of it; returns Werkzeug's test response."""
        headers = {"User-Agent": self.agent, "Sec-Fetch-Site": "same-origin"} | options.pop("headers", {})
        if htmx:
            headers |= {"HX-Request": "true", "HX-Request-Type": "partial", "HX-Current-URL": f"{ORIGIN}{path}"}
        return self.client.get(path, base_url=ORIGIN, headers=headers, **options)

    def post(self, path: str, form: dict[str, str] | None = None, *, token: str | None = "own", **options: Any) -> Any:  # noqa: S107
        """Send a form; with the form token of this session unless another one, or with ``None`` none, is given."""
        headers = {"User-Agent": self.agent, "Sec-Fetch-Site": "same-origin", "Origin": ORIGIN}
        headers |= options.pop("headers", {})
        sent = dict(form or {})
        if token is not None:
            sent["form_token"] = self.form_token() if token == "own" else token
        return self.client.post(path, base_url=ORIGIN, headers=headers, data=sent, **options)

    def form_token(self) -> str:
        """The token that the pages of this session have in their forms."""
        found = FORM_TOKEN.search(self.get("/ui/sessions").text)
        return found[1] if found else ""

    def log_in(self, token: str, *, wanted: str = "/ui", **options: Any) -> Any:
        """Log in by an operator token."""
        return self.post("/ui/login", {"token": token, "next": wanted}, token=None, **options)

    @property
    def cookie(self) -> str | None:
        """The secret of the session."""
        found = self.client.get_cookie(COOKIE, domain="localhost")
        return None if found is None else found.value

    @cookie.setter
    def cookie(self, secret: str) -> None:
        self.client.set_cookie(COOKIE, secret, domain="localhost", secure=True)


def logged_in_as(app: Flask, role: Role, tenant_id: str = "default") -> Browser:
    """A browser that is logged in with a fresh token of the role in a tenant."""
    browser = Browser(app)
    secret = api_as(app, role, tenant_id).token
    assert secret is not None
    assert browser.log_in(secret).status_code == 303
    return browser


def text_of(page: str) -> str:
    """The text of a page, without its tags."""
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page)))
