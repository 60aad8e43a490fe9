"""The agent with only what its image has: a module or a package that is missing there is missed here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import wheel
from tests.support.edges import edge_of
from tests.system.test_agents import is_denied, is_let_in, portal_with_agents, revoke
from tests.test_containers import packages_of_agent, values

pytestmark = [pytest.mark.system, pytest.mark.long]


def test_what_the_image_has_joins_and_has_a_real_broker_prove_a_revocation(tmp_path: Path) -> None:
    programs = wheel.install_beside(wheel.build(tmp_path / "dist"), tmp_path / "venv", packages_of_agent())
    [folder] = (tmp_path / "venv").glob("lib/python*/site-packages")
    assert not {"flask", "sqlalchemy", "gunicorn", "alembic"} & {each.name for each in folder.iterdir()}
    assert values("agent", "ENTRYPOINT") == ['["portal-server", "agent"]']
    of_image = dict(re.findall(r'(PORTAL_\w+)=("[^"]*"|\S+)', " ".join(values("agent", "ENV"))))
    kept_out = ("PORTAL_DATA_DIR", "PORTAL_BROKER_GROUP", "PORTAL_BROKER_RESTART")  # of the image's users and folders
    given = {name: value.strip('"') for name, value in of_image.items() if name not in kept_out}
    with portal_with_agents() as portal, edge_of(portal, start=False, **given) as edge:
        edge.program = (str(programs / "portal-server"), "agent")
        del edge.environment["PYTHONPATH"]
        edge.environment["PATH"] = f"{programs}:/usr/bin:/bin"
        edge.start()
        device = portal.onboard()
        edge.wait_enforced()
        assert is_let_in(edge.here(device))
        assert revoke(portal, device)["broker"] == "enforced"
        assert is_denied(edge.here(device))
        assert "Broker           edge" in edge.run("status").stdout
        edge.broker.stop()
        edge.broker.start()
        assert is_denied(edge.here(device))
