"""Checks of how the broker runs: in which environment, with which plugin, and who else sends it signals."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from broker.guard.control import GUARD_VERSION, NEWS_VERSION
from core.broker_control import ControlKind
from operations.doctor.base import SECONDS, Finding, Findings, Installation, combine, problem, warning, well
from operations.doctor.broker import running_broker
from operations.doctor.mosquitto import SAFE_RELOAD, find_configuration, guard_of, read_configuration, running_version

LOGROTATE_RULES = Path("/etc/logrotate.d")
_MAX_BYTES = 1 << 20
_OPENSSL_CNF = "Install mosquitto/openssl.cnf as mosquitto/README.md says, then restart the broker."
_COMPARES_KEYS = b"portal-guard compares keys of CAs\0"
_BUILD = "Build and install the plugin again (make -C mosquitto/guard install), then restart the broker."


@dataclass(frozen=True, slots=True)
class Service:
    """The systemd unit that runs the broker, empty if none does, and what it sets; ``None`` if that is not known."""

    unit: str
    reload: str = ""
    environment: str | None = None


def broker_service(installation: Installation) -> Finding:
    """Check the running broker's process, and that nobody reloads a broker whose reloads do harm."""
    pid = running_broker(installation)
    if not pid:
        return well("Not looked at: the broker does not run, or its process is not visible here.")
    found, service = Findings(), _service_of(pid)
    found += openssl_warnings(environment_of(pid, service), Path(f"/proc/{pid}/root"))
    if installation.settings.broker_control is ControlKind.GUARD:
        found += plugin_mistakes(_guard_of(installation), _text(Path(f"/proc/{pid}/maps")), Path(f"/proc/{pid}/root"))
    if (running_version(pid) or (0,)) < SAFE_RELOAD:
        found += reload_warnings(service, LOGROTATE_RULES, installation.settings.broker_pid_file)
    return combine(found, f"The broker is process {pid}{f' of {service.unit}' if service.unit else ''}.")


# --- The unit -----------------------------------------------------------------------------------------------------


def _service_of(pid: int) -> Service:
    unit = unit_of(_text(Path(f"/proc/{pid}/cgroup")))
    return Service(unit, **_shown(unit)) if unit else Service("")


def unit_of(cgroup: str) -> str:
    """Return the systemd service of a process, by its ``/proc/PID/cgroup``; empty if it is not in one."""
    found = re.findall(r"/([^/\n]+\.service)(?:/[^\n]*)?$", cgroup, re.MULTILINE)
    return found[0] if found else ""


def _shown(unit: str) -> Mapping[str, str]:
    """Return what systemd says of a unit; nothing if it does not answer."""
    words = ["systemctl", "show", "--property=ExecReload", "--property=Environment", unit]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    return {"reload": lines.get("ExecReload", ""), "environment": lines.get("Environment", "")}


def reload_warnings(service: Service, rules: Path, pid_file: Path) -> Iterator[Finding]:
    """Warn of everybody who reloads the broker of ``service``, a version whose reloads harm sleeping sessions."""
    why = "sessions that are asleep lose QoS 1 messages, and the broker may crash when they come back"
    for rule in sorted(rules.glob("*")):
        if _reloads(_text(rule), service, pid_file):
            yield warning(
                f"{rule} reloads the broker when it rotates a log: {why}.",
                f"Take the reload out of {rule}; the broker logs to the journal, or use copytruncate.",
            )
    if service.unit and service.reload:
        yield warning(
            f"{service.unit} has an ExecReload, so systemctl reload sends the broker SIGHUP: {why}.",
            "Install deploy/mosquitto-override.conf, which empties ExecReload, then run systemctl daemon-reload.",
        )


def _reloads(rule: str, service: Service, pid_file: Path) -> bool:
    """Return whether a rule of logrotate reloads the broker: by its unit, or by a signal, to which it needs no unit."""
    if "HUP" in rule and (str(pid_file) in rule or re.search(r"\b(pkill|killall)\b.*\bmosquitto\b", rule)):
        return True
    named = service.unit.removesuffix(".service")
    if not named or not re.search(rf"\b{re.escape(named)}\b", rule):
        return False
    return re.search(r"\b(SIG)?HUP\b", rule) is not None or bool(service.reload and "reload" in rule)


