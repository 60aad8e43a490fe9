"""Logins by an identity provider that we did not write: oidc-provider, which OpenID has certified."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urljoin, urlsplit

import pytest
import requests
from flask import Flask

from app import create_app, portal_of
from config import Settings
from store.audit import Actor
from tests.support.harness import Api
from tests.support.identity_provider import CLI_CLIENT_ID, CLIENT_ID, key_for
from tests.support.pki import PEM, Authority
from tests.support.ports import free_port

pytestmark = [pytest.mark.system, pytest.mark.long]
PROGRAM = Path(__file__).parents[1] / "support" / "oidc_provider"
INSTALLED = Path(sys.prefix) / "oidc-provider"  # by scripts/test --all
CALLBACK = "https://portal.example.com/ui/login/oidc/callback"
SECRET = "a client's secret of the tests"


@pytest.fixture(scope="module", params=["RS256", "ES256", "EdDSA"])
def provider(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The settings of a portal whose operators log in there, with tokens signed by one of the algorithms."""
    folder, port = tmp_path_factory.mktemp("provider"), free_port()
    root = Authority("identity provider's root")
    (folder / "root.pem").write_bytes(root.certificate.public_bytes(PEM))
    certificate, key = root.issue("localhost", server_names=["localhost"]).write(folder, "idp")
    (folder / "secret").write_text(SECRET)
    (folder / "secret").chmod(0o600)
    settings = {
        "issuer": f"https://localhost:{port}",
        "port": port,
        "certificate": str(certificate),
        "key": str(key),
        "clients": _clients(request.param),
        "jwks": {"keys": [key_for(algorithm).as_dict(private=True) for algorithm in ("RS256", "ES256", "EdDSA")]},
    }
    for name in ("server.js", "package.json"):  # beside the packages, where node looks for them
        shutil.copy(PROGRAM / name, folder)
    (folder / "node_modules").symlink_to(INSTALLED / "node_modules")
    with subprocess.Popen(
        ["node", folder / "server.js", json.dumps(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line == "listening\n":
                break
        else:
            pytest.fail("".join(said))
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield {
            "PORTAL_OIDC_ISSUER": str(settings["issuer"]),
            "PORTAL_OIDC_CLIENT_ID": CLIENT_ID,
            "PORTAL_OIDC_CLIENT_SECRET_FILE": str(folder / "secret"),
            "PORTAL_OIDC_CLI_CLIENT_ID": CLI_CLIENT_ID,
            "PORTAL_OIDC_CA_FILE": str(folder / "root.pem"),
            "PORTAL_OIDC_GROUPS": '{"fleet-admins": "admin"}',
            "PORTAL_PUBLIC_URL": "https://portal.example.com",
        }
        process.terminate()


def _clients(algorithm: str) -> list[dict[str, Any]]:
    browser = {
        "client_id": CLIENT_ID,
        "client_secret": SECRET,
        "redirect_uris": [CALLBACK],
        "id_token_signed_response_alg": algorithm,
    }
    terminal = {
        "client_id": CLI_CLIENT_ID,
        "token_endpoint_auth_method": "none",
        "grant_types": ["urn:ietf:params:oauth:grant-type:device_code"],
        "response_types": [],
        "redirect_uris": [],
        "id_token_signed_response_alg": algorithm,
    }
    return [browser, terminal]


@pytest.fixture
def app(make_settings: Callable[..., Settings], provider: dict[str, str]) -> Iterator[Flask]:
    built = create_app(make_settings(**provider), background=False)
    yield built
    portal_of(built).close()


def as_person(environment: dict[str, str], url: str, **first: str) -> tuple[str, str]:
    """Open a page there, fill in each form that comes, and return the address at which that ends, and the page."""
    with requests.Session() as browser:
        browser.verify, browser.trust_env = environment["PORTAL_OIDC_CA_FILE"], False
        method, fields = "GET", dict(first)
        for _ in range(20):
            answer = browser.request(method, url, data=fields if method == "POST" else None, allow_redirects=False)
            method = "GET"
            if answer.is_redirect:
                url = urljoin(url, answer.headers["Location"])
                if url.startswith(CALLBACK):
                    return url, ""
                continue
            form = re.search(r"<form[^>]*?(?:action=\"([^\"]+)\")?[^>]*>", answer.text)
            if form is None:
                return url, answer.text
            hidden = re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)"', answer.text)
            fields = {name: unescape(value) for name, value in hidden} | {"login": "ada", "password": "x"}
            action = re.search(r'action="([^"]+)"', form[0])
            method, url = "POST", urljoin(url, unescape(action[1]) if action else url)
    raise AssertionError("The login does not end.")


def test_a_login_in_a_browser(app: Flask, provider: dict[str, str]) -> None:
    sign_on = portal_of(app).sign_on
    assert sign_on is not None
    begun = sign_on.begin("/ui", None)
    back, _ = as_person(provider, begun.url)
    query = {name: values[0] for name, values in parse_qs(urlsplit(back).query).items()}
    made = sign_on.finish(Actor("default", "anyone", "none", "r", "192.0.2.7"), begun.cookie, query)
    assert (made.record.name, made.record.role) == ("Ada Lovelace", "admin")
    assert made.record.subject == f"{provider['PORTAL_OIDC_ISSUER']}#ada"


def test_a_login_by_the_device_flow(app: Flask, provider: dict[str, str]) -> None:
    anyone = Api(app.test_client(), None)
    told = anyone.get("/oidc/configuration").json
    with requests.Session() as program:
        program.verify, program.trust_env = provider["PORTAL_OIDC_CA_FILE"], False
        fields = {"client_id": told["client_id"], "scope": told["scopes"]}
        code = program.post(told["device_authorization_endpoint"], data=fields).json()
        poll = {
            "grant_type": "urn:ietf:params:oauth:grant-type:device_code",
            "device_code": code["device_code"],
            "client_id": told["client_id"],
        }
        assert program.post(told["token_endpoint"], data=poll).json()["error"] == "authorization_pending"
        as_person(provider, code["verification_uri_complete"])
        answer = program.post(told["token_endpoint"], data=poll).json()
    made = anyone.post("/oidc/tokens", {"id_token": answer["id_token"]})
    assert made.status_code == 201, made.text
    assert (made.json["name"], made.json["role"]) == ("Ada Lovelace", "admin")
    refused = anyone.post("/oidc/tokens", {"id_token": answer["access_token"]})
    assert refused.status_code == 401
