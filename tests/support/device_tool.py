"""A device that has nothing but its own tool, with openssl beside it to judge what it has."""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.support.deployment import ROOT, Client, Deployment, Onboarded


@dataclass
class Device:
    """A device that has nothing but ``device/enrol``, and openssl beside it to judge what it has."""

    deployment: Deployment
    folder: Path
    id: str = ""

    def enrol(self, *options: str) -> int:
        """Run the tool; returns its exit status."""
        command = [str(ROOT / "device" / "enrol"), "--dir", str(self.folder), "--url", self.deployment.url]
        command += ["--ca", str(self.deployment.data / "ca.pem"), "--serial", "sn-7", *options]
        environment = self.deployment.environment
        return subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False).returncode

    def keep(self, name: str) -> Path:
        """A copy of the certificate and key that it has now."""
        for kind in ("key", "pem"):
            (self.folder / f"{name}.{kind}").write_bytes((self.folder / "current" / f"device.{kind}").read_bytes())
        return self.folder / f"{name}.pem"

    def connect(self) -> Client:
        """An MQTT client with what the tool has put in ``current``."""
        chain = self.folder / "current" / "chain.pem"
        if not chain.exists():
            chain.symlink_to("device.pem")
        return self._onboarded().client()

    def refusal(self) -> str:
        return self._onboarded().refusal()

    def _onboarded(self) -> Onboarded:
        return Onboarded(self.id, self.folder / "current", self.deployment.mqtt_port)

    def openssl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["openssl", *arguments], cwd=self.folder, capture_output=True, text=True, timeout=20, check=False
        )

    def verdict(self, certificate: Path) -> str:
        """What OCSP and the CRL say of a certificate, both fetched over HTTP and checked by openssl: the same word."""
        url, ca = self.deployment.pki_url, str(self.deployment.data / "ca.pem")
        uris = self.openssl(
            "x509", "-in", str(certificate), "-noout", "-ext", "crlDistributionPoints,authorityInfoAccess"
        )
        crl_url, issuer_url = (re.search(rf"URI:(\S+\.{end})", uris.stdout) for end in ("crl", "cer"))
        assert crl_url is not None
        assert issuer_url is not None
        places = {"issuing.crl": crl_url[1], "issuing.cer": issuer_url[1], "root.crl": f"{url}/crl/root.crl"}
        for name, address in places.items():
            fetch = ["curl", "-sS", "--fail", "--noproxy", "*", "-o", name, address]
            subprocess.run(fetch, cwd=self.folder, check=True, timeout=20)
        self.openssl("x509", "-inform", "DER", "-in", "issuing.cer", "-out", "issuing.pem")
        for name in ("issuing", "root"):
            self.openssl("crl", "-inform", "DER", "-in", f"{name}.crl", "-out", f"{name}.crl.pem")
        asked = self.openssl(
            *("ocsp", "-issuer", "issuing.pem", "-CAfile", ca, "-url", f"{url}/ocsp", "-cert", str(certificate))
        )
        assert "Response verify OK" in asked.stderr, asked.stderr
        said = [line.split(": ")[-1].strip() for line in asked.stdout.splitlines() if line.startswith(str(certificate))]
        reason = re.search(r"Reason: (\w+)", asked.stdout)
        checked = self.openssl(
            *("verify", "-CAfile", ca, "-crl_check_all", "-CRLfile", "issuing.crl.pem", "-CRLfile", "root.crl.pem"),
            str(certificate),
        )
        on_crl = "certificate revoked" in checked.stderr
        assert on_crl or checked.returncode == 0, checked.stderr
        assert said == ["revoked" if on_crl else "good"], "OCSP and the CRL differ"
        return said[0] if reason is None else reason[1]


@dataclass
class Connection:
    """A TLS connection to the portal with a device's certificate, kept open or resumed later."""

    deployment: Deployment
    context: ssl.SSLContext

    def open(self, session: ssl.SSLSession | None = None) -> ssl.SSLSocket:
        host, port = self.deployment.url.removeprefix("https://").split(":")
        plain = socket.create_connection((host, int(port)), timeout=20)
        return self.context.wrap_socket(plain, server_hostname=host, session=session)

    def ask(self, connection: ssl.SSLSocket, path: str, body: bytes = b"") -> int:
        head = [f"{'POST' if body else 'GET'} /.well-known/est/{path} HTTP/1.1", "Host: portal"]
        head += ["Content-Type: application/pkcs10", f"Content-Length: {len(body)}"] if body else []
        connection.sendall("\r\n".join([*head, "", ""]).encode() + body)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        answer.read()
        return answer.status
