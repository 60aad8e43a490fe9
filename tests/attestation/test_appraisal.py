"""What the appraisal policy demands of verified claims."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from attestation import refusals
from attestation.appraisal import AppraisalPolicy, appraise
from attestation.evidence import Challenge, Claims, DebugStatus, EvidenceType, Lifecycle, SoftwareComponent
from attestation.refusals import AppraisalFailed, NonceMismatch
from attestation.verification import AttestationResult, Evidence, attest
from core.errors import AttestationRefused
from tests.support.attestation import NOW, Maker

BOOT = SoftwareComponent("BL", "1.9", "11" * 32, "aa" * 32)
ROOT = SoftwareComponent("PRoT", "1.10.2", "22" * 48, "bb" * 32)
CLAIMS = Claims(
    type=EvidenceType.PSA,
    implementation="ac" * 32,
    lifecycle=Lifecycle.SECURED,
    debug=DebugStatus.DISABLED,
    software=(BOOT, ROOT),
)
TPM = Claims(type=EvidenceType.TPM, vendor="id:49424D00", model="SLB", pcrs={"sha256": {0: "01" * 32, 7: "02" * 32}})
CLASS = {"class": {"class_id": "ac" * 32}}


def policy(*measurements: dict[str, Any], environment: Any = None, **fields: Any) -> AppraisalPolicy:
    triple = {"environment": environment or CLASS, "measurements": list(measurements)}
    return AppraisalPolicy.model_validate({"mode": "require", "reference_values": [triple]} | fields)


def problems(wanted: AppraisalPolicy, claims: Claims = CLAIMS) -> tuple[str, ...]:
    return appraise(wanted, claims)


# --- Modes ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maker() -> Maker:
    return Maker()


def attested(maker: Maker, demand: dict[str, Any], **changes: Any) -> AttestationResult:
    """Send the maker's PSA token to somebody with this policy."""
    case = maker.case(EvidenceType.PSA)
    evidence = Evidence(case.type, case.evidence)
    given = {"challenge": case.challenge, "public_key": case.public_key, "anchors": case.anchors, "now": NOW} | changes
    return attest(AppraisalPolicy.model_validate(demand), evidence, **given)


def test_require_refuses_what_record_only_notes(maker: Maker) -> None:
    demand = {"lifecycle": ["decommissioned"]}
    noted = attested(maker, demand | {"mode": "record"})
    assert (noted.passed, noted.code) == (False, "attestation_policy_failed")
    assert noted.claims is not None
    with pytest.raises(AppraisalFailed, match="security lifecycle is secured; it has to be decommissioned"):
        attested(maker, demand | {"mode": "require"})


def test_evidence_that_does_not_verify_is_noted_or_refused(maker: Maker) -> None:
    noted = attested(maker, {"mode": "record"}, challenge=Challenge(b"\x01" * 32))
    assert (noted.passed, noted.code, noted.claims) == (False, "attestation_nonce_mismatch", None)
    assert noted.problems == ("The evidence was not made for this nonce and the key of the CSR.",)
    with pytest.raises(NonceMismatch):
        attested(maker, {"mode": "require"}, challenge=Challenge(b"\x01" * 32))


@pytest.mark.parametrize("mode", ["record", "require"])
def test_what_is_satisfied_passes(mode: str, maker: Maker) -> None:
    result = attested(maker, {"mode": mode, "lifecycle": ["secured"]})
    assert (result.passed, result.problems) == (True, ())
    assert result.evidence.digest == hashlib.sha256(result.evidence.content).hexdigest()


# --- States --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("demand", "passes"),
    [
        ({"types": ["psa"]}, True),
        ({"types": ["tpm2"]}, False),
        ({"lifecycle": ["secured", "non-psa-rot-debug"]}, True),
        ({"lifecycle": ["non-psa-rot-debug"]}, False),
        ({"debug": ["disabled", "disabled-since-boot"]}, True),
        ({"debug": ["disabled-permanently"]}, False),
    ],
)
def test_states_have_to_be_one_of_those_listed(demand: dict[str, Any], passes: bool) -> None:
    assert (not appraise(AppraisalPolicy.model_validate(demand), CLAIMS)) is passes


def test_what_is_not_stated_does_not_satisfy() -> None:
    wanted = AppraisalPolicy.model_validate({"lifecycle": ["secured"], "debug": ["disabled"]})
    assert problems(wanted, TPM) == (
        "The security lifecycle is not stated; it has to be secured.",
        "The debug status is not stated; it has to be disabled.",
    )


# --- Reference values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "passes"),
    [
        ({"class": {"class_id": "ac" * 32}}, True),
        ({"class": {"class_id": "ad" * 32}}, False),
        ({"class": {"class_id": "ac" * 32, "vendor": "other"}}, False),
    ],
)
def test_an_implementation_without_reference_values_is_not_accepted(environment: Any, passes: bool) -> None:
    assert (not appraise(policy(environment=environment), CLAIMS)) is passes


@pytest.mark.parametrize(
    ("value", "passes"),
    [
        ({"digests": ["sha-256:" + "11" * 32]}, True),
        ({"digests": ["sha-256:" + "12" * 32, "sha-256:" + "11" * 32]}, True),
        ({"digests": ["sha-256:" + "12" * 32]}, False),
        ({"digests": ["sha-384:" + "11" * 48]}, False),
        ({"signer": "aa" * 32}, True),
        ({"signer": "bb" * 32}, False),
        ({"version": {"version": "1.9"}}, True),
        ({"version": {"version": "1.9.0"}}, False),
        ({"version": {"at_least": "1.9"}}, True),
        ({"version": {"at_least": "1.9.0"}}, True),
        ({"version": {"at_least": "1.10"}}, False),
        ({"digests": ["sha-256:" + "11" * 32], "version": {"at_least": "2"}}, False),
    ],
)
def test_a_component_has_to_be_as_its_reference_value(value: dict[str, Any], passes: bool) -> None:
    assert (not appraise(policy({"mkey": "BL", "mval": value}), CLAIMS)) is passes


