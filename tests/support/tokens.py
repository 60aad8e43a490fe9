"""PKCS#11 tokens in software (SoftHSM2), each with a PIN in a file."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from core.pkcs11_uri import TokenUri

MODULE = next(
    (
        path
        for path in (Path("/usr/lib/softhsm/libsofthsm2.so"), Path("/usr/lib64/pkcs11/libsofthsm2.so"))
        if path.exists()
    ),
    Path("/usr/lib/softhsm/libsofthsm2.so"),
)
PIN = "4711-0815"
SO_PIN = "security officer"


@dataclass(frozen=True)
class SoftTokens:
    """A folder of tokens, which processes use that have ``environment``."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"SOFTHSM2_CONF": str(self.folder / "softhsm2.conf")}

    def set_up(self) -> SoftTokens:
        (self.folder / "tokens").mkdir(mode=0o700)
        configuration = f"directories.tokendir = {self.folder / 'tokens'}\nlog.level = ERROR\n"
        (self.folder / "softhsm2.conf").write_text(configuration)
        return self

    def create(self, label: str | None = None, *, pin: str = PIN, module: Path = MODULE) -> TokenUri:
        """Make a token, and a file with its PIN; returns its URI."""
        label = label or f"token {secrets.token_hex(4)}"
        self.run("softhsm2-util", "--init-token", "--free", "--label", label, "--pin", pin, "--so-pin", SO_PIN)
        file = self.folder / f"pin-{secrets.token_hex(4)}"
        file.touch(mode=0o600)
        file.write_text(f"{pin}\n")
        return TokenUri(module, file, token=label)

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, env={"PATH": "/usr/bin:/bin", **self.environment}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def tool(self, uri: TokenUri, *arguments: str) -> str:
        """Run OpenSC's tool on a token."""
        login = ["--token-label", str(uri.token), "--login", "--pin", uri.pin_file.read_text().strip()]
        return self.run("pkcs11-tool", "--module", str(MODULE), *login, *arguments)


def client_module() -> Path:
    """Return the module that reaches tokens through the socket in ``P11_KIT_SERVER_ADDRESS``."""
    places = [
        *Path("/usr/lib").glob("*/pkcs11/p11-kit-client.so"),
        *Path("/usr/lib64/pkcs11").glob("p11-kit-client.so"),
    ]
    return places[0] if places else Path("/usr/lib/pkcs11/p11-kit-client.so")


class TokenServer:
    """``p11-kit server`` before a folder of tokens: it can be killed, stopped and started like an HSM in a network."""

    def __init__(self, tokens: SoftTokens, folder: Path) -> None:
        self._tokens = tokens
        self._socket = folder / "pkcs11"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {"P11_KIT_SERVER_ADDRESS": f"unix:path={self._socket}"}

    def start(self) -> None:
        self._socket.unlink(missing_ok=True)
        command = [
            "p11-kit",
            "server",
            "--foreground",
            "--provider",
            str(MODULE),
            "--name",
            str(self._socket),
            "pkcs11:",
        ]
        self._process = subprocess.Popen(
            command,
            env={"PATH": "/usr/bin:/bin", **self._tokens.environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_until(self._accepts)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()
        self._process = None

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        if self._process is not None:
            self.resume()
            self.kill()

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)  # with the process of each connection

    def _accepts(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self._socket)) == 0


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Return once a condition holds; fail if it does not for long, also on a busy machine."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
