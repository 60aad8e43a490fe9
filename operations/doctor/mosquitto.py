"""Checks of Mosquitto's version and configuration for known mistakes that it does not report."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from broker.files.control import PASSWORD_FILE
from broker.folder import CA_FILE, CA_FOLDER, CRL_FILE, SERVER_CERTIFICATE_FILE, SERVER_KEY_FILE
from config import Settings
from core.broker_control import ACL_FILE, JOURNAL_FILE, AclStyle, ControlKind
from operations.doctor.base import SECONDS, Finding, Findings, Installation, combine, counted, problem, warning, well
from operations.doctor.broker import active_devices, running_broker

OLDEST = (2, 0, 11)
FAST_ACL = (2, 1, 0)  # since then a reload does not take time quadratic in the number of blocks
SAFE_RELOAD = (2, 1, 0)  # since then a reload keeps sessions that are not connected
MAX_BLOCKS = 10_000  # with these an older version pauses for a third of a second
_MAX_BYTES = 1 << 20
_MAX_FILES = 100
# Options that are checked, and belong to the listener above them, or to the default one if there is none above.
_OF_A_LISTENER = frozenset(
    [
        "cafile",
        "capath",
        "certfile",
        "keyfile",
        "crlfile",
        "require_certificate",
        "use_identity_as_username",
        "use_subject_as_username",
        "use_username_as_clientid",
        "tls_version",
        "max_connections",
    ]
)
_INSTALL = "Install mosquitto/portal.conf as mosquitto/README.md says, then restart the broker."


@dataclass(slots=True)
class Listener:
    """A listener: port (0 for a Unix socket), address or path, and those of its own options that are checked."""

    port: int
    address: str
    options: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Bridge:
    """A connection to another broker, with the values of its ``topic`` lines."""

    name: str
    address: str = ""
    topics: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Configuration:
    """A configuration of Mosquitto: global options, the last of each, and listeners (mosquitto.conf(5))."""

    options: dict[str, str] = field(default_factory=dict)
    listeners: list[Listener] = field(default_factory=list)
    plugins: list[str] = field(default_factory=list)  # each once, with those whose options follow
    bridges: list[Bridge] = field(default_factory=list)


def read_configuration(path: Path) -> Configuration:
    """Read a configuration and the files that it includes; raise ``OSError``, or ``ValueError`` for a bad port."""
    configuration = Configuration()
    default = Listener(1883, "")
    current = default
    for option, value in _lines(path, depth=0):
        if option == "listener":
            port, _, address = value.partition(" ")
            current = Listener(int(port), address.strip())
            configuration.listeners.append(current)
        elif option == "port":
            default.port = int(value)
            configuration.listeners.append(default)
        elif option in ("plugin", "auth_plugin", "global_plugin"):
            configuration.plugins.append(value)
        elif option == "connection":
            configuration.bridges.append(Bridge(value))
        elif option in ("address", "addresses") and configuration.bridges:
            configuration.bridges[-1].address = value
        elif option == "topic" and configuration.bridges:
            configuration.bridges[-1].topics.append(value)
        elif option in _OF_A_LISTENER:
            current.options[option] = value
        else:
            configuration.options[option] = value
    return configuration


def _lines(path: Path, depth: int) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:
        text = file.read(_MAX_BYTES).decode("utf-8", "replace")
    for line in text.splitlines():
        if line.startswith("#") or not line.strip():
            continue
        option, _, value = line.strip().partition(" ")
        if option == "include_dir" and depth == 0:
            for included in sorted(Path(value.strip()).glob("*.conf"))[:_MAX_FILES]:
                yield from _lines(included, depth=1)
        else:
            yield option, value.strip()


def find_configuration(installation: Installation) -> Path | None:
    """Return the given file, else the running broker's, else a usual one that names the portal's socket."""
    if installation.broker_config is not None:
        return installation.broker_config
    if (pid := running_broker(installation)) and (named := _named_by(pid)) is not None:
        return named
    candidates = [
        installation.settings.broker_dir / "mosquitto.conf",
        Path("/etc/mosquitto/portal.conf"),
        Path("/etc/mosquitto/mosquitto.conf"),  # which includes conf.d/*.conf
    ]
    return next((path for path in candidates if _is_of_the_portal(path, installation.settings)), None)


def _is_of_the_portal(path: Path, settings: Settings) -> bool:
    try:
        listeners = read_configuration(path).listeners
    except (OSError, ValueError):
        return False
    return any(Path(listener.address) == settings.broker_socket for listener in listeners)


def _named_by(pid: int) -> Path | None:
    """Return the file after ``-c`` on a process's command line."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        if "-c" not in words[:-1]:
            return None
        named = Path(words[words.index("-c") + 1])
        return named if named.is_absolute() else Path(f"/proc/{pid}/cwd").readlink() / named
    except OSError:
        return None


