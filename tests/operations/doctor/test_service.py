"""How the broker runs: what its environment, its plugin and its unit lack is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from broker.guard.control import GUARD_VERSION, NEWS_VERSION
from config import Settings
from operations.doctor import service
from operations.doctor.base import Finding, State
from operations.doctor.doctor import examine
from operations.doctor.service import (
    Service,
    environment_of,
    openssl_warnings,
    plugin_mistakes,
    reload_warnings,
    unit_of,
)
from operations.wiring import utc_now
from tests.support.mosquitto import OPENSSL_CONFIGURATION, guard_library

DEBIANS_RULE = """\
/var/log/mosquitto/mosquitto.log {
    postrotate
        if invoke-rc.d mosquitto status > /dev/null 2>&1; then invoke-rc.d mosquitto reload > /dev/null 2>&1; fi;
    endscript
}
"""
BY_SIGNAL = "/var/log/mosquitto/mosquitto.log {\n postrotate\n  pkill -HUP mosquitto\n endscript\n}\n"
BY_PID_FILE = BY_SIGNAL.replace("pkill -HUP mosquitto", "kill -HUP $(cat /run/mosquitto/mosquitto.pid)")
RELOADS = "{ path=/bin/kill ; argv[]=/bin/kill -HUP $MAINPID ; ignore_errors=no }"


def said(found: list[Finding]) -> str:
    return " ".join(one.detail for one in found)


# --- Who reloads it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unit", "reload", "rule", "named"),
    [
        ("mosquitto.service", RELOADS, DEBIANS_RULE, ["rotates a log", "mosquitto.service has an ExecReload"]),
        ("mosquitto.service", RELOADS, "", ["mosquitto.service has an ExecReload"]),
        ("mosquitto.service", "", DEBIANS_RULE, []),  # there is nothing left that it could run
        ("mosquitto.service", "", BY_SIGNAL, ["rotates a log"]),
        ("mosquitto.service", "", BY_SIGNAL.replace("mosquitto", "nginx"), []),
        ("", RELOADS, DEBIANS_RULE, []),  # not the broker that the rule is for
        ("", "", BY_SIGNAL, ["rotates a log"]),  # which reaches one without a unit, too
        ("", "", BY_PID_FILE, ["rotates a log"]),
        ("", "", BY_PID_FILE.replace("mosquitto", "nginx"), []),
    ],
)
def test_whoever_reloads_the_broker_is_named(
    tmp_path: Path, unit: str, reload: str, rule: str, named: list[str]
) -> None:
    (tmp_path / "mosquitto").write_text(rule)
    found = [*reload_warnings(Service(unit, reload), tmp_path, Path("/run/mosquitto/mosquitto.pid"))]
    assert [one.state for one in found] == [State.WARNING] * len(named)
    assert all(part in one.detail for part, one in zip(named, found, strict=True))


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("0::/system.slice/mosquitto.service\n", "mosquitto.service"),
        ("1:name=systemd:/system.slice/mosquitto.service/x\n0::/\n", "mosquitto.service"),
        ("0::/user.slice/user-0.slice/session-1.scope\n", ""),
        ("", ""),
    ],
)
def test_the_unit_of_a_process_is_that_of_its_cgroup(cgroup: str, unit: str) -> None:
    assert unit_of(cgroup) == unit


@pytest.mark.parametrize(("version", "warned"), [((2, 0, 21), True), (None, True), ((2, 1, 0), False)])
def test_a_version_whose_reloads_do_no_harm_may_be_reloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...] | None, warned: bool
) -> None:
    monkeypatch.setattr(service, "running_broker", lambda _: 1)
    monkeypatch.setattr(service, "running_version", lambda _: version)
    monkeypatch.setattr(service, "_service_of", lambda _: Service("mosquitto.service", RELOADS))
    monkeypatch.setattr(service, "environment_of", lambda *_: None)
    settings = Settings.from_env({"PORTAL_DATA_DIR": str(tmp_path), "PORTAL_BROKER_CONTROL": "files"})
    (finding,) = examine(settings, utc_now, checks=(("broker service", service.broker_service),))
    assert (finding.state is State.WARNING) is warned, finding


# --- Its settings for OpenSSL -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda text: text, ""),
        (lambda text: text.replace("NumTickets = 0", "NumTickets = 2"), "does not switch off session tickets"),
        (lambda text: text.replace("-SessionTicket", "ServerPreference, -SessionTicket"), ""),
        (lambda text: text.replace("Options = -SessionTicket", "#Options = -SessionTicket"), "does not switch off"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_settings_that_resume_tls_sessions_past_the_crl_are_named(
    tmp_path: Path, change: Callable[[str], str] | None, named: str
) -> None:
    if change is not None:
        (tmp_path / "openssl.cnf").write_text(change(OPENSSL_CONFIGURATION.read_text()))
    text = said([*openssl_warnings([f"OPENSSL_CONF={tmp_path}/openssl.cnf"], Path("/"))])
    assert named in text
    assert bool(text) is bool(named)


def test_a_broker_without_settings_for_openssl_is_named() -> None:
    assert "without OPENSSL_CONF" in said([*openssl_warnings(["PATH=/bin"], Path("/"))])


def test_an_environment_that_cannot_be_read_is_the_units_or_not_known() -> None:
    nobody = 0  # has no folder in /proc
    assert environment_of(nobody, Service("x.service", environment="A=1 OPENSSL_CONF=/x")) == ["A=1", "OPENSSL_CONF=/x"]
    assert environment_of(nobody, Service("x.service")) is None
    assert [*openssl_warnings(None, Path("/"))] == []


def test_a_configuration_that_is_another_checks_to_name_costs_nothing_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "running_broker", lambda _: 1)
    monkeypatch.setattr(service, "running_version", lambda _: (2, 1, 0))
    monkeypatch.setattr(service, "environment_of", lambda *_: None)
    settings = Settings.from_env({"PORTAL_DATA_DIR": str(tmp_path), "PORTAL_BROKER_CONTROL": "guard"})
    checks = (("broker service", service.broker_service),)
    (finding,) = examine(settings, utc_now, broker_config=tmp_path / "none.conf", checks=checks)
    assert finding.state is State.OK, finding


# --- Its plugin ---------------------------------------------------------------------------------------------------


def test_the_guard_that_is_built_is_the_one_that_the_portal_speaks_to() -> None:
    assert [*plugin_mistakes(guard_library(), "")] == []


@pytest.mark.parametrize("version", range(GUARD_VERSION, NEWS_VERSION + 1))
def test_a_guard_that_speaks_less_than_the_newest_version_is_no_mistake(tmp_path: Path, version: int) -> None:
    content = b"portal-guard protocol %d\0portal-guard compares keys of CAs\0" % version
    (tmp_path / "portal_guard.so").write_bytes(content)
    assert [*plugin_mistakes(tmp_path / "portal_guard.so", "")] == []


@pytest.mark.parametrize(
    ("content", "maps", "named"),
    [
        (
            b"portal-guard protocol %d\0" % (NEWS_VERSION + 1),
            "",
            f"is of version {NEWS_VERSION + 1}, the portal's is",
        ),
        (b"\x7fELF", "", "is not the portal's guard, or an old version of it"),
        (None, "", "cannot be read: No such file or directory"),
        (b"portal-guard protocol %d\0" % GUARD_VERSION, "", "compares CAs by their names alone"),
        (
            b"portal-guard protocol %d\0" % GUARD_VERSION,
            "7f r-xp 00000000 08:01 5  /usr/local/lib/portal_guard.so (deleted)\n",
            "was replaced since the broker started",
        ),
    ],
)
def test_a_plugin_of_another_version_is_named(tmp_path: Path, content: bytes | None, maps: str, named: str) -> None:
    if content is not None:
        (tmp_path / "portal_guard.so").write_bytes(content)
    assert named in said([*plugin_mistakes(tmp_path / "portal_guard.so", maps)])


def test_the_plugin_of_a_broker_in_a_container_is_named_as_its_configuration_does(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "portal_guard.so").write_bytes(b"portal-guard protocol 1\0")
    (finding,) = plugin_mistakes(Path("/lib/portal_guard.so"), "", root=tmp_path)
    assert finding.detail.startswith("The guard /lib/portal_guard.so is of version 1,")
