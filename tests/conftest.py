"""Portals for tests: built on a copy of a data folder that was prepared once, on each database there is."""

from __future__ import annotations

import functools
import gc
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
from flask import Flask

from app import create_app, portal_of
from broker.guard.journal import NewJournal
from config import Settings
from core.pkcs11_uri import TokenUri
from core.roles import Role
from operations.wiring import Portal, open_portal
from tests.support.databases import POSTGRES_URL, DatabaseCopies, create_database, running_url_of, url_of
from tests.support.harness import Api, Clock, api_as, copy_with_groups, derived_quickly, first_start, settings_for
from tests.support.made_once import made_once
from tests.support.mosquitto import short_folder
from tests.support.token_fixtures import make_ca_key, soft_tokens, token_server
from tests.support.tokens import SoftTokens

# Imported here alone: each import of a session's fixture makes another one of it.
__all__ = ["make_ca_key", "soft_tokens", "token_server"]

DATABASES = ["sqlite", "postgresql"] if POSTGRES_URL else ["sqlite"]
# Folders and files of tests, but for those files that try most of the SQL.
ON_ONE_DATABASE = {"api", "console", "workflows", "operations", "test_agent_listener.py", "test_rabbitmq_listener.py"}
ON_BOTH = {
    *("test_actions.py", "test_applications.py", "test_connections.py", "test_devices.py", "test_successors.py"),
    *("test_admission.py", "test_registration.py", "test_renewal.py", "test_revocation.py", "test_upload.py"),
    *("test_presence.py", "test_backup.py", "test_total_loss.py", "test_profile_names.py"),
    *("test_sessions.py", "test_other_tenants.py", "test_tenants.py", "test_mail.py", "test_one_tenant.py"),
}
IN_TOKENS = {"test_ca.py", "test_crl.py"}


def parameters(item: pytest.Item) -> dict[str, object]:
    return getattr(getattr(item, "callspec", None), "params", {})


def _is_twice_apart(item: pytest.Item) -> bool:
    """Whether a test is about keys in a token on PostgreSQL, which have nothing to do with each other."""
    return (parameters(item).get("prepared"), parameters(item).get("key_store")) == ("postgresql", "token")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("both_stores")
    if marker and "key_store" in metafunc.fixturenames:
        marks = () if marker.kwargs.get("always") else pytest.mark.long
        stores = [pytest.param(None, id="file"), pytest.param("token", marks=marks)]
        metafunc.parametrize("key_store", stores, indirect=True)


@pytest.hookimpl(tryfirst=True)  # before the tests that are marked are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave tests of what has no SQL of its own to SQLite, but with ``--all``: the store's run on both databases.

    Of those of the CA, only what tests its signing is repeated with keys in a token.
    """
    items[:] = [item for item in items if not _is_twice_apart(item)]
    for item in items:
        parts = item.path.relative_to(item.config.rootpath).parts
        on = parameters(item)
        if on.get("make_ca_key") == "token" and item.path.name not in IN_TOKENS:
            item.add_marker(pytest.mark.long)
        if ON_ONE_DATABASE & {*parts} and item.path.name not in ON_BOTH and on.get("prepared") == "postgresql":
            item.add_marker(pytest.mark.long)


def pytest_collection_finish() -> None:
    """Keep all that was collected out of each later look for garbage."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _made_once() -> Iterator[None]:
    with made_once():
        yield


@pytest.fixture(scope="session")
def _journals() -> Iterator[WeakSet[NewJournal]]:
    """All new journals that were begun in this process and are still in use, or forgotten."""
    begun, begin = WeakSet[NewJournal](), NewJournal.__init__

    def noted(journal: NewJournal, *arguments: Any, **options: Any) -> None:
        begin(journal, *arguments, **options)
        begun.add(journal)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(NewJournal, "__init__", noted)
        yield begun


@pytest.fixture(autouse=True)
def _no_journal_is_left_open(_journals: WeakSet[NewJournal]) -> Iterator[None]:
    """Fail the test that leaves a journal open: else a later one does, whenever that is collected."""
    yield
    left = [journal for journal in _journals if not journal.is_closed]
    for journal in left:
        journal.discard()
    assert not left, "a journal was neither committed nor discarded"


@dataclass(frozen=True)
class Prepared:
    """A data folder after the first start; ``databases`` are copies of its PostgreSQL database, ``None`` for SQLite.

    ``environment`` returns what each portal on a copy of the folder needs in its own.
    """

    folder: Path
    databases: DatabaseCopies | None
    environment: Callable[[], dict[str, str]] = dict


