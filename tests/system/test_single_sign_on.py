"""Logins by an identity provider as people have them: in a real browser, and at a terminal."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.support.deployment import Deployment
from tests.support.identity_provider import IdentityProvider, as_json, identity_provider
from tests.support.programs import CLI, run

pytestmark = pytest.mark.system
CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="module")
def idp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IdentityProvider]:
    with identity_provider(tmp_path_factory.mktemp("idp")) as serving:
        serving.asks = True
        yield serving


@pytest.fixture(scope="module")
def portal(idp: IdentityProvider) -> Iterator[Deployment]:
    """A portal whose broker does not run; its host is another site than the provider's, which is at localhost."""
    deployment = Deployment(**idp.environment())
    with contextlib.ExitStack() as stack:
        stack.callback(deployment.__exit__, None, None, None)
        deployment.make_data_folder()
        deployment.start_portal()
        yield deployment


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Browser, portal: Deployment, idp: IdentityProvider) -> Iterator[Page]:
    """A page of a fresh profile; it asks no host but the portal's and the provider's."""
    with chromium.new_context(ignore_https_errors=True, base_url=portal.url) as context:
        opened = context.new_page()
        asked: list[str] = []
        opened.on("request", lambda request: asked.append(request.url))
        yield opened
        assert not [url for url in asked if not url.startswith((portal.url, f"https://localhost:{idp.port}"))]


def test_a_browser_goes_to_the_provider_and_comes_back_to_the_page_that_was_wanted(
    page: Page, portal: Deployment, idp: IdentityProvider
) -> None:
    page.goto("/ui/devices?status=active")
    page.get_by_role("link", name="Log in with localhost").click()
    page.get_by_role("link", name="Log in as Ada").click()
    expect(page).to_have_url(f"{portal.url}/ui/devices?status=active")
    expect(page.get_by_text("Ada Lovelace").first).to_be_attached()
    cookies = {cookie["name"]: cookie for cookie in page.context.cookies()}
    assert cookies.keys() == {"__Host-portal_session"}
    assert cookies["__Host-portal_session"]["sameSite"] == "Strict"
    page.goto("/ui/sessions")  # the session is known from here on
    expect(page.get_by_text("This one", exact=True)).to_be_visible()


def test_an_answer_that_another_browser_has_asked_for_logs_nobody_in(
    page: Page, chromium: Browser, portal: Deployment
) -> None:
    with chromium.new_context(ignore_https_errors=True, base_url=portal.url) as attackers:
        attacker = attackers.new_page()
        attacker.goto("/ui/login/oidc")
        link = attacker.get_by_role("link", name="Log in as Ada").get_attribute("href")
    assert link is not None
    page.goto(link)
    expect(page.get_by_text("This login was not begun in this browser")).to_be_visible()
    page.goto("/ui")
    expect(page).to_have_url(re.compile("/ui/login"))


def test_at_a_terminal_a_code_is_shown_and_the_token_is_saved(
    portal: Deployment, idp: IdentityProvider, tmp_path: Path
) -> None:
    waiting = as_json({"error": "authorization_pending"}, 400)
    idp.device_answers = [waiting]
    environment = {name: value for name, value in portal.environment.items() if not name.startswith("PORTAL_")}
    environment |= {"PORTAL_CA": portal.operator["PORTAL_CA"], "XDG_CONFIG_HOME": str(tmp_path)}
    started = time.monotonic()
    done = run(CLI, ["login", "--oidc", "--url", portal.url], env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "enter the code WDJB-MJHT" in " ".join(done.stderr.split())
    assert time.monotonic() - started > 2  # two polls, a second apart
    listed = run(CLI, ["token", "list"], env=environment, timeout=60)
    assert f"{idp.issuer}#ada" in listed.stdout
