"""The CAs of the portal, their CRLs and the certificates that these list."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from core.states import IssuerKind, IssuerStatus
from store.database import columns_of
from store.prepared import Question
from store.tables import BrokerState, Certificate, Crl, IssuerRow


@dataclass(frozen=True, slots=True)
class IssuerRecord:
    """A CA certificate of the portal; the list of its revoked certificates last changed at ``revoked_generation``.

    The active issuing CA with the latest ``issuing_since`` signs new certificates; one without it is only trusted. The
    one with the latest ``servers_since`` signs those of portal and broker. ``above`` has the CAs of a company that are
    above it, as ``pki.outer_chain`` encodes them.
    """

    id: int
    tenant_id: str
    name: str
    kind: IssuerKind
    status: IssuerStatus
    der: bytes
    fingerprint: str
    not_after: datetime
    revoked_generation: int
    issuing_since: datetime | None
    above: bytes | None
    servers_since: datetime | None


_COLUMNS = columns_of(IssuerRecord, IssuerRow)


def issuers_version(tx: Connection) -> str:
    """Return what changes with each change of the CAs, and never comes back: whoever knows it need not read them."""
    row = _VERSION.within(tx, {})
    if row is None:
        raise RuntimeError("the database has no row of the broker's state")
    return str(row[0])


_VERSION = Question(sa.select(BrokerState.issuers_version))


def changed(tx: Connection) -> None:
    """Advance the version of the CAs."""
    # Not a number, which a transaction that is rolled back would leave to the next one.
    tx.execute(sa.update(BrokerState).values(issuers_version=secrets.token_hex(16)))


def _change(tx: Connection, statement: sa.Executable, values: Any = None) -> sa.CursorResult[Any]:
    """Write rows of CAs, and advance their version; every change but ``touch_issuer`` goes through here."""
    changed(tx)
    return tx.execute(statement, values)


def add_issuer(tx: Connection, **values: Any) -> int:
    """Record a CA certificate, active, and return its row's id; ``values`` are the other columns of ``IssuerRow``."""
    values["status"] = IssuerStatus.ACTIVE
    row_id: int = _change(tx, sa.insert(IssuerRow).returning(IssuerRow.id), values).scalar_one()
    return row_id


def set_status(tx: Connection, issuer_id: int, status: IssuerStatus) -> None:
    """Trust a CA, or no more."""
    _change(tx, sa.update(IssuerRow).where(IssuerRow.id == issuer_id).values(status=status))


def begin_issuing(tx: Connection, name: str, *, at: datetime) -> bool:
    """Let a CA issue that is only trusted; return False and change nothing if it is not."""
    waiting = IssuerRow.name == name, IssuerRow.status == IssuerStatus.ACTIVE, IssuerRow.issuing_since.is_(None)
    return _change(tx, sa.update(IssuerRow).where(*waiting).values(issuing_since=at)).rowcount == 1


def let_sign_servers(tx: Connection, issuer_id: int, *, at: datetime) -> None:
    """Have a CA sign the certificates of portal and broker from now on."""
    _change(tx, sa.update(IssuerRow).where(IssuerRow.id == issuer_id).values(servers_since=at))


_ALL = sa.select(*_COLUMNS).order_by(IssuerRow.id)
_ACTIVE = _ALL.where(IssuerRow.status == IssuerStatus.ACTIVE)


def list_issuers(tx: Connection, *, retired: bool = False, tenant_id: str | None = None) -> Sequence[IssuerRecord]:
    """Return the active CA certificates of all tenants, or of one, with ``retired`` also the retired ones.

    They are in the order in which they were added, the installation's root first.
    """
    query = _ALL if retired else _ACTIVE
    query = query if tenant_id is None else query.where(IssuerRow.tenant_id == tenant_id)
    return [IssuerRecord(*row) for row in tx.execute(query)]


def are_any(tx: Connection) -> bool:
    """Return whether there is any active CA, as there is from the first start on."""
    return tx.execute(_ACTIVE.with_only_columns(IssuerRow.id).limit(1)).first() is not None


IssuerMark: TypeAlias = tuple[Any, ...]  # only to be compared with another one
# Without the conversion of times and states, which would take most of the time.
_MARKS = sa.select(
    IssuerRow.id,
    *(
        sa.type_coerce(column, sa.types.NullType())
        for column in (IssuerRow.fingerprint, IssuerRow.status, IssuerRow.issuing_since, IssuerRow.servers_since)
    ),
).order_by(IssuerRow.id)


def issuer_marks(tx: Connection) -> dict[int, IssuerMark]:
    """Return what changes with each CA, retired ones too, by its row, in the order in which they were added."""
    return {mark[0]: tuple(mark) for mark in tx.execute(_MARKS)}


def read_issuers(tx: Connection, issuer_ids: Sequence[int]) -> Iterator[IssuerRecord]:
    """Yield the CAs of these rows."""
    for start in range(0, len(issuer_ids), _AT_ONCE):
        query = _ALL.where(IssuerRow.id.in_(issuer_ids[start : start + _AT_ONCE]))
        yield from (IssuerRecord(*row) for row in tx.execute(query))