# --- Its environment ----------------------------------------------------------------------------------------------


def environment_of(pid: int, service: Service) -> Sequence[str] | None:
    """Return the variables of a process, as its unit sets them if they cannot be read; ``None`` if neither is known."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return None if service.environment is None else service.environment.split()


def openssl_warnings(environment: Sequence[str] | None, root: Path) -> Iterator[Finding]:
    """Warn if the broker's environment names no settings for OpenSSL that end resumption.

    Say nothing if it is not known. ``root`` is the root folder as the broker sees it.
    """
    if environment is None:
        return
    resumed = (
        "a TLS 1.3 session that began before a revocation is resumed past the CRL; only the guard refuses it, and"
        " without the guard a revocation is pending until the broker is restarted"
    )
    values = [variable.removeprefix("OPENSSL_CONF=") for variable in environment if variable[:13] == "OPENSSL_CONF="]
    if not values:
        yield warning(f"The broker runs without OPENSSL_CONF: {resumed}.", _OPENSSL_CNF)
        return
    path = Path(values[0])
    try:
        text = _below(root, path).read_text(encoding="utf-8", errors="replace")
    except PermissionError:
        return
    except OSError as error:
        yield warning(f"The broker's OPENSSL_CONF {path} cannot be read ({error.strerror}): {resumed}.", _OPENSSL_CNF)
        return
    lines = [re.sub(r"\s", "", line.partition("#")[0]) for line in text.splitlines()]
    if "NumTickets=0" not in lines or not any(
        line.startswith("Options=") and "-SessionTicket" in line.removeprefix("Options=").split(",") for line in lines
    ):
        yield warning(f"The broker's OPENSSL_CONF {path} does not switch off session tickets: {resumed}.", _OPENSSL_CNF)


def _below(root: Path, path: Path) -> Path:
    """Return the path as the broker sees it, which may run in a container; as it is if nobody may look there."""
    return root / path.relative_to("/") if path.is_absolute() and os.access(root, os.X_OK) else path


# --- The plugin ---------------------------------------------------------------------------------------------------


def _guard_of(installation: Installation) -> Path | None:
    """Return the guard's file by the configuration; ``None`` if that is not known, which another check reports."""
    try:
        path = find_configuration(installation)
        guard = None if path is None else guard_of(read_configuration(path))
    except (OSError, ValueError):
        return None
    return None if guard is None else Path(guard)


def plugin_mistakes(plugin: Path | None, maps: str, root: Path = Path("/")) -> Iterator[Finding]:
    """Return what is wrong with the guard's file, and with the one that a process of the memory ``maps`` has loaded.

    ``root`` is the root folder as the broker sees it.
    """
    if plugin is None:
        return
    try:
        with _below(root, plugin).open("rb") as file:
            content = file.read(_MAX_BYTES)
    except OSError as error:
        yield problem(f"The guard {plugin} cannot be read: {error.strerror}.", _BUILD)
        return
    spoken = re.search(rb"portal-guard protocol (\d+)\0", content)
    if spoken is None:
        yield problem(f"{plugin} is not the portal's guard, or an old version of it.", _BUILD)
    elif not GUARD_VERSION <= int(spoken[1]) <= NEWS_VERSION:
        yield problem(f"The guard {plugin} is of version {int(spoken[1])}, the portal's is {NEWS_VERSION}.", _BUILD)
    elif _COMPARES_KEYS not in content:
        yield warning(f"The guard {plugin} compares CAs by their names alone: it is older than the portal.", _BUILD)
    if re.search(rf"/{re.escape(plugin.name)} \(deleted\)$", maps, re.MULTILINE):
        yield warning(f"{plugin} was replaced since the broker started.", "Restart the broker at a quiet time.")


def _text(path: Path) -> str:
    """Return the text of a file, empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