@pytest.fixture(scope="session")
def key_store(request: pytest.FixtureRequest) -> str | None:
    """Where the keys of CAs are: in files (``None``), and for tests marked ``both_stores`` in a token, too."""
    return getattr(request, "param", None)


@pytest.fixture(scope="session")
def _one_token(soft_tokens: SoftTokens) -> TokenUri:
    """The one token: this fixture has no parameter, so that pytest does not end it when those of a test change."""
    return soft_tokens.create()


@pytest.fixture(scope="session")
def ca_keys(request: pytest.FixtureRequest, key_store: str | None) -> Callable[[], dict[str, str]]:
    """Returns the environment of one more portal with its CA keys there; in the one token, labels begin by its own."""
    if key_store is None:
        return dict
    uri: TokenUri = request.getfixturevalue("_one_token")
    return lambda: {"PORTAL_CA_KEYS": str(replace(uri, object=secrets.token_hex(8))), "PORTAL_TOKEN_TIMEOUT": "60"}


@pytest.fixture(scope="session")
def _preparations() -> Iterator[dict[tuple[str, str | None], Prepared]]:
    """All that was prepared, by database and key store: pytest ends a fixture whenever a test has another parameter."""
    made: dict[tuple[str, str | None], Prepared] = {}
    yield made
    for one in made.values():
        shutil.rmtree(one.folder)
        if one.databases is not None:
            one.databases.close()


@pytest.fixture(scope="session", params=DATABASES)
def prepared(
    request: pytest.FixtureRequest,
    key_store: str | None,
    ca_keys: Callable[[], dict[str, str]],
    _preparations: dict[tuple[str, str | None], Prepared],
) -> Prepared:
    """What every portal of a test is a copy of."""
    kind = request.param, key_store
    if kind not in _preparations:
        folder = short_folder(in_memory=True)
        name = "" if request.param == "sqlite" else create_database()
        environment = urls_of(name) if name else {}
        first_start(settings_for(folder, **environment, **ca_keys()))
        _preparations[kind] = Prepared(folder, DatabaseCopies(name) if name else None, ca_keys)
    return _preparations[kind]


def urls_of(database: str) -> dict[str, str]:
    return {"PORTAL_DATABASE_URL": running_url_of(database), "PORTAL_DATABASE_OWNER_URL": url_of(database)}


@contextmanager
def _fresh_settings(prepared: Prepared) -> Iterator[Callable[..., Settings]]:
    folders: list[Path] = []
    lent: list[str] = []

    def make(**environment: str) -> Settings:
        folder = short_folder(in_memory=True)
        folders.append(folder)
        copy_with_groups(prepared.folder, folder)
        if prepared.databases is not None:
            lent.append(prepared.databases.lend())
            environment = urls_of(lent[-1]) | environment
        return settings_for(folder, **{**prepared.environment(), **environment})

    with derived_quickly():
        yield make
    for folder in folders:
        shutil.rmtree(folder)
    if prepared.databases is not None:
        for name in lent:
            prepared.databases.give_back(name)


@pytest.fixture
def acl_style(request: pytest.FixtureRequest) -> str:
    """What ``PORTAL_ACL_STYLE`` is set to: nothing, unless a test is ``PER_DEVICE``."""
    return str(getattr(request, "param", ""))


@pytest.fixture
def make_settings(prepared: Prepared, acl_style: str) -> Iterator[Callable[..., Settings]]:
    """Makes the settings of a fresh portal, already prepared; keyword arguments are environment variables."""
    with _fresh_settings(prepared) as make:
        yield functools.partial(make, PORTAL_ACL_STYLE=acl_style)


@pytest.fixture(scope="module")
def shared_app(prepared: Prepared) -> Iterator[Flask]:
    """One application for a module's tests that change nothing, or do not mind what others have changed."""
    with _fresh_settings(prepared) as make:
        built = create_app(make(), background=False)
        yield built
        portal_of(built).close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def portal(make_settings: Callable[..., Settings], clock: Clock) -> Iterator[Portal]:
    """The parts of a portal whose broker does not run: grants need its files only, revocations stay pending."""
    built = open_portal(make_settings(), clock)
    yield built
    built.close()


@pytest.fixture
def app(make_settings: Callable[..., Settings], clock: Clock) -> Iterator[Flask]:
    built = create_app(make_settings(), background=False, clock=clock)
    yield built
    portal_of(built).close()


@pytest.fixture
def as_role(app: Flask) -> Callable[[Role | None], Api]:
    """Makes an ``Api`` with a fresh token of the role, or with none."""
    return functools.partial(api_as, app)


@pytest.fixture
def api(as_role: Callable[[Role | None], Api]) -> Api:
    return as_role(Role.ADMIN)
