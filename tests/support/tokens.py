"""PKCS#11 tokens in software (SoftHSM2), each with a PIN in a file."""

from __future__ import annotations

import secrets
import subprocess
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
