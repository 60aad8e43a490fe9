"""What a device does in its TPM: the portal verifies the evidence, and nothing stays loaded, whatever happens."""

from __future__ import annotations

import base64
import importlib
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from attestation import refusals
from attestation.anchors import Anchor
from attestation.evidence import Challenge, Claims
from attestation.tpm import challenge_ek, verify
from attestation.tpm_structures import read_public
from tests.support.deployment import ROOT
from tests.support.pki import Authority

pytestmark = pytest.mark.long

PCRS = "sha256:0,1,2,3,4,5,7,8,9,14"


@pytest.fixture(scope="module")
def enrol_tpm() -> ModuleType:
    spec = spec_from_file_location("enrol_tpm", ROOT / "device" / "enrol_tpm.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Tpm:
    """A TPM in software, and the portal that it asks."""

    tool: ModuleType
    support: ModuleType
    tcti: str
    anchor: Anchor
    challenge: Challenge

    def ask(self, certificate: bytes, chain: Sequence[bytes], attestation_key: bytes) -> tuple[bytes, bytes]:
        now = datetime.now(UTC)
        made = challenge_ek(self.challenge, certificate, chain, attestation_key, [self.anchor], now)
        return made.blob, made.secret

    def attest(self, key: bytes, ask: Callable[..., tuple[bytes, bytes]] | None = None) -> dict[str, Any]:
        evidence: dict[str, Any] = self.tool.attest(self.tcti, key, ask or self.ask, PCRS)
        return evidence

    def verify(self, evidence: dict[str, Any], key_of: dict[str, Any] | None = None) -> Claims:
        shown = base64.b64decode((key_of or evidence)["key_public"])
        key = read_public(shown, "The key").key
        return verify(json.dumps(evidence).encode(), self.challenge, key, [self.anchor], datetime.now(UTC))

    def loaded(self) -> int:
        loaded: int = self.support.loaded_in(self.tcti)
        return loaded


@pytest.fixture(scope="module", params=["rsa", "ecc"])
def tpms(request: pytest.FixtureRequest, enrol_tpm: ModuleType, tmp_path_factory: Any) -> Iterator[tuple[Tpm, Tpm]]:
    """Two TPMs of one CA."""
    support = importlib.import_module("tests.support.swtpm")  # needs tpm2-pytss
    folder: Path = tmp_path_factory.mktemp("tpm")
    options = ("--ecc",) if request.param == "ecc" else ()
    with support.software_tpm(folder, "one", *options) as one, support.software_tpm(folder, "other", *options) as other:
        issuer = x509.load_pem_x509_certificate((folder / support.ISSUER_CERTIFICATE).read_bytes())
        anchor = Anchor(issuer.public_bytes(Encoding.DER), True)
        made = [Tpm(enrol_tpm, support, tcti, anchor, Challenge(b"\x07" * 32)) for tcti in (one, other)]
        yield made[0], made[1]


def test_the_key_is_in_the_tpm_and_the_portal_verifies_its_evidence(tpms: tuple[Tpm, Tpm]) -> None:
    tpm, other = tpms
    key = tpm.tool.make_key(tpm.tcti)
    assert key.startswith(b"-----BEGIN TSS2 PRIVATE KEY-----")
    claims = tpm.verify(tpm.attest(key))
    assert claims.pcrs == {"sha256": dict.fromkeys(map(int, PCRS.partition(":")[2].split(",")), "00" * 32)}
    assert tpm.verify(tpm.attest(key)).attester == claims.attester
    assert other.verify(other.attest(other.tool.make_key(other.tcti))).attester != claims.attester
    assert (tpm.loaded(), other.loaded()) == (0, 0)


def test_evidence_of_one_tpm_with_the_key_of_another_is_refused(tpms: tuple[Tpm, Tpm]) -> None:
    shown, others = (tpm.attest(tpm.tool.make_key(tpm.tcti)) for tpm in tpms)
    with pytest.raises(refusals.KeyMismatch):
        tpms[0].verify(shown, key_of=others)
    with pytest.raises(refusals.KeyMismatch):
        tpms[0].verify(shown | {"key_public": others["key_public"]})


def test_a_tpm_does_not_load_the_key_of_another(tpms: tuple[Tpm, Tpm]) -> None:
    tpm, other = tpms
    with pytest.raises(tpm.tool.TpmError, match="cannot load the device's key"):
        tpm.attest(other.tool.make_key(other.tcti))
    assert tpm.loaded() == 0


def test_a_tpm_does_not_open_the_credential_of_another(tpms: tuple[Tpm, Tpm]) -> None:
    tpm, other = tpms
    seen: list[tuple[Any, ...]] = []

    def overhear(*shown: Any) -> tuple[bytes, bytes]:
        seen.append(shown)
        return other.ask(*shown)

    other.attest(other.tool.make_key(other.tcti), overhear)
    with pytest.raises(tpm.tool.TpmError, match="refused a command"):
        tpm.attest(tpm.tool.make_key(tpm.tcti), lambda *_: other.ask(*seen[0]))
    assert tpm.loaded() == 0


def test_nothing_stays_loaded_when_the_portal_cannot_be_asked(tpms: tuple[Tpm, Tpm]) -> None:
    def ask(*_: object) -> tuple[bytes, bytes]:
        raise OSError("no portal")

    tpm, _ = tpms
    with pytest.raises(OSError, match="no portal"):
        tpm.attest(tpm.tool.make_key(tpm.tcti), ask)
    assert tpm.loaded() == 0


def test_nothing_stays_loaded_when_the_tool_is_stopped(tpms: tuple[Tpm, Tpm], tmp_path: Path) -> None:
    tpm, _ = tpms
    (tmp_path / "token").write_text("en_any")
    (tmp_path / "ca.pem").write_bytes(Authority("A CA").certificate.public_bytes(Encoding.PEM))
    with socket.create_server(("127.0.0.1", 0)) as portal:
        url = f"https://127.0.0.1:{portal.getsockname()[1]}"
        command = [sys.executable, str(ROOT / "device" / "enrol"), "--dir", str(tmp_path / "device"), "--url", url]
        command += ["--ca", str(tmp_path / "ca.pem"), "--token-file", str(tmp_path / "token")]
        # A request is there already: to sign one with the key takes a resource manager, or a newer provider.
        (tmp_path / "device" / "next").mkdir(parents=True)
        (tmp_path / "device" / "next" / "device.key").write_bytes(tpm.tool.make_key(tpm.tcti))
        (tmp_path / "device" / "next" / "request.b64").write_text("AAAA")
        process = subprocess.Popen([*command, "--attest", "tpm", "--tcti", tpm.tcti], stderr=subprocess.DEVNULL)
        portal.settimeout(60)
        with portal.accept()[0]:  # it asks for a nonce, and its attestation key is loaded
            process.terminate()
            assert process.wait(60) == 75
    assert tpm.loaded() == 0


def test_a_pcr_that_the_tpm_does_not_have_is_named(tpms: tuple[Tpm, Tpm]) -> None:
    tpm, _ = tpms
    key = tpm.tool.make_key(tpm.tcti)
    with pytest.raises(tpm.tool.TpmError, match="no PCR 0 in the bank sha384"):
        tpm.tool.attest(tpm.tcti, key, tpm.ask, "sha384:0")
    assert tpm.loaded() == 0


def test_a_tpm_that_is_not_there_is_an_error_with_advice(tpms: tuple[Tpm, Tpm], tmp_path: Path) -> None:
    tpm = replace(tpms[0], tcti=f"swtpm:path={tmp_path}/none")
    with pytest.raises(tpm.tool.TpmError, match="check --tcti"):
        tpm.tool.make_key(tpm.tcti)
