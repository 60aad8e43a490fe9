"""The service as it is installed: judged by systemd itself, and in step with the portal's settings."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from config import Settings
from core.broker_control import PLUGINS
from core.given_settings import gathered, variable_of
from operations.commands import open_log

DEPLOY = Path(__file__).parent.parent / "deploy"
UNIT = "onboarding-portal.service"
MOSQUITTO = """\
[Unit]
Description=Mosquitto as Debian starts it

[Service]
Type=notify
NotifyAccess=main
ExecStart=/usr/sbin/mosquitto -c /etc/mosquitto/mosquitto.conf
ExecReload=/bin/kill -HUP $MAINPID
"""
AGENT = "onboarding-portal-agent.service"
WORST_EXPOSURE = {UNIT: 20, AGENT: 20, "mosquitto.service": 15}  # in tenths, of 100


def unit_values(name: str) -> list[str]:
    """What the unit sets under a name, in order."""
    return re.findall(rf"^{name}=(.*)$", (DEPLOY / UNIT).read_text(), re.MULTILINE)


def settings_of_unit(text: str) -> dict[str, list[str]]:
    """The values that a unit's file sets, by their names, in order; an empty one takes back those before."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
        found[name] = [*found.get(name, []), value] if value else []
    return found


@pytest.fixture
def example(tmp_path: Path) -> dict[str, str]:
    """The example configuration, as variables, with names in place of those that are to be adapted."""
    file = tmp_path / "portal.toml"
    file.touch(mode=0o600)
    file.write_text((DEPLOY / "portal.toml.example").read_text().replace(".EXAMPLE", ".example.org"))
    given = gathered({"PORTAL_CONFIG": str(file)}, Settings.model_fields)
    assert given.problems == []
    return {variable_of(name): text for name, text in given.texts.items()}


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units as they stand when installed, with programs that are there in place of those that may not be."""
    for unit in (UNIT, AGENT):
        text = (DEPLOY / unit).read_text()
        (tmp_path / unit).write_text(re.sub(r"/opt/onboarding-portal/\S+/python", "/bin/true", text))
    (tmp_path / "mosquitto.service").write_text(MOSQUITTO.replace("/usr/sbin/mosquitto", "/bin/true"))
    override = (DEPLOY / "mosquitto-override.conf").read_text()
    (tmp_path / "mosquitto.service.d").mkdir()
    (tmp_path / "mosquitto.service.d" / "portal.conf").write_text(override.replace("/usr/sbin/mosquitto", "/bin/true"))
    return tmp_path


def analyze(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SYSTEMD_UNIT_PATH": f"{folder}:", "SYSTEMD_COLORS": "0"}
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("unit", WORST_EXPOSURE)
def test_systemd_finds_nothing_wrong_with_the_units(installed: Path, unit: str) -> None:
    judged = analyze(installed, "verify", "--man=no", str(installed / unit))
    assert judged.returncode == 0, judged.stderr
    assert str(installed) not in judged.stderr
    assert unit not in judged.stderr


def test_systemd_does_find_what_is_wrong(installed: Path) -> None:
    unit = installed / UNIT
    unit.write_text(unit.read_text().replace("ProtectSystem=strict", "ProtectSystem=somewhat"))
    assert f"{unit}:" in analyze(installed, "verify", "--man=no", str(unit)).stderr


def test_a_portal_whose_clock_is_not_yet_set_is_tried_for_as_long_as_that_takes() -> None:
    assert unit_values("StartLimitIntervalSec") == ["0"]
    assert unit_values("StartLimitBurst") == []
    assert unit_values("Restart") == ["on-failure"]
    assert 1 <= int(unit_values("RestartSec")[0]) <= 30
    assert any("time-sync.target" in value for value in unit_values("After"))


@pytest.mark.parametrize("unit", WORST_EXPOSURE)
def test_the_services_are_confined_as_systemd_judges_it(installed: Path, unit: str) -> None:
    options = ["--offline=true", f"--threshold={WORST_EXPOSURE[unit]}", "--no-pager"]
    judged = analyze(installed, "security", *options, str(installed / unit))
    assert judged.returncode == 0, judged.stdout
    assert "Overall exposure level" in judged.stdout


def test_the_broker_may_write_in_its_folder_alone_and_bind_its_port_alone() -> None:
    override = settings_of_unit((DEPLOY / "mosquitto-override.conf").read_text())
    assert override["ProtectSystem"] == ["strict"]
    [folder] = override["ReadWritePaths"]
    configuration = (DEPLOY.parent / "mosquitto" / "portal.conf").read_text()
    written = re.findall(r"^(?:listener 0|pid_file|persistence_location) (\S+)$", configuration, re.MULTILINE)
    assert len(written) == 3
    assert all(path == folder or path.startswith(f"{folder}/") for path in written)
    assert re.findall(r"^listener ([1-9][0-9]*)$", configuration, re.MULTILINE) == ["8883"]
    assert override["SocketBindAllow"] == ["tcp:8883"]
    assert re.search(r"^log_dest stderr$", configuration, re.MULTILINE)


def test_the_example_configuration_is_one(example: dict[str, str]) -> None:
    settings = Settings.from_env({"PORTAL_DATA_DIR": "/var/lib/onboarding-portal", **example})
    assert settings.broker_dir == Path("/var/lib/onboarding-portal/broker")
    assert settings.public_url.startswith("https://")


def test_the_example_configuration_sets_secrets_nowhere_and_nothing_that_the_unit_sets(example: dict[str, str]) -> None:
    by_the_unit = {assignment.split("=")[0] for line in unit_values("Environment") for assignment in line.split()}
    assert by_the_unit.isdisjoint(example)
    assert not [name for name in example if "PASSPHRASE" in name or "TOKEN" in name or "PASSWORD" in name]


def test_the_unit_has_room_for_what_the_example_configuration_allows(example: dict[str, str]) -> None:
    settings = Settings.from_env({"PORTAL_DATA_DIR": "/var/lib/onboarding-portal", **example})
    assert unit_values("SocketBindAllow") == [f"tcp:{settings.pki_bind.port}"]
    assert settings.bind.host.startswith(f"/run/{unit_values('RuntimeDirectory')[0]}/")
    assert not settings.faces_network
    assert int(unit_values("LimitNOFILE")[0]) >= 2 * settings.max_connections
    assert unit_values("MemoryMax") == ["1G"]
    assert settings.workers * 164 < 1024


def test_the_passphrase_comes_from_a_credential(tmp_path: Path) -> None:
    (credential,) = (value for value in unit_values("LoadCredential") if "passphrase" in value)
    assert f"PORTAL_CA_PASSPHRASE_FILE=%d/{credential.split(':')[0]}" in unit_values("Environment")
    path = tmp_path / "ca-passphrase"
    path.write_text("a passphrase to be kept\n")
    path.chmod(0o440)
    settings = Settings.from_env({"PORTAL_DATA_DIR": str(tmp_path), "PORTAL_CA_PASSPHRASE_FILE": str(path)})
    assert settings.ca_passphrase.get_secret_value() == "a passphrase to be kept"
    assert "to be kept" not in repr(settings)


def test_the_settings_come_from_a_credential_over_which_variables_win() -> None:
    (credential,) = (value for value in unit_values("LoadCredential") if "toml" in value)
    assert f"PORTAL_CONFIG=%d/{credential.split(':')[0]}" in unit_values("Environment")
    assert unit_values("EnvironmentFile") == ["-/etc/onboarding-portal/portal.env"]


def test_polkit_lets_the_portal_restart_the_broker_and_nothing_else(example: dict[str, str]) -> None:
    rule = (DEPLOY / "50-onboarding-portal.rules").read_text()
    _program, verb, unit = shlex.split(example["PORTAL_BROKER_RESTART"])
    (user,) = unit_values("User")
    for condition in (f'subject.user == "{user}"', f'lookup("unit") == "{unit}"', f'lookup("verb") == "{verb}"'):
        assert condition in rule
    assert rule.count("Result.YES") == 1


def test_the_service_is_under_the_guard_with_all_that_it_takes(example: dict[str, str]) -> None:
    assert example["PORTAL_BROKER_CONTROL"] == "guard"
    guide, override = (DEPLOY / "README.md").read_text(), (DEPLOY / "mosquitto-override.conf").read_text()
    assert "make -C mosquitto/guard install\n" in guide
    assert "PREFIX ?= /usr/local\n" in (DEPLOY.parent / "mosquitto" / "guard" / "Makefile").read_text()
    assert f"\nplugin {PLUGINS[0]}\n" in (DEPLOY.parent / "mosquitto" / "portal.conf").read_text()
    named = re.findall(r"^Environment=OPENSSL_CONF=(.*)$", override, re.MULTILINE)
    assert f"install -m 0644 mosquitto/openssl.cnf {named[0]}\n" in guide
    assert "\nExecReload=\n" in override  # SIGHUP harms sleeping sessions


def test_the_command_for_administrators_runs_with_what_the_service_has() -> None:
    script = (DEPLOY / "portal-admin").read_text()
    for name in ("User", "SupplementaryGroups", "WorkingDirectory", "EnvironmentFile", "LoadCredential", "UMask"):
        for value in unit_values(name):
            assert f"--property={name}={value} " in script.replace(" \\\n", " \n")
    assert f"--setenv=PORTAL_DATA_DIR=/var/lib/{unit_values('StateDirectory')[0]} " in script


def test_the_guide_names_every_file_and_installs_it() -> None:
    guide = (DEPLOY / "README.md").read_text() + (DEPLOY.parent / "docs" / "how-to" / "edge.md").read_text()
    for path in DEPLOY.iterdir():
        if path.name != "README.md" and path.is_file():
            assert f"| `{path.name}` |" in guide
            assert re.search(rf"^       install .*deploy/{re.escape(path.name)} ", guide, re.MULTILINE), path.name


def test_a_log_that_is_emptied_while_it_is_written_goes_on_at_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "portal.log"
    log = open_log(path)
    os.write(log, b"before\n" * 100)
    path.write_bytes(b"")  # as logrotate does it with copytruncate, which deploy/README.md has it use
    os.write(log, b"after\n")
    os.close(log)
    assert path.read_bytes() == b"after\n"
