"""Of which tenant the rows are that a transaction may see and write: a second line behind the queries' own conditions.

PostgreSQL holds a role to it that owns no tables (row-level security); on SQLite the queries alone do. A request begins
in the scope of no tenant, and gets that of its actor once it is known. A thread that serves no request works for the
installation, in the scope of all.

    with of_request():
        token = authenticate(...)      # in a transaction that says so: database.snapshot(sees=ALL_TENANTS)
        enter(token.tenant_id)
        ...                            # the transactions of this thread see rows of that tenant only
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

ALL_TENANTS, NO_TENANT = "*", ""
SETTING = "portal.tenant"  # of PostgreSQL's, made for each transaction; the policies compare rows with it
_SCOPE = re.compile(r"[A-Za-z0-9._-]{0,64}|\*")
_KEY = "portal_scope"  # in the options and in the info of a connection
_current: ContextVar[str] = ContextVar(_KEY, default=ALL_TENANTS)  # a new thread begins with the default
_SET = sa.text(f"SELECT set_config('{SETTING}', :scope, true)")


def of_request() -> AbstractContextManager[None]:
    """Begin a request in the scope of no tenant; at its end the thread has the scope that it had before."""
    return of_tenant(NO_TENANT)


@contextmanager
def of_tenant(tenant_id: str) -> Iterator[None]:
    """Work in the scope of a tenant for a while."""
    token = _current.set(tenant_id)
    try:
        yield
    finally:
        _current.reset(token)


def enter(tenant_id: str) -> None:
    """Go on with the request in the scope of a tenant; raises ``RuntimeError`` outside a request."""
    if _current.get() == ALL_TENANTS:
        raise RuntimeError("only a request enters the scope of a tenant")
    _current.set(tenant_id)


def option_for(sees: str | None) -> dict[str, str]:
    """Return the execution option of a connection whose transaction has the scope ``sees``, or the thread's."""
    return {_KEY: _current.get() if sees is None else sees}


def scope_of(connection: Connection) -> str:
    """Return the scope of the transaction that begins on a connection; raises ``ValueError`` if it is no name."""
    scope: str = connection.get_execution_options().get(_KEY, ALL_TENANTS)
    if not _SCOPE.fullmatch(scope):
        raise ValueError("the name of a tenant must be one")
    return scope


class Scoped(Iterator[bytes]):
    """The content of an answer that is made while it is sent, in the scope that the request has reached."""

    def __init__(self, content: Iterator[bytes]) -> None:
        self._content, self._scope = content, _current.get()

    def __next__(self) -> bytes:
        with of_tenant(self._scope):
            return next(self._content)

    def close(self) -> None:
        """Close the content, if it can be."""
        with of_tenant(self._scope):
            getattr(self._content, "close", lambda: None)()


@contextmanager
def widened(tx: Connection) -> Iterator[None]:
    """Let the statements of the block see and write the rows of all tenants, within the transaction.

    After an error of the database the transaction, or its savepoint, must be rolled back, which ends this, too.
    """
    if tx.dialect.name == "sqlite" or scope_of(tx) == ALL_TENANTS:
        yield
        return
    tx.execute(_SET, {"scope": ALL_TENANTS})
    try:
        yield
    except sa.exc.DBAPIError:
        raise
    except BaseException:
        tx.execute(_SET, {"scope": scope_of(tx)})
        raise
    tx.execute(_SET, {"scope": scope_of(tx)})
