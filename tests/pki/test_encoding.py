"""PEM is what OpenSSL writes, of documents that follow one another, too."""

from __future__ import annotations

import random
import ssl

import pytest

from pki.encoding import PemOfSuccessors, pem

SIZES = (0, 1, 47, 48, 49, 49_151, 49_152, 49_153, 150_000)


@pytest.mark.parametrize("size", SIZES)
def test_it_has_the_lines_of_openssl(size: int) -> None:
    der = random.Random(size).randbytes(size)  # noqa: S311 - no secret
    assert pem("CERTIFICATE", der) == (ssl.DER_cert_to_PEM_cert(der) if size else _EMPTY)


_EMPTY = "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"


def test_a_successor_is_written_as_if_it_stood_alone() -> None:
    chance = random.Random(7)  # noqa: S311 - no secret
    writer = PemOfSuccessors("X509 CRL")
    der = chance.randbytes(160_000)
    for _ in range(40):
        assert writer.pem(der).decode() == pem("X509 CRL", der)
        at, gone = chance.randrange(len(der)), chance.choice((0, 1, 40, 60_000))
        der = der[:at] + chance.randbytes(chance.choice((0, 1, 40, 60_000))) + der[at + gone :]
