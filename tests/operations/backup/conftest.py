"""Fixtures of the tests of backups."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from config import Settings
from operations.wiring import open_portal, prepare
from tests.conftest import DATABASES, Prepared
from tests.support.backups import (
    Story,
)
from tests.support.databases import postgres_database
from tests.support.harness import Clock, derived_quickly, settings_for
from tests.support.mosquitto import short_folder


@pytest.fixture(scope="session")
def other_folder(prepared: Prepared) -> Iterator[Path]:
    """A data folder with SQLite and another CA after its first start, under the same passphrase; copied, never used."""
    folder = short_folder(in_memory=True)
    (folder / "secrets").mkdir(mode=0o700)
    shutil.copy(prepared.folder / "secrets" / "ca-passphrase", folder / "secrets" / "ca-passphrase")
    with derived_quickly(), contextlib.closing(open_portal(settings_for(folder, **prepared.environment()))) as portal:
        prepare(portal)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    return make_settings()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "portal.backup"


@pytest.fixture(params=DATABASES)
def elsewhere(request: pytest.FixtureRequest, ca_keys: Callable[[], dict[str, str]]) -> Iterator[Settings]:
    """An empty data folder with an empty database, where only the passphrase has been put."""
    folder = short_folder()
    if request.param == "sqlite":
        yield settings_for(folder, **ca_keys())
    else:
        with postgres_database() as url:
            yield settings_for(folder, PORTAL_DATABASE_URL=url, **ca_keys())
    shutil.rmtree(folder)


@pytest.fixture
def story(settings: Settings, file: Path, clock: Clock) -> Story:
    return Story(settings, file, clock)
