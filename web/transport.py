"""What the socket under an answer tells of the client."""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable


@runtime_checkable
class HasPeer(Protocol):
    """A TLS socket."""

    def getpeercert(self, binary_form: Literal[True]) -> bytes | None:
        """The peer's certificate, DER."""


def client_certificate(connection: object) -> bytes | None:
    """The certificate, DER, that a TLS client has shown with proof of its key; ``None`` where it has shown none.

    A resumed TLS session brings the one of its beginning (RFC 8446 section 4.6.1), so what has happened to the
    certificate since then is for the caller to find out.
    """
    if not isinstance(connection, HasPeer):
        return None
    return connection.getpeercert(binary_form=True)
