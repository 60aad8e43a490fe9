"""TPMs in software, made for the test: they activate what the portal sends, and it verifies what they make."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import pytest

from attestation import refusals
from tests.support.attestation import case_of, recorded

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def made() -> Mapping[str, Mapping[str, Any]]:
    recorder = importlib.import_module("tests.attestation.record_tpm")  # needs tpm2-pytss
    found: Mapping[str, Mapping[str, Any]] = recorder.recordings()
    return found


@pytest.mark.parametrize("name", ["rsa-ek", "ecc-ek"])
def test_a_tpm_opens_its_credential_and_its_evidence_is_verified(name: str, made: Mapping[str, Any]) -> None:
    claims = case_of(made[name]).verify()
    assert claims.model == "swtpm"
    assert claims.attester != recorded(name).verify().attester


@pytest.mark.parametrize("name", ["rsa-ek", "ecc-ek"])
def test_what_another_tpm_made_is_refused(name: str, made: Mapping[str, Any]) -> None:
    case, other = case_of(made[name]), recorded(name)
    with pytest.raises(refusals.AnchorUnknown):
        case.verify(other.evidence)
    with pytest.raises(refusals.NonceMismatch):
        case.verify(other.evidence, anchors=other.anchors, now=other.now, public_key=other.public_key)
