"""TPMs in software, each with an endorsement key that a CA of their own has certified; needs swtpm and tpm2-pytss."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tpm2_pytss import ESAPI, TPM2_CAP, TPM2_HC, TSS2_Exception

CONFIGURATION = """create_certs_tool=/usr/share/swtpm/swtpm-localca
create_certs_tool_config={0}/localca.conf
create_certs_tool_options={0}/localca.options
"""
CA = "statedir = {0}/ca\nsigningkey = {0}/ca/key.pem\nissuercert = {0}/ca/issuer.pem\ncertserial = {0}/ca/serial\n"
OPTIONS = "--platform-manufacturer Example\n--platform-version 1\n--platform-model Example\n"
ROOT_CERTIFICATE = Path("ca", "swtpm-localca-rootca-cert.pem")
ISSUER_CERTIFICATE = Path("ca", "issuer.pem")


@contextmanager
def software_tpm(folder: Path, name: str, *options: str) -> Iterator[str]:
    """A new TPM whose endorsement key the CA in the folder has certified; its TCTI, for one client at a time."""
    state = folder / name
    for made in (state, folder / "ca"):
        made.mkdir(exist_ok=True)
    for file, text in (("setup.conf", CONFIGURATION), ("localca.conf", CA), ("localca.options", OPTIONS)):
        (folder / file).write_text(text.format(folder))
    setup: list[str | Path] = [
        "swtpm_setup",
        "--tpm2",
        "--tpmstate",
        state,
        "--create-ek-cert",
        "--pcr-banks",
        "sha256",
    ]
    subprocess.run([*setup, "--config", folder / "setup.conf", *options], check=True, stdout=subprocess.DEVNULL)
    path = state / "tpm"
    sockets = ["--server", f"type=unixio,path={path}", "--ctrl", f"type=unixio,path={path}.ctrl"]
    options = ("--tpmstate", f"dir={state}", "--flags", "not-need-init,startup-clear")
    process = subprocess.Popen(["swtpm", "socket", "--tpm2", *sockets, *options], stderr=subprocess.DEVNULL)
    try:
        _wait_for(f"swtpm:path={path}", process, path)
        yield f"swtpm:path={path}"
    finally:
        process.terminate()
        process.wait()


def _wait_for(tcti: str, process: subprocess.Popen[bytes], path: Path) -> None:
    """Wait until it answers; a connection that is only a test of a socket would be taken for its client."""
    while process.poll() is None:
        if all(socket.exists() for socket in (path, path.with_name("tpm.ctrl"))):
            with suppress(TSS2_Exception):  # it does not listen yet
                ESAPI(tcti).close()
                return
        time.sleep(0.02)
    raise RuntimeError(f"swtpm has ended with status {process.returncode}.")


@contextmanager
def resource_manager(tcti: str, folder: Path, environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """The TPM behind tpm2-abrmd on a message bus of its own, as several programs use one; the environment for them."""
    bus = ["dbus-daemon", "--session", "--nofork", "--nopidfile", f"--address=unix:path={folder}/bus"]
    found = {
        **environment,
        "DBUS_SESSION_BUS_ADDRESS": f"unix:path={folder}/bus",
        "TPM2TOOLS_TCTI": "tabrmd:bus_type=session",
    }
    manager = ["tpm2-abrmd", "--session", "--allow-root", f"--tcti={tcti}"]
    asked = [
        "dbus-send",
        "--session",
        "--print-reply",
        "--dest=org.freedesktop.DBus",
        "/",
        "org.freedesktop.DBus.GetNameOwner",
    ]
    with _running(bus, found) as first:
        while first.poll() is None and not (folder / "bus").exists():
            time.sleep(0.02)
        with _running(manager, found) as second:
            while second.poll() is None:
                owner = subprocess.run(
                    [*asked, "string:com.intel.tss2.Tabrmd"], env=found, capture_output=True, check=False
                )
                if owner.returncode == 0:
                    break
                time.sleep(0.02)
            yield found


@contextmanager
def _running(command: list[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def loaded_in(tcti: str) -> int:
    """How many objects and sessions are loaded."""
    kinds = (TPM2_HC.TRANSIENT_FIRST, TPM2_HC.HMAC_SESSION_FIRST, TPM2_HC.POLICY_SESSION_FIRST)
    with ESAPI(tcti) as tpm:
        found = [tpm.get_capability(TPM2_CAP.HANDLES, kind, 10)[1] for kind in kinds]  # what is in them lives as long
        return sum(len(capabilities.data.handles) for capabilities in found)
