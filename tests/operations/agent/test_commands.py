"""``agent status``: its exit status says whether the agent runs, and hears of its portal."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from core.files import FileLock
from operations.agent import commands
from operations.agent.commands import LOCK, SILENT_SECONDS, agent_group
from operations.agent.folder import settings_of, utc_seconds
from tests.operations.agent.conftest import Place


def status(place: Place) -> tuple[int, str]:
    done = CliRunner().invoke(agent_group, ["status"], env=place.environment)
    return done.exit_code, done.output


def test_the_status_of_an_agent_that_does_not_run_or_hears_nothing_is_1(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, folder = settings_of(place.environment)
    folder.keep_state(folder.state().heard(utc_seconds()))
    code, said = status(place)
    assert (code, "does not run" in said) == (1, True)
    with FileLock(settings.data_dir / LOCK).hold():
        code, said = status(place)
        assert (code, "Agent " in said) == (0, False), said
        now = utc_seconds()
        monkeypatch.setattr(commands, "utc_seconds", lambda: now + SILENT_SECONDS + 1)
        code, said = status(place)
        assert (code, "hears nothing of the portal" in said) == (1, True)
