"""The address in the audit record: the client's behind trusted proxies, and never one that the client made up."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from flask import Flask

from app import portal_of
from tests.support.harness import Api, api_as
from web.api.proxies import client_address

TRUSTED = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))
CLIENT = "203.0.113.7"


def seen(peer: str, xff: str | None = None, forwarded: str | None = None) -> str:
    environ = {"REMOTE_ADDR": peer, "HTTP_X_FORWARDED_FOR": xff, "HTTP_FORWARDED": forwarded}
    return client_address({name: value for name, value in environ.items() if value is not None}, TRUSTED)


@pytest.mark.parametrize(
    ("xff", "forwarded"),
    [
        (CLIENT, None),
        (f"{CLIENT}, 10.0.0.2", None),
        (f"198.51.100.1, {CLIENT}, 10.0.0.2,10.0.0.3", None),
        (f"{CLIENT}:4711", None),
        (None, f"for={CLIENT}"),
        (None, f'for=198.51.100.1, for="{CLIENT}:80";proto=https;by=10.0.0.2, For="[fd00::1]:443"'),
        (None, f'for="a, b={CLIENT}", for={CLIENT}'),
        (CLIENT, f"proto=https;for={CLIENT}"),
    ],
)
def test_behind_trusted_proxies_the_address_is_the_right_most_that_is_not_a_proxys(
    xff: str | None, forwarded: str | None
) -> None:
    assert seen("10.0.0.1", xff, forwarded) == CLIENT


def test_a_client_that_is_no_trusted_proxy_cannot_make_its_address_up() -> None:
    assert seen(CLIENT, "198.51.100.1", "for=198.51.100.1") == CLIENT


def test_a_header_that_the_proxy_passes_on_as_the_client_made_it_up_does_not_count() -> None:
    assert seen("10.0.0.1", CLIENT, "for=198.51.100.1") == "10.0.0.1"


@pytest.mark.parametrize("xff", [None, "", "unknown", "_hidden", "203.0.113.7, nonsense", "203.0.113.7.9"])
def test_what_is_no_address_leaves_that_of_the_last_trusted_proxy(xff: str | None) -> None:
    assert seen("10.0.0.1", xff) == "10.0.0.1"


def test_a_very_long_chain_is_read_from_its_end_only() -> None:
    assert seen("10.0.0.1", "198.51.100.1," * 100_000 + CLIENT) == CLIENT


@pytest.mark.parametrize("trusted", ["", "127.0.0.1"])
def test_the_audit_record_has_the_clients_address_if_the_proxy_is_trusted(app: Flask, trusted: str) -> None:
    portal = portal_of(app)
    networks = (ip_network(trusted),) if trusted else ()
    object.__setattr__(portal, "settings", portal.settings.model_copy(update={"trusted_proxies": networks}))
    anyone: Api = api_as(app, None)
    anyone.get("/devices", headers={"X-Forwarded-For": f"198.51.100.1, {CLIENT}"})
    entry = portal.operators.audit("default", limit=1, before=None, filters={})[0][0]
    assert entry.address == (CLIENT if trusted else "127.0.0.1")