# --- Configuration ------------------------------------------------------------------------------------------------


def broker_configuration(installation: Installation) -> Finding:
    """Check the configuration for known mistakes."""
    path = find_configuration(installation)
    if path is None:
        return warning("The broker's configuration was not found.", "Give its name: --broker-config FILE.")
    try:
        configuration = read_configuration(path)
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else str(error)
        return problem(f"{path} cannot be read: {said}.", "Give the right file: --broker-config FILE.")
    found = mistakes(configuration, installation.settings)
    if found:
        found.insert(0, well(f"In {path}:"))
    return combine(found, f"Found no problems in {path}.")


def mistakes(configuration: Configuration, settings: Settings) -> list[Finding]:
    """Return everything in a configuration that admits clients, or grants topics, that it must not."""
    control = _guard_mistakes if settings.broker_control is ControlKind.GUARD else _file_mistakes
    found = Findings([*_global_mistakes(configuration.options, settings), *control(configuration, settings)])
    internal = [one for one in configuration.listeners if one.port == 0 and Path(one.address) == settings.broker_socket]
    of_devices = [one for one in configuration.listeners if _is_of_devices(one, settings)]
    if not internal:
        found.problem(f"There is no listener 0 {settings.broker_socket}, which the portal connects to.", _INSTALL)
    if not of_devices:
        found.problem(f"There is no listener {settings.probe_addresses[0].port} for devices.", _INSTALL)
    for listener in of_devices:
        found += _listener_mistakes(listener.options, settings)
    if settings.broker_control is ControlKind.FILES:
        found += _open_listeners(one for one in configuration.listeners if one not in [*internal, *of_devices])
    found += bridge_warnings(configuration.bridges, settings.topic_prefix)
    return found


def _open_listeners(others: Iterable[Listener]) -> Iterator[Finding]:
    """Return the other listeners by which a client may call itself a device; the guard refuses that by itself."""
    for listener in others:
        if not _is_true(listener.options, "require_certificate"):
            name = f"{listener.port} {listener.address}".strip()
            yield problem(
                f"Another listener, {name}, does not require a certificate.", "Remove it from the configuration."
            )


def bridge_warnings(bridges: Iterable[Bridge], prefix: str) -> Iterator[Finding]:
    """Warn of bridges that copy devices' messages to another broker, or bring messages from there to devices."""
    for bridge in bridges:
        for line in bridge.topics:
            words = ["" if word == '""' else word for word in line.split()]
            direction, local = "".join(words[1:2]) or "out", "".join(words[3:4])
            if not words or not _reaches_below(local + words[0], prefix):
                continue
            name, where = f"The bridge {bridge.name} (topic {line})", bridge.address or "another broker"
            if direction in ("out", "both"):
                yield warning(
                    f"{name} copies devices' messages to {where}, whoever may read them there.",
                    "Narrow its topic lines, unless that is what you want.",
                )
            if direction in ("in", "both"):
                yield warning(
                    f"{name} brings messages from {where} to devices, which the broker asks nobody about.",
                    "Narrow its topic lines, unless that is what you want.",
                )


def _reaches_below(pattern: str, prefix: str) -> bool:
    """Return whether a topic filter matches a topic below ``prefix``."""
    levels, wanted = pattern.split("/"), prefix.split("/")
    for level, name in zip(levels, wanted, strict=False):
        if level == "#":
            return True
        if level not in ("+", name):
            return False
    return len(levels) > len(wanted)


def _is_of_devices(listener: Listener, settings: Settings) -> bool:
    """Return whether devices connect to the listener; a port of their own may be forwarded to it."""
    return listener.port == settings.probe_addresses[0].port


def _global_mistakes(options: Mapping[str, str], settings: Settings) -> Iterator[Finding]:
    if _is_true(options, "per_listener_settings"):
        yield problem("per_listener_settings is true: the ACL applies to one listener only.", _INSTALL)
    if _is_true(options, "allow_anonymous"):
        found = warning if settings.broker_control is ControlKind.GUARD else problem
        yield found("allow_anonymous is true: clients without a certificate or password are accepted.", _INSTALL)
    if not _is_true(options, "check_retain_source"):
        yield problem(
            "check_retain_source is not true: retained messages of a revoked device are still delivered.", _INSTALL
        )
    if not _is_true(options, "set_tcp_nodelay"):
        yield warning("set_tcp_nodelay is not true: each connect takes 40 ms longer.", _INSTALL)
    if "persistent_client_expiration" in options:
        yield warning(
            "persistent_client_expiration is set: after a reload Mosquitto 2.0.x crashes when devices with persistent"
            " sessions come and go.",
            "Remove persistent_client_expiration, then restart the broker.",
        )


