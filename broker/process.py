"""Makes the running broker read its files again, or start again: SIGHUP to its process, or the operator's command."""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

from broker.session import remaining
from config import Settings
from core.errors import BrokerUnavailable
from core.processors import on_any

log = logging.getLogger("portal.broker")

_MAX_LOGGED_BYTES = 2000


def signal_broker(pid_file: Path, listening: int) -> None:
    """Send SIGHUP to the broker named in ``pid_file``; raise ``BrokerUnavailable`` unless it is certainly the broker.

    ``listening`` is the process that answers on the internal listener, 0 if it is not visible here. Call this only once
    it has answered: SIGHUP kills a broker that is still starting. The process is held by a descriptor while it is
    examined, so a pid that was reused by another process meanwhile is never signalled.
    """
    pid = _read_pid(pid_file)
    if pid == 1 or not listening or (pid != listening and pid == _inner_pid(listening)):
        raise BrokerUnavailable(
            f"{pid_file} names process {pid}, which is the broker in a PID namespace of its own, as in a container: set"
            " PORTAL_BROKER_RELOAD to a command that signals it there, such as docker kill -s HUP NAME."
        )
    if pid != listening:
        raise BrokerUnavailable(
            f"{pid_file} names process {pid}, but process {listening} answers on the broker's internal listener;"
            " make PORTAL_BROKER_PID_FILE and PORTAL_BROKER_SOCKET those of one broker."
        )
    try:
        descriptor = os.pidfd_open(pid)
    except OSError as error:
        raise BrokerUnavailable(f"{pid_file} names process {pid}, which does not exist: start the broker.") from error
    try:
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
        if not name.startswith("mosquitto"):
            raise BrokerUnavailable(f"{pid_file} names process {pid}, which is not Mosquitto: start the broker.")
        signal.pidfd_send_signal(descriptor, signal.SIGHUP)
    except OSError as error:
        raise BrokerUnavailable(
            f"The broker (process {pid}) could not be signalled: {error.strerror};"
            " run it as the portal's user, or set PORTAL_BROKER_RELOAD to a command that may reload it."
        ) from error
    finally:
        os.close(descriptor)


def started_at(settings: Settings) -> float:
    """Return when the broker was started, in seconds of the epoch, 0 if it does not run: it makes its socket then."""
    try:
        return settings.broker_socket.stat().st_mtime
    except OSError:
        return 0.0


def run_command(variable: str, command: str, deadline: float) -> None:
    """Run the command of a setting, split as a shell would but without one; raise ``BrokerUnavailable`` if it fails."""
    try:
        with on_any():  # it may start the broker
            done = subprocess.run(  # noqa: S603 - the operator's own setting, and no shell
                shlex.split(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=remaining(deadline),
                check=False,
            )
    except (OSError, ValueError) as error:
        raise BrokerUnavailable(f"The command in {variable} could not be run; check its spelling.") from error
    except subprocess.TimeoutExpired as error:
        raise BrokerUnavailable(f"The command in {variable} did not end in time.") from error
    if done.stdout:
        log.debug("output of the command in %s: %s", variable, done.stdout[:_MAX_LOGGED_BYTES].decode(errors="replace"))
    if done.returncode != 0:
        raise BrokerUnavailable(
            f"The command in {variable} ended with status {done.returncode};"
            " run it by hand, its output is in the log at level debug."
        )


def _inner_pid(pid: int) -> int:
    """Return the number of a process in its own PID namespace (proc(5), NSpid), 0 if it is not known."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    found = re.search(r"^NSpid:.*\s(\d+)$", status, re.MULTILINE)
    return int(found[1]) if found else 0


def _read_pid(pid_file: Path) -> int:
    try:
        with pid_file.open("rb") as file:
            text = file.read(32).strip()
    except OSError as error:
        raise BrokerUnavailable(
            f"The broker's pid file {pid_file} cannot be read: {error.strerror};"
            " start the broker, or set PORTAL_BROKER_PID_FILE or PORTAL_BROKER_RELOAD."
        ) from error
    if not text.isdigit() or not 1 <= int(text) < 1 << 31:
        raise BrokerUnavailable(
            f"The broker's pid file {pid_file} does not contain a process id; start the broker again."
        )
    return int(text)
