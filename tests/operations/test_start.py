"""What the start of the portal imports: each module takes processor time in it, so those that are seldom used wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app import create_app
from tests.support.harness import first_start, settings_for

PROJECT = Path(__file__).parents[2]
# A portal on SQLite without single sign-on, webhooks and keys in a token, whose database has the newest schema.
SELDOM = {"alembic", "asn1crypto", "joserfc", "mako", "pkcs11", "psycopg", "requests", "rich", "segno", "urllib3"}
MAX_MODULES = 897  # of ours and of libraries
PROGRAM = """
import json, sys
from app import create_app, portal_of
from web.api.devices import RegisterRequest

app = create_app(background=False)
portal_of(app)
names = [name for name in sys.modules if name.partition(".")[0] not in sys.stdlib_module_names]
print(json.dumps({"modules": names, "schema": RegisterRequest.__pydantic_complete__}))
RegisterRequest.model_validate({"name": "a", "type": "b", "location": "c", "firmware": "d"})
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What a process has imported once it has opened a portal that was set up before."""
    data = tmp_path_factory.mktemp("start") / "data"
    first_start(settings_for(data, PORTAL_BROKER_CONTROL="files"))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PORTAL_")}
    environment = inherited | {"PORTAL_DATA_DIR": str(data), "PORTAL_BROKER_CONTROL": "files"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_what_few_portals_use_is_not_imported(started: dict[str, list[str]]) -> None:
    packages = {name.partition(".")[0] for name in started["modules"]}
    assert {"flask", "gunicorn", "sqlalchemy"} <= packages
    assert not SELDOM & packages
    assert len(started["modules"]) <= MAX_MODULES


def test_the_three_applications_of_a_start_compile_their_rules_once(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "data")
    apps = [create_app(settings, background=background) for background in (True, False)]
    without_console = create_app(settings_for(tmp_path / "data", PORTAL_CONSOLE="off"))
    assert apps[0].url_map is apps[1].url_map
    paths = {rule.rule for rule in apps[0].url_map.iter_rules()}
    assert paths - {rule.rule for rule in without_console.url_map.iter_rules()} >= {"/", "/ui/"}
    assert apps[0].extensions["portal"] is not apps[1].extensions["portal"]


def test_the_model_of_a_request_gets_its_schema_when_it_is_used(started: dict[str, bool]) -> None:
    assert started["schema"] is False