def _file_mistakes(configuration: Configuration, settings: Settings) -> Iterator[Finding]:
    """Return what is wrong for the control by files."""
    options = configuration.options
    yield from _names_file(options, "acl_file", settings, ACL_FILE, "every client may do everything")
    yield from _names_file(
        options, "password_file", settings, PASSWORD_FILE, "the portal can neither query it nor disconnect devices"
    )
    if not settings.broker_reload and options.get("pid_file") != str(settings.broker_pid_file):
        yield problem(f"pid_file is not {settings.broker_pid_file}: a Mosquitto 2.1 cannot be reloaded.", _INSTALL)
    for plugin in configuration.plugins:
        yield warning(
            f"The plugin {plugin} is loaded: it may accept clients that the portal does not know.",
            "Remove it from the configuration if it is not needed.",
        )


def _guard_mistakes(configuration: Configuration, settings: Settings) -> Iterator[Finding]:
    """Return what is wrong for the control by the guard."""
    if (guard := guard_of(configuration)) is None:
        yield problem("The guard is not loaded: every client may do what the rest of the configuration says.", _INSTALL)
    elif configuration.plugins[0] != guard:
        yield problem(
            f"The plugin {configuration.plugins[0]} is loaded before the guard: it is asked first, and may allow what"
            " the guard refuses.",
            "Put the guard's lines before those of other plugins, then restart the broker.",
        )
    yield from _names_file(
        configuration.options, "plugin_opt_journal", settings, JOURNAL_FILE, "the guard refuses every device"
    )


def guard_of(configuration: Configuration) -> str | None:
    """Return the file of the guard, by its name; ``None`` if the configuration does not load it."""
    return next((plugin for plugin in configuration.plugins if "portal_guard" in Path(plugin).name), None)


def _listener_mistakes(options: Mapping[str, str], settings: Settings) -> Iterator[Finding]:
    for option, why in (
        ("require_certificate", "clients without a certificate are accepted"),
        ("use_identity_as_username", "the ACL cannot tell devices apart"),
        ("use_username_as_clientid", "a device can take over the session of another, and none can be disconnected"),
    ):
        if not _is_true(options, option):
            yield problem(f"{option} is not true: {why}.", _INSTALL)
    if _is_true(options, "use_subject_as_username"):
        yield problem("use_subject_as_username is true: the ACL cannot tell devices apart.", _INSTALL)
    yield from _names_file(options, "capath", settings, CA_FOLDER, "new CRLs and CAs are not read before a restart")
    oldest = options.get("tls_version", "tlsv1.2")
    if oldest in ("tlsv1", "tlsv1.0", "tlsv1.1"):
        yield warning(f"tls_version is {oldest}, which is insecure.", _INSTALL)
    elif oldest == "tlsv1.2" and settings.broker_control is ControlKind.FILES:
        yield warning(
            "tls_version is tlsv1.2: a device that was revoked can resume such a session for two hours, so a revocation"
            " stays pending until then, or until the broker is restarted.",
            "Let tls_version be tlsv1.3 if all devices can, and PORTAL_MQTT_TLS with it, then restart the broker.",
        )
    yield from _names_file(options, "cafile", settings, CA_FILE, "devices are verified with other CAs")
    yield from _names_file(options, "crlfile", settings, CRL_FILE, "revoked certificates are accepted")
    yield from _names_file(options, "certfile", settings, SERVER_CERTIFICATE_FILE, "its certificate is not renewed")
    yield from _names_file(options, "keyfile", settings, SERVER_KEY_FILE, "its certificate is not renewed")


def _names_file(options: Mapping[str, str], option: str, settings: Settings, name: str, why: str) -> Iterator[Finding]:
    wanted = settings.broker_file(name)
    value = options.get(option)
    if value is None:
        yield problem(f"{option} is missing: {why}.", _INSTALL)
    elif os.path.realpath(value) != os.path.realpath(wanted):
        yield problem(f"{option} is {value}, not {wanted}: {why}.", _INSTALL)


def _is_true(options: Mapping[str, str], option: str) -> bool:
    return options.get(option, "").lower() in ("true", "1")


# --- Version ------------------------------------------------------------------------------------------------------


