"""Appraise verified claims by a policy with reference values (RFC 9334 §8.5), in the terms of CoRIM.

A policy is JSON; names of reference values are those of draft-ietf-rats-corim §5.1, in snake case: an environment's
``class`` says of which devices its measurements are, a measurement's ``mkey`` of which component, ``mval`` what it has
to be. Hashes are in lower-case hex, here cut short::

    {"mode": "require",
     "lifecycle": ["secured"],
     "debug": ["disabled-since-boot", "disabled-permanently", "disabled-fully-and-permanently"],
     "reference_values": [
       {"environment": {"class": {"class_id": "acbb11c7…"}},
        "measurements": [
          {"mkey": "BL", "mval": {"digests": ["sha-256:87428fc5…"]}},
          {"mkey": "PRoT", "mval": {"version": {"at_least": "1.3.5"}, "signer": "5378796f…"}}]},
       {"environment": {"class": {"vendor": "id:49424D00"}},
        "measurements": [{"mval": {"integrity_registers": {"sha256": {"0": ["…"], "7": ["…", "…"]}}}}]}]}
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from attestation.evidence import Claims, DebugStatus, EvidenceType, Lifecycle, SoftwareComponent

MAX_ENVIRONMENTS = 100
MAX_MEASUREMENTS = 100
MAX_ALTERNATIVES = 100
_MAX_PROBLEMS = 10
_CONFIG = ConfigDict(extra="forbid", frozen=True)
_SIZES = {64: "sha-256", 96: "sha-384", 128: "sha-512"}  # hex digits, and the name in IANA's registry (RFC 6920 §9.4)

Text = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Hex = Annotated[str, StringConstraints(pattern="^([0-9a-f]{2})+$", max_length=256)]
HashValue = Annotated[str, StringConstraints(pattern="^([0-9a-f]{64}|[0-9a-f]{96}|[0-9a-f]{128})$")]
DigestText = Annotated[
    str, StringConstraints(pattern="^(sha-256:[0-9a-f]{64}|sha-384:[0-9a-f]{96}|sha-512:[0-9a-f]{128})$")
]
PcrNumber = Annotated[str, StringConstraints(pattern="^(1?[0-9]|2[0-3])$")]


class PolicyMode(StrEnum):
    """What evidence decides: nothing and is not looked at, nothing but is recorded, or whether a device enrols."""

    OFF = "off"
    RECORD = "record"
    REQUIRE = "require"


class DeviceClass(BaseModel):
    """Of which devices reference values are: ``class_id`` is an implementation id or a hardware model, in hex."""

    model_config = _CONFIG
    class_id: Hex | None = None
    vendor: Text | None = None
    model: Text | None = None

    @model_validator(mode="after")
    def _names_something(self) -> DeviceClass:
        if self.class_id is None and self.vendor is None and self.model is None:
            raise ValueError("needs at least one of class_id, vendor and model")
        return self


class Environment(BaseModel):
    """The devices that reference values are for."""

    model_config = _CONFIG
    device_class: DeviceClass = Field(alias="class")


class Version(BaseModel):
    """A version that software must have, or the lowest one, compared number by number (1.10 is later than 1.9)."""

    model_config = _CONFIG
    version: Text | None = None
    at_least: Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}(\.[0-9]{1,9}){0,7}$")] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Version:
        if (self.version is None) == (self.at_least is None):
            raise ValueError("needs one of version and at_least")
        return self


class ReferenceValue(BaseModel):
    """What a component has to be; of several digests or register values one has to be there."""

    model_config = _CONFIG
    digests: list[DigestText] = Field(default=[], max_length=MAX_ALTERNATIVES)
    version: Version | None = None
    signer: HashValue | None = None
    integrity_registers: dict[
        Literal["sha256", "sha384", "sha512"],
        dict[PcrNumber, Annotated[list[HashValue], Field(min_length=1, max_length=MAX_ALTERNATIVES)]],
    ] = {}

    @model_validator(mode="after")
    def _demands_something(self) -> ReferenceValue:
        if not (self.digests or self.version or self.signer or any(self.integrity_registers.values())):
            raise ValueError("needs at least one of digests, version, signer and integrity_registers")
        return self


class Measurement(BaseModel):
    """The reference value of one component, which ``mkey`` names; registers belong to no component and have none."""

    model_config = _CONFIG
    mkey: Text | None = None
    mval: ReferenceValue

    @model_validator(mode="after")
    def _is_named(self) -> Measurement:
        of_software = bool(self.mval.digests or self.mval.version or self.mval.signer)
        if self.mkey is None and of_software:
            raise ValueError("needs mkey, the name of the software component that digests, version and signer are of")
        if self.mkey is not None and not of_software:
            raise ValueError("has an mkey, but no digests, version or signer of that component")
        return self


class ReferenceTriple(BaseModel):
    """The measurements that devices of one class must have; several with one ``mkey`` are alternatives."""

    model_config = _CONFIG
    environment: Environment
    measurements: list[Measurement] = Field(default=[], max_length=MAX_MEASUREMENTS)


class AppraisalPolicy(BaseModel):
    """What evidence has to say. An empty list demands nothing; components without reference value are not looked at."""

    model_config = _CONFIG
    mode: PolicyMode = PolicyMode.OFF
    types: list[EvidenceType] = Field(default=[], max_length=len(EvidenceType))
    lifecycle: list[Lifecycle] = Field(default=[], max_length=len(Lifecycle))
    debug: list[DebugStatus] = Field(default=[], max_length=len(DebugStatus))
    reference_values: list[ReferenceTriple] = Field(default=[], max_length=MAX_ENVIRONMENTS)
    on_renewal: bool = False  # whether a renewal needs new evidence


def appraise(policy: AppraisalPolicy, claims: Claims) -> tuple[str, ...]:
    """Return why verified claims do not satisfy the policy, in a few sentences, whatever its mode."""
    found = [*_state_problems(policy, claims), *_reference_problems(policy, claims)]
    return tuple(found[:_MAX_PROBLEMS])


def _state_problems(policy: AppraisalPolicy, claims: Claims) -> Iterator[str]:
    if policy.types and claims.type not in policy.types:
        yield f"Evidence of the type {claims.type} is not accepted."
    if policy.lifecycle and claims.lifecycle not in policy.lifecycle:
        wanted = " or ".join(policy.lifecycle)
        yield f"The security lifecycle is {claims.lifecycle or 'not stated'}; it has to be {wanted}."
    if policy.debug and claims.debug not in policy.debug:
        yield f"The debug status is {claims.debug or 'not stated'}; it has to be {' or '.join(policy.debug)}."


def _reference_problems(policy: AppraisalPolicy, claims: Claims) -> Iterator[str]:
    """Of the sets of reference values for the device's class one has to be satisfied; the first says what is wrong."""
    if not policy.reference_values:
        return
    candidates = [item for item in policy.reference_values if _is_of_class(item.environment.device_class, claims)]
    if not candidates:
        yield "No reference values are registered for this implementation."
        return
    results = [list(_measurement_problems(item, claims)) for item in candidates]
    if all(results):
        yield from results[0]


