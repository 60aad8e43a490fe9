"""A nonce is spent once however many present it, and a change of a policy reaches every result, on each database."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from attestation.evidence import EvidenceType
from attestation.refusals import NonceSpent
from core.errors import AttestationRefused
from core.states import AttestationVerdict
from operations.wiring import Portal
from store import attestation, audit
from store.attestation import AttestationRecord, PolicyRecord
from store.counts import counts_of
from tests.test_db import add_device
from workflows.attestation import reappraisal
from workflows.attestation.nonces import NonceHolder

HOLDER = NonceHolder.of_token("default", "1" * 16, is_one_device=False)


def test_of_those_that_present_a_nonce_at_once_one_is_heard(portal: Portal) -> None:
    nonce = portal.nonces.issue(HOLDER).nonce

    def present(_: int) -> str:
        try:
            portal.nonces.spend(HOLDER, nonce)
        except AttestationRefused as refusal:
            return refusal.code
        return "good"

    with ThreadPoolExecutor(6) as pool:
        found = sorted(pool.map(present, range(6)))
    assert found == [*[NonceSpent.code] * 5, "good"]


def test_a_change_of_a_policy_reaches_every_result_in_batches(portal: Portal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reappraisal, "BATCH", 2)
    monkeypatch.setattr(reappraisal, "MOST_AT_ONCE", 4)
    now = portal.clock()
    with portal.database.transaction() as tx:
        attestation.add_policy(tx, PolicyRecord("0" * 16, "default", 1, {"mode": "require"}, [], now))
        for _ in range(5):
            device_id = add_device(tx)
            attestation.put_attestation(
                tx,
                AttestationRecord(
                    device_id=device_id,
                    tenant_id="default",
                    policy_id="0" * 16,
                    policy_version=1,
                    type=EvidenceType.PSA,
                    verdict=AttestationVerdict.PASSED,
                    code="",
                    problems=[],
                    claims={"type": "psa", "lifecycle": "secured"},
                    evidence_digest="0" * 64,
                    key_fingerprint="0" * 64,
                    appraised_at=now,
                ),
            )
    assert portal.reappraisals.run() == 0
    with portal.database.transaction() as tx:
        policy = {"mode": "require", "lifecycle": ["decommissioned"]}
        attestation.replace_policy(tx, "default", "0" * 16, policy, [], now=now)
    with portal.database.snapshot() as tx:
        stale = attestation.results_of_older_policies(tx, limit=5)
    assert [portal.reappraisals.run() for _ in range(3)] == [4, 1, 0]
    with portal.database.transaction() as tx:
        portal.reappraisals._appraise(tx, stale)  # as by another process, which read them before
    with portal.database.snapshot() as tx:
        assert counts_of(tx, now=now, within=[timedelta(days=1)])["default"].attested == {"outdated": 5}
        told = audit.list_audit_entries(tx, "default", limit=9, filters={"action": "attestation:reappraise"})
    assert sorted(entry.detail["devices"] for entry in told) == [1, 2, 2]