def test_versions_are_compared_number_by_number() -> None:
    assert not problems(policy({"mkey": "PRoT", "mval": {"version": {"at_least": "1.9.9"}}}))
    text = SoftwareComponent("BL", "v2-beta", "11" * 32)
    wanted = policy({"mkey": "BL", "mval": {"version": {"at_least": "1"}}})
    assert problems(wanted, Claims(type=EvidenceType.PSA, implementation="ac" * 32, software=(text,)))


def test_several_reference_values_of_a_component_are_alternatives() -> None:
    good, other = ({"mkey": "BL", "mval": {"digests": [f"sha-256:{digest * 32}"]}} for digest in ("11", "33"))
    assert not problems(policy(other, good))
    assert problems(policy(other, {"mkey": "PRoT", "mval": {"signer": "bb" * 32}}))


def test_several_environments_of_a_class_are_alternatives() -> None:
    triples = [
        {"environment": CLASS, "measurements": [{"mkey": "BL", "mval": {"signer": f"{signer * 32}"}}]}
        for signer in ("cc", "aa")
    ]
    both = AppraisalPolicy.model_validate({"reference_values": triples})
    assert not problems(both)
    assert problems(AppraisalPolicy.model_validate({"reference_values": triples[:1]}))


def test_a_component_that_was_not_measured_is_missing() -> None:
    assert problems(policy({"mkey": "App", "mval": {"signer": "aa" * 32}})) == ("The component App was not measured.",)


def test_a_good_component_hides_no_other_of_its_name() -> None:
    twice = Claims(
        type=EvidenceType.PSA,
        implementation="ac" * 32,
        software=(BOOT, SoftwareComponent("BL", "1.9", "99" * 32, "aa" * 32)),
    )
    assert problems(policy({"mkey": "BL", "mval": {"digests": ["sha-256:" + "11" * 32]}}), twice)


def test_pcrs_have_to_have_one_of_their_values() -> None:
    environment = {"class": {"vendor": "id:49424D00"}}

    def wanted(registers: dict[str, list[str]]) -> AppraisalPolicy:
        return policy({"mval": {"integrity_registers": {"sha256": registers}}}, environment=environment)

    assert not problems(wanted({"0": ["ff" * 32, "01" * 32], "7": ["02" * 32]}), TPM)
    assert problems(wanted({"0": ["02" * 32]}), TPM) == (
        "PCR 0 of the bank sha256 has a value that is none of the reference values.",
    )
    assert problems(wanted({"4": ["02" * 32]}), TPM) == ("PCR 4 of the bank sha256 was not quoted.",)


def test_the_problems_are_a_few_at_most() -> None:
    many = [{"mkey": f"part {number}", "mval": {"signer": "aa" * 32}} for number in range(50)]
    assert len(problems(policy(*many))) == 10


# --- The policy as JSON ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        {"mode": "sometimes"},
        {"lifecycle": ["fine"]},
        {"unknown": 1},
        {"reference_values": [{"environment": {}}]},
        {"reference_values": [{"environment": {"class": {}}}]},
        {"reference_values": [{"environment": {"class": {"class_id": "AC"}}}]},
        {"reference_values": [{"environment": CLASS, "measurements": [{"mkey": "BL", "mval": {}}]}]},
        {"reference_values": [{"environment": CLASS, "measurements": [{"mval": {"signer": "aa" * 32}}]}]},
        {"reference_values": [{"environment": CLASS, "measurements": [{"mkey": "BL", "mval": {"signer": "aa"}}]}]},
        {"reference_values": [{"environment": CLASS, "measurements": [{"mkey": "a", "mval": {"digests": ["aa"]}}]}]},
        {"reference_values": [{"environment": CLASS, "measurements": [{"mkey": "a", "mval": {"version": {}}}]}]},
        {"reference_values": [{"environment": CLASS, "measurements": [
            {"mval": {"integrity_registers": {"sha256": {"24": ["aa" * 32]}}}}]}]},
        {"reference_values": [{"environment": CLASS, "measurements": [
            {"mval": {"integrity_registers": {"sha1": {"0": ["aa" * 32]}}}}]}]},
        {"reference_values": [{"environment": CLASS, "measurements": [
            {"mkey": "BL", "mval": {"integrity_registers": {"sha256": {"0": ["aa" * 32]}}}}]}]},
        {"reference_values": [{"environment": CLASS}] * 101},
    ],
)  # fmt: skip
def test_a_policy_that_cannot_be_meant_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AppraisalPolicy.model_validate(value)


def test_a_policy_is_the_same_after_a_round_through_json() -> None:
    made = policy({"mkey": "BL", "mval": {"digests": ["sha-256:" + "11" * 32]}}, lifecycle=["secured"], on_renewal=True)
    assert AppraisalPolicy.model_validate_json(made.model_dump_json(by_alias=True)) == made


def test_every_code_is_explained() -> None:
    explained = (Path(__file__).parents[2] / "docs" / "attestation.md").read_text()
    codes = {
        one.code for one in vars(refusals).values() if isinstance(one, type) and issubclass(one, AttestationRefused)
    }
    assert not [code for code in codes - {AttestationRefused.code} if f"`{code}`" not in explained]
