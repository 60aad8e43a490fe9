"""Devices with a TPM in software: with evidence they enrol, publish with a key that never leaves the TPM, and renew."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.deployment import ROOT, Deployment, deployed, wait_until

pytestmark = [pytest.mark.system, pytest.mark.long]


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    """A portal where a device may renew from the first day on."""
    with deployed(PORTAL_RENEWAL_FROM="0") as running:
        running.wait_ready()
        yield running


@dataclass
class Device:
    """A device with a TPM, which several of its programs use, and the tool."""

    deployment: Deployment
    folder: Path
    environment: dict[str, str]
    ca: Path

    def enrol(self, *options: str, cut: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "device" / "enrol"), "--dir", str(self.folder / "enrolled")]
        command += ["--url", self.deployment.url, "--ca", str(self.deployment.data / "ca.pem"), "--serial", "sn-1"]
        return self._run(*command, "--attest", "tpm", *options, ENROL_CUT_OFF_AT=cut)

    def enrol_with(self, token: Token, cut: str = "") -> subprocess.CompletedProcess[str]:
        (self.folder / "token").write_text(token.secret)
        return self.enrol("--token-file", str(self.folder / "token"), "--pcrs", "sha256:0,7", cut=cut)

    def publish(self, topic: str, message: str) -> subprocess.CompletedProcess[str]:
        """Have mosquitto_pub publish with the key in the TPM, as the documents say."""
        files = {"--cafile": "ca.pem", "--cert": "device.pem", "--key": "device.key"}
        options = [word for option, name in files.items() for word in (option, str(self.current / name))]
        broker = ["-h", "localhost", "-p", str(self.deployment.mqtt_port), "-V", "mqttv5", "-i", self.id, "-q", "1"]
        openssl = {"OPENSSL_CONF": str(self.folder / "enrolled" / "openssl.cnf")}
        return self._run("mosquitto_pub", *broker, *options, "-t", topic, "-m", message, **openssl)

    def _run(self, *command: str, **others: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, "TPM2OPENSSL_TCTI": self.environment["TPM2TOOLS_TCTI"], **others}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)

    @property
    def current(self) -> Path:
        return self.folder / "enrolled" / "current"

    @property
    def id(self) -> str:
        command = [
            "openssl",
            "x509",
            "-in",
            str(self.current / "device.pem"),
            "-noout",
            "-subject",
            "-nameopt",
            "multiline",
        ]
        shown: str = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return shown.rpartition("= ")[2].strip()


@pytest.fixture(scope="module")
def devices(deployment: Deployment, tmp_path_factory: Any) -> Iterator[tuple[Device, Device]]:
    """Two devices, whose TPMs are of different makers."""
    support: ModuleType = importlib.import_module("tests.support.swtpm")  # needs tpm2-pytss
    with ExitStack() as stack:
        made = []
        for _ in range(2):
            folder: Path = tmp_path_factory.mktemp("device")
            tcti = stack.enter_context(support.software_tpm(folder, "tpm"))
            environment = stack.enter_context(support.resource_manager(tcti, folder, deployment.environment))
            made.append(Device(deployment, folder, environment, folder / support.ISSUER_CERTIFICATE))
        yield made[0], made[1]


@dataclass(frozen=True)
class Token:
    """An enrolment token, with the policy of the devices that have it."""

    secret: str
    path: str
    policy: dict[str, Any]


@pytest.fixture(scope="module")
def token(deployment: Deployment, devices: tuple[Device, Device]) -> Token:
    """It lets in devices with a TPM of the first device's maker."""
    policy = {"mode": "require", "types": ["tpm2"], "anchors": [devices[0].ca.read_text()], "on_renewal": True}
    answer = deployment.call("POST", "/enrolment-tokens", {"name": "a batch", "count": 9, "attestation": policy})
    assert answer.status_code == 201, answer.text
    made = answer.json()
    return Token(made["token"], f"/enrolment-tokens/{made['enrolment_token_id']}", policy)


def test_evidence_of_a_tpm_of_another_maker_or_with_another_tpm_s_key_is_refused(
    devices: tuple[Device, Device], token: Token
) -> None:
    device, other = devices
    done = other.enrol_with(token)
    assert done.returncode == 1, done
    assert "anchor" in done.stderr
    assert device.enrol_with(token, cut="request").returncode == -9
    own, others = (one.folder / "enrolled" / "next" for one in devices)
    kept = {name: (own / name).read_bytes() for name in ("request.b64", "device.key")}
    (own / "request.b64").write_bytes((others / "request.b64").read_bytes())
    done = device.enrol_with(token)
    assert done.returncode == 1, done
    assert "another key than that of the CSR" in done.stderr
    (own / "device.key").write_bytes((others / "device.key").read_bytes())
    done = device.enrol_with(token)
    assert done.returncode == 75, done
    assert "cannot load the device's key" in done.stderr
    for name, content in kept.items():
        (own / name).write_bytes(content)


def test_a_device_enrols_publishes_and_renews_with_a_key_in_its_tpm(
    deployment: Deployment, devices: tuple[Device, Device], token: Token
) -> None:
    device, _ = devices
    assert device.enrol_with(token, cut="answer").returncode == -9  # it has a certificate then, and does not know it
    done = device.enrol_with(token)
    assert done.returncode == 0, done.stderr
    assert (device.current / "device.key").read_text().startswith("-----BEGIN TSS2 PRIVATE KEY-----")
    watcher = deployment.add_application("a watcher", "devices/#:read").client()
    assert watcher.subscribe(f"devices/{device.id}/#") == "Granted QoS 1"
    for number in ("1", "2"):
        done = device.publish(f"devices/{device.id}/up", number)
        assert done.returncode == 0, done.stderr
        assert watcher.messages.get(timeout=20) == (f"devices/{device.id}/up", number.encode())
        before = (device.current / "device.pem").read_text()
        done = device.enrol("--renew")
        assert done.returncode == 0, done.stderr
        assert (device.current / "device.pem").read_text() != before
    watcher.close()


def test_a_device_is_marked_that_a_tightened_policy_would_refuse(
    deployment: Deployment, devices: tuple[Device, Device], token: Token
) -> None:
    """It has enrolled in the test before, and has shown the values of no PCRs when it renewed."""
    device, _ = devices

    def verdict() -> str:
        return str(deployment.call("GET", f"/devices/{device.id}").json()["attestation"]["verdict"])

    assert verdict() == "passed"
    measurement = {"mval": {"integrity_registers": {"sha256": {"0": ["11" * 32]}}}}
    values = [{"environment": {"class": {"model": "swtpm"}}, "measurements": [measurement]}]
    changed = deployment.call("PATCH", token.path, {"attestation": {**token.policy, "reference_values": values}})
    assert changed.status_code == 200, changed.text
    wait_until(lambda: verdict() == "outdated")
    [marked] = deployment.call("GET", "/devices?attested=outdated").json()["devices"]
    assert marked["device_id"] == device.id
    done = device.enrol("--renew", "--pcrs", "sha256:0")
    assert done.returncode == 1, done
    assert "PCR 0" in done.stderr