def _is_of_class(wanted: DeviceClass, claims: Claims) -> bool:
    pairs = (
        (wanted.class_id, claims.implementation),
        (wanted.vendor, claims.vendor),
        (wanted.model, claims.model),
    )
    return all(expected is None or expected == found for expected, found in pairs)


def _measurement_problems(triple: ReferenceTriple, claims: Claims) -> Iterator[str]:
    for key in dict.fromkeys(item.mkey for item in triple.measurements if item.mkey is not None):
        values = [item.mval for item in triple.measurements if item.mkey == key]
        components = [component for component in claims.software if component.name == key]
        if not components:
            yield f"The component {key} was not measured."
        # Each of several components of one name, so that a good one does not hide another.
        elif not all(any(_is_satisfied(value, component) for value in values) for component in components):
            yield f"The component {key} has another digest, version or signer than the reference values."
    for item in triple.measurements:
        yield from _register_problems(item.mval, claims)


def _is_satisfied(value: ReferenceValue, component: SoftwareComponent) -> bool:
    digest = f"{_SIZES.get(len(component.digest), '')}:{component.digest}"
    return (
        (not value.digests or digest in value.digests)
        and (value.signer is None or value.signer == component.signer)
        and (value.version is None or _is_version(value.version, component.version))
    )


def _is_version(wanted: Version, found: str) -> bool:
    if wanted.at_least is None:
        return found == wanted.version
    numbers = re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9}){0,7}", found)
    return bool(numbers) and _numbers(found) >= _numbers(wanted.at_least)


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version without zeros at its end: 1.0 is 1."""
    numbers = [int(number) for number in version.split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _register_problems(value: ReferenceValue, claims: Claims) -> Iterator[str]:
    for bank, registers in value.integrity_registers.items():
        for number, accepted in registers.items():
            found = claims.pcrs.get(bank, {}).get(int(number), "")
            if not found:
                yield f"PCR {number} of the bank {bank} was not quoted."
            elif found not in accepted:
                yield f"PCR {number} of the bank {bank} has a value that is none of the reference values."
