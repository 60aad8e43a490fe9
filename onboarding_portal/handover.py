"""The text that is passed on to who sets up a device: the link, and the commands that fetch and open its bundle.

The command line prints it, and the console shows it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


def base_of(link: str) -> str:
    """Return the portal's URL in a download link."""
    return link.rpartition("/download/")[0]


@dataclass(frozen=True, slots=True)
class Trust:
    """How somebody without an account verifies the portal: by ``fingerprint``, by a file, or as any web server."""

    fingerprint: str | None = None
    ca_file: Path | None = None

    @property
    def option(self) -> str:
        """Return the option of ``portal download``, with a blank before it."""
        if self.fingerprint is not None:
            return f" --fingerprint {self.fingerprint}"
        return "" if self.ca_file is None else f" --ca-file {shlex.quote(self.ca_file.name)}"


def text_to_pass_on(link: str, file: str, trust: Trust, *, name: str, until: str) -> Sequence[str]:
    """Return the lines to pass on: the link, and what to do with it, never the password.

    ``file`` is what the bundle is to be called, ``until`` when the link ends.
    """
    lines = [
        f"Credentials of {name}, to be fetched once, until {until}:",
        link,
        "",
        "The password comes by another way. In a browser the link says what to do,",
        "and is used up by the button there alone. With the portal command:",
        "",
        f"  portal download {shlex.quote(link)}{trust.option}",
        "",
        f"Without it, with {_tools(trust, file)}:",
        "",
        *(f"  {line}" for line in by_hand(link, file, trust)),
    ]
    if trust.fingerprint is not None:
        lines += ["", "SHA-256 fingerprint of the portal's root certificate:", trust.fingerprint]
    return lines


def _tools(trust: Trust, file: str) -> str:
    opener, checks = "openssl" if file.endswith(".p12") else "7z", trust.fingerprint is not None
    tools = ["curl", *(["sha256sum", "openssl"] if checks else []), opener]
    return f"{', '.join(dict.fromkeys(tools[:-1]))} and {opener}, which asks for the password"


def by_hand(link: str, file: str, trust: Trust) -> list[str]:
    """Return the lines of one shell command that fetches a bundle and opens it, without the portal's own command."""
    folder, quoted = file.rpartition(".")[0], shlex.quote(link)
    lines, verify = [], ""
    if trust.fingerprint is not None:
        root = f"{base_of(link)}/ca/{trust.fingerprint}.cer"
        lines = [
            f"curl -fsSk {shlex.quote(root)} -o root.cer &&",
            f"echo '{trust.fingerprint}  root.cer' | sha256sum -c &&",
            "openssl x509 -inform DER -in root.cer -out root.pem &&",
        ]
        verify = " --cacert root.pem"
    elif trust.ca_file is not None:
        verify = f" --cacert {shlex.quote(trust.ca_file.name)}"
    in_p12 = file.endswith(".p12")
    opened = f"openssl pkcs12 -in {file} -out {folder}.pem" if in_p12 else f"7z x -o{folder} {file}"
    return [*lines, f"curl -fsS{verify} {quoted} -o {file} &&", opened]
