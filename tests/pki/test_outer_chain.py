"""The chain of an issuing CA below a company's root is taken if every client can verify it, else refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from core.errors import CaChainRefused
from pki.outer_chain import MAX_CHAIN_BYTES, decode_above, encode_above, read_chain, spki
from tests.support.company import NOW, CompanyCa, company_root, name_of, pem

ROOT = company_root()
BETWEEN = ROOT.below("Company CA")
KEY = ec.generate_private_key(ec.SECP256R1())  # of the request
OTHER = ec.generate_private_key(ec.SECP256R1())
PUBLIC = KEY.public_key()
REQUESTED = {spki(PUBLIC): "issuing-2"}
GOOD = ROOT.sign(PUBLIC, "Devices", path_length=0)
BOTH = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
WEAK_RSA = rsa.generate_private_key(65537, 1024)  # noqa: S505
DAY = timedelta(days=1)
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\5\0")


def refusal(content: bytes) -> str:
    with pytest.raises(CaChainRefused) as refused:
        read_chain(content, REQUESTED, now=NOW)
    sentence = refused.value.detail
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


# --- ok -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("issuing", "above"),
    [
        (GOOD, [ROOT]),
        (ROOT.sign(PUBLIC, "Devices", purposes=BOTH), [ROOT]),
        (BETWEEN.sign(PUBLIC, "Devices"), [BETWEEN, ROOT]),
    ],
)
def test_a_chain_is_read_up_to_its_root(issuing: x509.Certificate, above: list[CompanyCa]) -> None:
    chain = read_chain(b"Subject: ...\n" + pem(issuing, *above), REQUESTED, now=NOW)
    assert (chain.name, chain.issuing, [*chain.above]) == ("issuing-2", issuing, [one.certificate for one in above])
    assert decode_above(encode_above(chain.above)) == chain.above


def test_the_order_in_the_file_does_not_matter_nor_does_a_certificate_that_is_there_twice() -> None:
    certificates = [BETWEEN.sign(PUBLIC, "Devices"), BETWEEN.certificate, ROOT.certificate, ROOT.certificate]
    for seed in range(6):
        random.Random(seed).shuffle(certificates)  # noqa: S311
        chain = read_chain(pem(*certificates), REQUESTED, now=NOW)
        assert chain.above == (BETWEEN.certificate, ROOT.certificate)


def test_a_root_need_not_say_how_its_key_is_used() -> None:
    assert len(read_chain(_rooted(usage=False), REQUESTED, now=NOW).above) == 1


def test_path_lengths_are_enough_if_they_are_just_long_enough() -> None:
    root = company_root(path_length=2)
    between = root.below("Company CA", path_length=1)
    chain = read_chain(pem(between.sign(PUBLIC, "Devices", path_length=0), between, root), REQUESTED, now=NOW)
    assert len(chain.above) == 2


# --- fail ---------------------------------------------------------------------------------------------------------


def _loop() -> bytes:
    one, other = company_root("One"), company_root("Other")
    crossed = other.sign(one.key.public_key(), "One"), one.sign(other.key.public_key(), "Other")
    return pem(one.sign(PUBLIC, "Devices"), *crossed)


def _loop_through_the_issuing_ca() -> bytes:
    above = CompanyCa(OTHER, CompanyCa(KEY, GOOD).sign(OTHER.public_key(), "Above"))
    return pem(above.sign(PUBLIC, "Devices"), above)


def _chain(**options: Any) -> bytes:
    return pem(ROOT.sign(PUBLIC, "Devices", **options), ROOT)


def _exceeded() -> bytes:
    root = company_root(path_length=1)
    between = root.below("Between")
    return pem(between.sign(PUBLIC, "Devices"), between, root)


def _leaf() -> x509.Certificate:
    return ROOT.sign(OTHER.public_key(), "web", is_ca=False)


def _below(**options: Any) -> bytes:
    """A chain whose intermediate CA is spoiled."""
    between = ROOT.below("Company CA", **options)
    return pem(between.sign(PUBLIC, "Devices"), between, ROOT)


def _rooted(**options: Any) -> bytes:
    root = company_root(**options)
    return pem(root.sign(PUBLIC, "Devices"), root)


def _longer() -> bytes:
    authority, path = ROOT, [ROOT]
    for number in range(6):
        authority = authority.below(f"Company CA {number}")
        path.insert(0, authority)
    return pem(authority.sign(PUBLIC, "Devices"), *path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(
            lambda: pem(ROOT.sign(OTHER.public_key(), "Devices"), ROOT),
            "No certificate in the file is for a key",
            id="wrong key",
        ),
        pytest.param(lambda: pem(_leaf(), ROOT), "No certificate in the file is for a key", id="foreign leaf alone"),
        pytest.param(lambda: pem(GOOD, _leaf(), ROOT), "CN=web is not above CN=Devices", id="foreign leaf"),
        pytest.param(
            lambda: pem(GOOD), "signed by CN=Company Root, whose certificate is not in the file", id="no root"
        ),
        pytest.param(
            lambda: pem(GOOD, company_root("Another Root")), "whose certificate is not in the file", id="name mismatch"
        ),
        pytest.param(
            lambda: pem(GOOD, company_root()), "does not verify under CN=Company Root", id="another key of that name"
        ),
        pytest.param(
            lambda: pem(company_root("Devices", KEY).certificate), "is signed by its own key", id="self-signed"
        ),
        pytest.param(lambda: _rooted(path_length=0), "less than the number of CAs below it, 1", id="path length 0"),
        pytest.param(lambda: _below(path_length=0), "CN=Company CA has the path length 0", id="path length 0 between"),
        pytest.param(_exceeded, "CN=Company Root has the path length 1", id="path length exceeded"),
        pytest.param(lambda: _chain(ends=-timedelta(hours=1)), "CN=Devices expired at", id="expired"),
        pytest.param(lambda: _chain(starts=DAY), "CN=Devices is not valid before", id="not yet valid"),
        pytest.param(lambda: _below(ends=timedelta(0)), "CN=Company CA expired at", id="expired between"),
        pytest.param(lambda: _rooted(ends=-timedelta(hours=1)), "CN=Company Root expired at", id="expired root"),
        pytest.param(lambda: _chain(is_ca=False), "CN=Devices is not that of a CA", id="no CA bit"),
        pytest.param(lambda: _below(is_ca=False), "CN=Company CA is not that of a CA", id="no CA bit between"),
        pytest.param(lambda: _chain(signs=False), "lacks keyCertSign", id="no keyCertSign"),
        pytest.param(lambda: _below(signs=False), "lacks keyCertSign", id="no keyCertSign between"),
        pytest.param(lambda: _chain(signs_crls=False), "cRLSign", id="no cRLSign"),
        pytest.param(lambda: _chain(usage=False), "must have a keyUsage", id="no keyUsage"),
        pytest.param(lambda: _chain(identifier=False), "no subjectKeyIdentifier", id="no key identifier"),
        pytest.param(
            lambda: _chain(purposes=[ExtendedKeyUsageOID.CLIENT_AUTH]),
            "needs clientAuth and serverAuth",
            id="no serverAuth",
        ),
        pytest.param(
            lambda: _below(purposes=[ExtendedKeyUsageOID.CODE_SIGNING]),
            "CN=Company CA is limited to other purposes",
            id="code signing",
        ),
        pytest.param(lambda: _chain(digest=hashes.SHA224()), "not signed with SHA-256", id="weak hash"),
        pytest.param(lambda: _rooted(key=WEAK_RSA), "a kind or size that TLS does not accept", id="weak key"),
        pytest.param(
            lambda: _below(further=[(UNKNOWN, True)]), "critical extension 1.2.3.4", id="unknown critical extension"
        ),
        pytest.param(
            lambda: _below(further=[(x509.PolicyConstraints(0, None), True)]),
            "demands certificate policies",
            id="explicit policy",
        ),
        pytest.param(_loop, "there is no root", id="loop"),
        pytest.param(_loop_through_the_issuing_ca, "there is no root", id="loop through the issuing CA"),
        pytest.param(
            lambda: _below() + pem(ROOT.below("Unneeded")), "CN=Unneeded is not above CN=Devices", id="another CA"
        ),
        pytest.param(
            lambda: pem(GOOD, ROOT.sign(PUBLIC, "Devices 2"), ROOT), "several certificates", id="two for the key"
        ),
        pytest.param(lambda: pem(ROOT.sign(PUBLIC, ""), ROOT), "has no name", id="empty subject"),
        pytest.param(_longer, "more than 7 certificates", id="too long"),
        pytest.param(lambda: b"", "cannot be read", id="empty"),
        pytest.param(lambda: random.Random(1).randbytes(5000), "cannot be read", id="garbage"),  # noqa: S311
        pytest.param(lambda: pem(GOOD, ROOT)[:-200], "cannot be read", id="truncated"),
        pytest.param(lambda: pem(GOOD).replace(b"CERTIFICATE", b"CERTIFICATE REQUEST"), "cannot be read", id="request"),
        pytest.param(lambda: GOOD.public_bytes(Encoding.DER), "cannot be read", id="DER"),
        pytest.param(lambda: pem(GOOD, ROOT) + b"\n" * MAX_CHAIN_BYTES, "longer than 65536 bytes", id="huge"),
        pytest.param(
            lambda: pem(GOOD, ROOT) + b"-----BEGIN PRIVATE KEY-----\n", "a private key in it", id="private key"
        ),
    ],
)
def test_a_bad_chain_is_refused_by_a_sentence(content: Callable[[], bytes], said: str) -> None:
    assert said in refusal(content())


def test_two_cas_of_one_name_in_a_chain_are_refused() -> None:
    root = company_root("Devices")
    between = root.below("Between")
    assert "same name" in refusal(pem(between.sign(PUBLIC, "Devices"), between, root))


def test_a_name_with_control_characters_is_shown_without_them() -> None:
    root = company_root("Evil\x1b[2J\nRoot", ends=-DAY + timedelta(hours=23))
    assert root.certificate.subject == name_of("Evil\x1b[2J\nRoot")
    assert "\x1b" not in refusal(pem(root.sign(PUBLIC, "Devices"), root))