def touch_issuer(tx: Connection, issuer_id: int, *, generation: int) -> None:
    """Record that the list of the issuer's revoked certificates changed at ``generation``."""
    tx.execute(sa.update(IssuerRow).where(IssuerRow.id == issuer_id).values(revoked_generation=generation))


def issuer_expiries(tx: Connection) -> list[tuple[str, datetime, datetime | None]]:
    """Return each active issuer's name, not_after, and its newest CRL's nextUpdate (``None`` before the first)."""
    rows = tx.execute(
        sa.select(IssuerRow.name, IssuerRow.not_after, Crl.next_update)
        .outerjoin_from(IssuerRow, Crl, Crl.issuer_id == IssuerRow.id)
        .where(IssuerRow.status == IssuerStatus.ACTIVE)
        .order_by(IssuerRow.id)
    )
    return [(row.name, row.not_after, row.next_update) for row in rows]


# --- CRLs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CrlHead:
    """Number, times and generation of the newest CRL of an issuer."""

    issuer_id: int
    number: int
    this_update: datetime
    next_update: datetime
    generation: int


@dataclass(frozen=True, slots=True)
class CrlRecord(CrlHead):
    """The newest CRL of an issuer."""

    der: bytes


# Built once, because every fetch of a CRL runs one of them.
_CRL_HEAD, _CRL = (
    sa.select(*columns_of(record, Crl)).where(Crl.issuer_id == sa.bindparam("of_issuer"))
    for record in (CrlHead, CrlRecord)
)


_ANY_PUT_OFF = (
    sa.select(Crl.number)
    .join(IssuerRow, IssuerRow.id == Crl.issuer_id)
    .where(IssuerRow.status == IssuerStatus.ACTIVE, IssuerRow.revoked_generation > Crl.generation)
    .limit(1)
)
_PUT_OFF = _ANY_PUT_OFF.where(Crl.issuer_id == sa.bindparam("of_issuer"))


@dataclass(frozen=True, slots=True)
class CrlState:
    """The newest CRL of a CA, ``None`` before the first, and the generation at which what it lists last changed."""

    newest: CrlHead | None
    changed_at: int


_STATES = (
    sa.select(IssuerRow.id, IssuerRow.revoked_generation, *columns_of(CrlHead, Crl))
    .outerjoin_from(IssuerRow, Crl, Crl.issuer_id == IssuerRow.id)
    .order_by(IssuerRow.id)
)
_TIMES = (Crl.this_update, Crl.next_update)
_STATE_MARKS = (
    sa.select(
        IssuerRow.id,
        IssuerRow.revoked_generation,
        Crl.number,
        Crl.generation,
        *(sa.type_coerce(column, sa.types.NullType()) for column in _TIMES),
    )
    .outerjoin_from(IssuerRow, Crl, Crl.issuer_id == IssuerRow.id)
    .order_by(IssuerRow.id)
)


def crl_states(tx: Connection, issuer_ids: Sequence[int] | None = None) -> dict[int, CrlState]:
    """Return what there is of CRLs of each CA, or of some, retired ones too, by the row of the CA."""
    if issuer_ids is None:
        return {row[0]: _state(row) for row in tx.execute(_STATES)}
    parts = (issuer_ids[start : start + _AT_ONCE] for start in range(0, len(issuer_ids), _AT_ONCE))
    return {row[0]: _state(row) for some in parts for row in tx.execute(_STATES.where(IssuerRow.id.in_(some)))}


def _state(row: sa.Row[Any]) -> CrlState:
    _issuer, changed_at, *head = tuple[Any, ...](row)
    return CrlState(None if head[0] is None else CrlHead(*head), changed_at)


class KnownCrlStates:
    """What there is of CRLs of each CA, as a process has read it last: only what has changed is read again."""

    def __init__(self) -> None:
        self._marks: dict[int, IssuerMark] = {}
        self._states: dict[int, CrlState] = {}

    def read(self, tx: Connection) -> Mapping[int, CrlState]:
        """Return what ``crl_states`` does."""
        marks = {mark[0]: tuple(mark) for mark in tx.execute(_STATE_MARKS)}
        changed = crl_states(tx, [row for row, mark in marks.items() if self._marks.get(row) != mark])
        self._states = {row: changed.get(row) or self._states[row] for row in marks}
        self._marks = marks
        return self._states


def list_crls(tx: Connection, issuer_ids: Sequence[int]) -> Iterator[CrlRecord]:
    """Yield the newest CRL of each of these CAs that has one."""
    for start in range(0, len(issuer_ids), _AT_ONCE):
        query = sa.select(*columns_of(CrlRecord, Crl)).where(Crl.issuer_id.in_(issuer_ids[start : start + _AT_ONCE]))
        yield from (CrlRecord(*row) for row in tx.execute(query))


