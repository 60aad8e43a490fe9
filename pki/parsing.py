"""Turns whatever a parser raises into one error of the portal's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from core.errors import PortalError


@contextmanager
def failing_as(failure: PortalError) -> Iterator[None]:
    """Raise ``failure`` in place of every error in the body of the ``with``, except errors of the portal's own.

    pyca's documented errors are several unrelated classes; what it does with hostile bytes may be one more, even a
    panic of its Rust side, which is a ``BaseException`` without a name to import. Signals to the process pass through.
    """
    try:
        yield
    except PortalError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise failure from error
