"""An agent in this process, with a listener of a whole portal, and a stub in the place of the broker's guard."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flask import Flask

from app import portal_of
from broker_provisioning import BrokerProvisioning
from config import Settings
from core.broker_control import JOURNAL_FILE
from operations.agent.agent import Agent
from operations.agent.folder import AgentFolder, Identity, settings_of
from operations.wiring import Portal
from pki.algorithms import private_key_pem
from pki.csr import new_request
from tests.support.guard_stub import GuardStub
from tests.support.guarded import guarded_app
from tests.support.harness import Clock
from tests.support.links import Link
from tests.support.mosquitto import short_folder
from tests.support.mutual_tls import serving
from tests.support.ports import free_port
from tests.workflows.test_admission import OPERATOR, request_of
from web.agent_listener import AgentListener


@pytest.fixture
def app(make_settings: Callable[..., Settings], clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flask]:
    port = free_port()
    settings = make_settings(
        PORTAL_BROKER_CONTROL="guard",
        PORTAL_AGENTS_BIND=f"127.0.0.1:{port}",
        PORTAL_AGENTS_URL=f"https://localhost:{port}",
        PORTAL_ENFORCE_TIMEOUT="0.5",
    )
    with guarded_app(settings, clock, monkeypatch) as built:
        yield built


@pytest.fixture
def portal(app: Flask) -> Iterator[Portal]:
    portal = portal_of(app)
    with serving(AgentListener(portal)):
        yield portal


class Place:
    """A machine elsewhere: the agent's folder, and its broker."""

    def __init__(self, portal: Portal, folder: Path, link: Link) -> None:
        self.environment = {
            "PORTAL_DATA_DIR": str(folder / "data"),
            "PORTAL_ENFORCE_TIMEOUT": "5",
        }
        added = portal.agents.add(OPERATOR, "edge", "localhost:8883")
        key = ec.generate_private_key(ec.SECP256R1())
        said = portal.agents.join(added.code, new_request(key))
        place = AgentFolder(folder / "data" / "agent")
        place.path.parent.mkdir(mode=0o711)
        url = f"https://localhost:{link.port}"
        place.join(Identity(said.name, url), private_key_pem(key), said.chain, said.portal_ca, said.settings)
        self._agents: list[Agent] = []

    def start(self, **environment: str) -> Agent:
        """An agent that has just been started, and has what certificates it had."""
        agent = Agent(*settings_of({**self.environment, **environment}))
        self._agents.append(agent)
        return agent

    def agent(self, **environment: str) -> Agent:
        """An agent that has just been started."""
        agent = self.start(**environment)
        agent.renew_certificates()
        return agent

    def close(self) -> None:
        for agent in self._agents:
            agent.close()

    @property
    def journal(self) -> Path:
        return Path(self.environment["PORTAL_DATA_DIR"], "broker", JOURNAL_FILE)


@pytest.fixture
def link(portal: Portal) -> Iterator[Link]:
    address = portal.settings.agents_bind
    assert address is not None
    with Link(address.port) as link:
        yield link


@pytest.fixture
def place(portal: Portal, link: Link, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr(BrokerProvisioning, "probe", lambda *_arguments, **_options: None)
    folder = short_folder(in_memory=True)
    with contextlib.closing(Place(portal, folder, link)) as place:
        yield place
    shutil.rmtree(folder)


@pytest.fixture
def guard(place: Place) -> Iterator[GuardStub]:
    place.journal.parent.mkdir(parents=True, mode=0o700)
    with GuardStub(place.journal.with_name("portal.sock"), place.journal) as guard:
        yield guard


def register(portal: Portal, number: int = 1) -> str:
    return portal.registrations.register(OPERATOR, request_of(number, csr=False)).device_id
