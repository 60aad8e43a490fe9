"""The use case of a changed policy: kept claims are appraised again, and devices marked that would fail now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Connection

from attestation.appraisal import PolicyMode, appraise
from attestation.refusals import AppraisalFailed
from core.states import AttestationVerdict
from store import attestation, audit
from store.attestation import AttestationRecord
from store.database import Database
from workflows import events
from workflows.attestation.appraisal import claims_of
from workflows.attestation.policies import RegisteredPolicy
from workflows.events import EventType

BATCH, MOST_AT_ONCE = 200, 1000  # some seconds' work: other jobs, in the same thread, wait for it


@dataclass(eq=False, repr=False)
class Reappraisals:
    """Appraises kept claims by the newest version of their policy; freshness and signatures were checked when shown."""

    _database: Database
    _clock: Callable[[], datetime]

    def run(self) -> int:
        """Appraise what a change of a policy concerns, in batches; return how many devices that were.

        Of many devices the later runs have the rest.
        """
        done = 0
        while done < MOST_AT_ONCE:
            with self._database.snapshot() as tx:
                found = attestation.results_of_older_policies(tx, limit=BATCH)
            if not found:
                return done
            with self._database.transaction() as tx:
                self._appraise(tx, found)
            done += len(found)
        return done

    def _appraise(self, tx: Connection, found: Sequence[AttestationRecord]) -> None:
        now = self._clock()
        changes: Counter[tuple[str, str, int, str]] = Counter()
        for tenant_id in sorted({record.tenant_id for record in found}):
            own = [record for record in found if record.tenant_id == tenant_id]
            records = attestation.policies_by_id(tx, tenant_id, sorted({record.policy_id for record in own}))
            policies = {policy_id: RegisteredPolicy.of(record) for policy_id, record in records.items()}
            for record in own:
                policy = policies[record.policy_id]
                values = _appraised(record, policy)
                if not attestation.update_attestation(tx, record, policy_version=policy.version, **values):
                    continue  # newer evidence came, or another process was faster
                if values.get("verdict") is AttestationVerdict.OUTDATED is not record.verdict:
                    _announce(tx, record, values, now)
                if values.get("verdict", record.verdict) is not record.verdict:
                    changes[tenant_id, policy.id, policy.version, values["verdict"]] += 1
        for (tenant_id, policy_id, version, verdict), count in sorted(changes.items()):
            of, actor = f"attestation_policy:{policy_id}", audit.system_actor(tenant_id)
            told: dict[str, Any] = {"version": version, "verdict": verdict, "devices": count}
            audit.record(tx, actor, "attestation:reappraise", of, at=now, **told)


def _appraised(record: AttestationRecord, policy: RegisteredPolicy) -> dict[str, Any]:
    """Return what changes of a result; nothing while the policy looks at none, or for another reason than it."""
    claims = claims_of(record)
    appraised = record.code in ("", AppraisalFailed.code)
    if claims is None or not appraised or policy.appraisal.mode is PolicyMode.OFF:
        return {}
    problems = list(appraise(policy.appraisal, claims))
    if claims.anchor not in {anchor.fingerprint for anchor in policy.anchors_for(claims.type)}:
        problems.append("The trust anchor that vouched for the evidence is not registered any more.")
    if not problems:
        return {"verdict": AttestationVerdict.PASSED, "code": "", "problems": []}
    failed = record.verdict is AttestationVerdict.FAILED
    verdict = AttestationVerdict.FAILED if failed else AttestationVerdict.OUTDATED
    return {"verdict": verdict, "code": AppraisalFailed.code, "problems": problems}


def _announce(tx: Connection, record: AttestationRecord, values: dict[str, Any], now: datetime) -> None:
    facts: dict[str, Any] = {"code": values["code"], "detail": " ".join(values["problems"]), "admitted": True}
    events.record(tx, record.tenant_id, EventType.ATTESTATION_FAILED, record.device_id, at=now, **facts)