def get_crl(tx: Connection, issuer_id: int) -> CrlRecord | None:
    """Return the newest CRL of an issuer, ``None`` before the first."""
    row = tx.execute(_CRL, {"of_issuer": issuer_id}).one_or_none()
    return None if row is None else CrlRecord(*row)


def crl_is_put_off(tx: Connection, issuer_id: int) -> bool:
    """Return whether the list of an issuer's revoked certificates has changed since its newest CRL."""
    return tx.execute(_PUT_OFF, {"of_issuer": issuer_id}).one_or_none() is not None


def any_crl_is_put_off(tx: Connection) -> bool:
    """Return whether the list of any issuer's revoked certificates has changed since its newest CRL."""
    return tx.execute(_ANY_PUT_OFF).first() is not None


def put_crl(tx: Connection, record: CrlRecord) -> bool:
    """Make a CRL the newest of its issuer; return False and change nothing if its number is not higher."""
    values, own = dataclasses.asdict(record), Crl.issuer_id == record.issuer_id
    if tx.execute(sa.update(Crl).where(own, Crl.number < record.number).values(values)).rowcount == 1:
        return True
    if tx.execute(sa.select(Crl.number).where(own)).one_or_none() is not None:
        return False
    tenant = sa.select(IssuerRow.tenant_id).where(IssuerRow.id == record.issuer_id).scalar_subquery()
    tx.execute(sa.insert(Crl).values(tenant_id=tenant, **values))
    return True


_AT_ONCE = 500  # ids in one query
# Literals, not parameters: a database uses a partial index only if the query contains the index's condition as text.
_REVOKED = (sa.text("certificates.status IN ('held', 'revoked')"), sa.text("certificates.status = 'revoked'"))
_HELD = (sa.text("certificates.status IN ('held', 'revoked')"), sa.text("certificates.status = 'held'"))


@dataclass(frozen=True, slots=True)
class RevokedCertificate:
    """The entry of a CRL for the certificate of row ``id``; the serial number is in lower-case hex."""

    id: int
    serial_number: str
    revoked_at: datetime
    reason: str


def get_crl_head(tx: Connection, issuer_id: int) -> CrlHead | None:
    """Return number, times and generation of an issuer's newest CRL; ``None`` before the first."""
    row = tx.execute(_CRL_HEAD, {"of_issuer": issuer_id}).one_or_none()
    return None if row is None else CrlHead(*row)


def count_revoked(tx: Connection, issuer_id: int, *, now: datetime) -> int:
    """Return how many of the issuer's certificates are revoked and not expired at ``now``, from an index alone."""
    conditions = (Certificate.issuer_id == issuer_id, *_REVOKED, Certificate.not_after > now)
    return tx.execute(sa.select(sa.func.count()).select_from(Certificate).where(*conditions)).scalar_one()


def revoked_ids(tx: Connection, issuer_id: int, *, after: datetime, until: datetime | None = None) -> Sequence[int]:
    """Return the row ids of the issuer's revoked certificates that expire after a time, from an index alone.

    With ``until``, only those that expire then or before.
    """
    query = sa.select(Certificate.id).where(
        Certificate.issuer_id == issuer_id, *_REVOKED, Certificate.not_after > after
    )
    if until is not None:
        query = query.where(Certificate.not_after <= until)
    return tx.execute(query).scalars().all()


def revoked_since(tx: Connection, issuer_id: int, generation: int, *, now: datetime) -> Iterator[RevokedCertificate]:
    """Yield CRL entries of the issuer's certificates revoked after a generation and not expired at ``now``."""
    return _entries(
        tx,
        Certificate.generation > generation,  # first, because SQLite searches the index by the first condition
        sa.text("certificates.generation > 0"),
        # An expression, so that the database does not choose an index of the issuer and read all of it.
        Certificate.issuer_id + 0 == issuer_id,
        sa.text("certificates.status = 'revoked'"),
        Certificate.not_after > now,
    )


def revoked_certificates(tx: Connection, ids: Sequence[int]) -> Iterator[RevokedCertificate]:
    """Yield CRL entries of the certificates of these rows."""
    for start in range(0, len(ids), _AT_ONCE):
        yield from _entries(tx, Certificate.id.in_(ids[start : start + _AT_ONCE]))


def held_certificates(tx: Connection, issuer_id: int, *, now: datetime) -> Iterator[RevokedCertificate]:
    """Yield CRL entries of the issuer's certificates that are on hold and not expired at ``now``."""
    return _entries(tx, Certificate.issuer_id == issuer_id, *_HELD, Certificate.not_after > now)


def _entries(tx: Connection, *conditions: sa.ColumnElement[bool] | sa.TextClause) -> Iterator[RevokedCertificate]:
    query = sa.select(
        Certificate.id, Certificate.serial_number, Certificate.revoked_at, Certificate.revocation_reason
    ).where(*conditions)
    for row_id, serial_number, revoked_at, reason in tx.execute(query):
        if revoked_at is not None:  # always true, by a constraint of the table
            yield RevokedCertificate(row_id, serial_number, revoked_at, reason or "unspecified")
