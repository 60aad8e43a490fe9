"""What each CRL of the portal's CAs lists, and when the next one is due (RFC 5280 section 5)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy.engine import Connection

import ca
from pki.crl import encode_entries, sign_crl
from pki.issuers import CLOCK_SKEW, Issuer, Reason
from store import issuers as store_issuers
from store.issuers import CrlHead, CrlRecord, CrlState, RevokedCertificate


class RevokedEntries:
    """The encoded CRL entries of certificates revoked for good, kept from one CRL to the next.

    What is revoked stays so, with its date, until it expires: an entry is read and encoded once, and again if its
    reason was changed, with which it is as new. The database's count tells whether all are known. A process that comes
    to it late, or missed something, reads what it lacks.
    Those on hold can return with another date after a resumption: they are read each time.
    """

    def __init__(self) -> None:
        self._of: dict[int, _Known] = {}  # by issuer

    @property
    def are_unread(self) -> bool:
        """Return whether no issuer's entries have been read yet."""
        return not self._of

    def listed(self, tx: Connection, issuer_id: int, *, generation: int, now: datetime) -> Sequence[bytes]:
        """Return the entries, DER, of the issuer's CRL: revoked or held, not expired at ``now`` (RFC 5280 section 3.3).

        ``generation`` is that of the state which the transaction sees.
        """
        known = self._of.setdefault(issuer_id, _Known({}, 0, now))
        if known.generation:
            for row_id in store_issuers.revoked_ids(tx, issuer_id, after=known.at, until=now):
                known.encoded.pop(row_id, None)
            known.encoded.update(_encode(store_issuers.revoked_since(tx, issuer_id, known.generation, now=now)))
        if len(known.encoded) != store_issuers.count_revoked(tx, issuer_id, now=now) or known.at > now:
            known.complete(tx, issuer_id, now)
        known.generation, known.at = generation, now
        held = store_issuers.held_certificates(tx, issuer_id, now=now)
        return [*known.encoded.values(), *_encode(held).values()]


@dataclass(slots=True)
class _Known:
    """Entries of one issuer by the certificates' rows, as of a generation (0: of none yet) and a time."""

    encoded: dict[int, bytes]
    generation: int
    at: datetime

    def complete(self, tx: Connection, issuer_id: int, now: datetime) -> None:
        """Read the entries that are missing, and drop those that have expired."""
        wanted = set(store_issuers.revoked_ids(tx, issuer_id, after=now))
        for row_id in self.encoded.keys() - wanted:
            del self.encoded[row_id]
        self.encoded.update(_encode(store_issuers.revoked_certificates(tx, sorted(wanted - self.encoded.keys()))))


def _encode(revoked: Iterable[RevokedCertificate]) -> dict[int, bytes]:
    """Return the entry of each by its row."""
    rows, listed = itertools.tee(revoked)
    entries = (
        ca.revoke_certificate(one.serial_number, one.revoked_at - CLOCK_SKEW, Reason(one.reason)) for one in listed
    )
    return {row.id: entry for row, entry in zip(rows, encode_entries(entries), strict=True)}


def crl_is_due(state: CrlState, *, now: datetime) -> bool:
    """Return whether a new CRL is due: the first, after a change, at half its life, or if the clock was moved."""
    crl = state.newest
    if crl is None or state.changed_at > crl.generation:
        return True
    half = crl.this_update + (crl.next_update - crl.this_update) / 2
    return not crl.this_update <= now < half


def empty_crl(issuer: Issuer, *, days: int, now: datetime) -> CrlRecord:
    """Sign the first CRL of a CA that is not recorded yet: it lists nothing, and has no row of the CA."""
    begin, end = now.replace(microsecond=0) - CLOCK_SKEW, now.replace(microsecond=0) + timedelta(days=days)
    return CrlRecord(0, 1, begin, end, 0, sign_crl(issuer, [], number=1, this_update=begin, next_update=end))


def next_crl(
    tx: Connection,
    issuer_id: int,
    issuer: Issuer,
    previous: CrlHead | None,
    entries: RevokedEntries,
    *,
    days: int,
    generation: int,
    now: datetime,
) -> CrlRecord:
    """Sign the issuer's next CRL from what the transaction sees, without expired certificates.

    thisUpdate is ``CLOCK_SKEW`` early, but rises with each CRL as long as the clock lets it. It is never in the future:
    a broker given a CRL that is not yet valid refuses every connection.
    """
    now = now.replace(microsecond=0)
    this_update = now - CLOCK_SKEW
    if previous is not None:
        this_update = min(max(this_update, previous.this_update + timedelta(seconds=1)), now)
    next_update = now + timedelta(days=days)
    number = 1 if previous is None else previous.number + 1
    listed = entries.listed(tx, issuer_id, generation=generation, now=now)
    der = sign_crl(issuer, listed, number=number, this_update=this_update, next_update=next_update)
    return CrlRecord(issuer_id, number, this_update, next_update, generation, der)
