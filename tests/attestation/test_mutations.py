"""Whatever is changed in evidence, it is refused by name, or it says the same as before."""

from __future__ import annotations

import base64
import json
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest

from attestation.evidence import EvidenceType
from core.errors import AttestationRefused
from tests.support.attestation import Case, Maker, SoftwareTpm, recorded
from tests.support.mutations import mutated

ALL = os.environ.get("PORTAL_TEST_ALL") == "yes"
TOKENS = [EvidenceType.EAT_JWT, EvidenceType.EAT_CWT, EvidenceType.PSA]
# What is not under a signature: certificates repeat their algorithm outside of what was signed.
UNSIGNED = ("ak_certificate", "ek_certificate", "intermediates")


def flips(content: bytes) -> Iterator[bytes]:
    """The content with one bit of each byte changed, or with each bit in a long run."""
    for at in range(len(content)):
        for bit in range(8) if ALL else (at % 8,):
            yield content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]


def is_refused(case: Case, evidence: bytes) -> bool:
    try:
        claims = case.verify(evidence)
    except AttestationRefused:
        return True
    assert claims == case.verify()
    return False


@pytest.mark.parametrize("kind", TOKENS)
def test_a_token_with_any_bit_changed_is_refused(kind: EvidenceType) -> None:
    case = Maker().case(kind)
    assert all(is_refused(case, evidence) for evidence in flips(case.evidence))


def test_an_unprotected_header_with_any_bit_changed_has_no_effect_on_the_claims() -> None:
    maker = Maker()
    case, with_key_id = maker.case(EvidenceType.PSA), maker.psa(unprotected={4: b"a key id that no anchor has"})
    assert not all(is_refused(case, evidence) for evidence in flips(with_key_id))


def structures(shown: dict[str, Any]) -> Iterator[tuple[list[Any], bytes]]:
    for name, value in shown.items():
        if isinstance(value, str):
            yield [name], base64.b64decode(value)
        if name == "quote":
            yield [name, "attested"], base64.b64decode(value["attested"])
            yield [name, "signature"], base64.b64decode(value["signature"])


def replaced(shown: dict[str, Any], path: list[Any], content: bytes) -> bytes:
    copy = json.loads(json.dumps(shown))
    inner = copy[path[0]] if len(path) == 2 else copy
    inner[path[-1]] = base64.b64encode(content).decode()
    return json.dumps(copy).encode()


def check_structures(case: Case) -> None:
    shown = json.loads(case.evidence)
    # The certificate of an attestation key vouches for its restriction, not for its other attributes.
    unsigned = (*UNSIGNED, "ak_public") if "ak_certificate" in shown else UNSIGNED
    for path, content in structures(shown):
        for changed in flips(content):
            refused = is_refused(case, replaced(shown, path, changed))
            assert refused or path[0] in unsigned, path


def test_a_tpm_structure_with_any_bit_changed_is_refused() -> None:
    tpm = SoftwareTpm()
    check_structures(tpm.case(tpm.evidence(quote=tpm.quote({0: bytes(32)}))))


@pytest.mark.long
@pytest.mark.parametrize("name", ["rsa-ek", "ecc-ek"])
def test_evidence_of_a_real_tpm_with_any_bit_changed_is_refused(name: str) -> None:
    check_structures(recorded(name))


@pytest.mark.parametrize("kind", EvidenceType)
def test_mutated_evidence_is_refused_by_name_or_says_the_same(kind: EvidenceType) -> None:
    rng = random.Random(int(os.environ.get("PORTAL_TEST_SEED", "1")))  # noqa: S311 - repeatable, not secret
    case = SoftwareTpm().case() if kind is EvidenceType.TPM else Maker().case(kind)
    rounds = 20_000 if ALL else 300
    assert sum(is_refused(case, mutated(rng, case.evidence)) for _ in range(rounds)) > rounds * 0.9