def broker_version(installation: Installation) -> Finding:
    """Check that the running broker's version works, and is fast enough for the fleet and the ACL's style."""
    pid = running_broker(installation)
    found = Findings()
    if pid and (_program_of(pid) or "").endswith(" (deleted)"):
        found.warning("The broker's program was updated since it started.", "Restart the broker at a quiet time.")
    program = _runnable(pid)
    if program is None:
        return warning(
            "The program mosquitto is not on this machine, so its version is unknown.",
            "Run mosquitto -h on the broker's machine.",
        )
    version = version_of(program)
    if version is None:
        return warning(f"{program} does not print its version.", f"Check that {program} is Mosquitto.")
    said = ".".join(map(str, version))
    if version < OLDEST:
        found.warning(
            f"Mosquitto {said} is older than 2.0.11, the oldest that was tested.", "Install a newer Mosquitto."
        )
    devices = active_devices(installation)
    guarded = installation.settings.broker_control is ControlKind.GUARD
    if not guarded:
        found += restart_warnings(version, installation.settings)
        found += size_warnings(version, installation.settings.acl_style, devices)
    found += _connection_warnings(installation, devices)
    how = "under the guard" if guarded else f"in style {installation.settings.acl_style}"
    return combine(found, f"Mosquitto {said}, with {counted(devices, 'active device', 'active devices')} {how}.")


def running_version(pid: int) -> tuple[int, ...] | None:
    """Return the version of the broker that is process ``pid``, ``None`` if it is not known."""
    program = _runnable(pid)
    return None if program is None else version_of(program)


def _runnable(pid: int) -> str | None:
    """Return the program of process ``pid`` if it may be run, else the one that is installed."""
    own = _program_of(pid) if pid else None
    if own is not None and _is_owned_by_root(own):
        return own
    return shutil.which("mosquitto", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


def version_of(
    program: str, run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run
) -> tuple[int, ...] | None:
    """Return the version that a Mosquitto program prints."""
    try:
        done = run([program, "-h"], capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.match(r"mosquitto version (\d+)\.(\d+)\.(\d+)", done.stdout)
    return tuple(int(number) for number in match.groups()) if match else None


def restart_warnings(version: tuple[int, ...], settings: Settings) -> list[Finding]:
    """Warn if new topics wait until somebody restarts the broker: a reload of this version harms sleeping sessions."""
    if version >= SAFE_RELOAD or settings.broker_restart:
        return []
    per_device = settings.acl_style is AclStyle.PER_DEVICE
    waiting = "each new device waits" if per_device else "each device with topics of its own waits for them"
    return [
        warning(
            f"Under the control by files {waiting} until Mosquitto {'.'.join(map(str, version))} is restarted, because"
            " a reload (SIGHUP) harms sleeping sessions: persistent ones that are not connected lose QoS 1 messages,"
            " and the broker may crash when they come back. PORTAL_BROKER_RESTART is not set.",
            "Set PORTAL_BROKER_RESTART, or install the guard. Mosquitto 2.1 does not have this fault.",
        )
    ]


def size_warnings(version: tuple[int, ...], style: AclStyle, devices: int) -> list[Finding]:
    """Warn if this version pauses noticeably while it reads an ACL of this size."""
    if style is AclStyle.PATTERN or version >= FAST_ACL or devices <= MAX_BLOCKS:
        return []
    return [
        warning(
            f"With {devices} devices Mosquitto {'.'.join(map(str, version))} takes long to read a"
            " per-device ACL at its start: a third of a second at 10,000, 40 s at 100,000.",
            "Install Mosquitto 2.1, or set PORTAL_ACL_STYLE=pattern.",
        )
    ]


def _connection_warnings(installation: Installation, devices: int) -> Iterator[Finding]:
    path = find_configuration(installation)
    if path is None:
        return
    try:
        listeners = read_configuration(path).listeners
    except (OSError, ValueError):
        return  # reported by another check
    for listener in listeners:
        limit = listener.options.get("max_connections", "")
        if _is_of_devices(listener, installation.settings) and limit.isdigit() and int(limit) < devices:
            yield warning(
                f"max_connections is {limit}, for {counted(devices, 'active device', 'active devices')}.",
                "Raise max_connections, and LimitNOFILE of its service.",
            )


def _program_of(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/exe").readlink())
    except OSError:
        return None


def _is_owned_by_root(program: str) -> bool:
    """Return whether only root can have installed the program, which is about to be run."""
    try:
        status = os.stat(program)
    except OSError:
        return False
    return status.st_uid == 0 and not status.st_mode & 0o022 and Path(program).name == "mosquitto"
