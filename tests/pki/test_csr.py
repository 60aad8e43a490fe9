"""Which certificate signing requests the certificate authority accepts."""

from __future__ import annotations

import base64
import pickle
import subprocess
import textwrap
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

import ca
from core.errors import CsrInvalid, KeyRefused
from pki.algorithms import KeyType, PublicKey, public_key_der, public_key_fingerprint
from pki.csr import Csr, read_csr
from pki.encoding import failing_as
from tests.support.ca_hierarchy import make_hierarchy

P256 = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


class OpensslRequests:
    """Makes CSRs with the real ``openssl req``, each set of arguments once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[str, ...], str] = {}

    def __call__(self, *arguments: str) -> str:
        if arguments not in self._made:
            csr = self._folder / "device.csr"
            key = self._folder / "device.key"
            openssl("req", "-new", "-nodes", "-subj", "/CN=device", *arguments, "-keyout", key, "-out", csr)
            self._made[arguments] = csr.read_text()
        return self._made[arguments]


@pytest.fixture(scope="module")
def request_of(tmp_path_factory: pytest.TempPathFactory) -> OpensslRequests:
    return OpensslRequests(tmp_path_factory.mktemp("csr"))


@pytest.fixture(scope="module")
def good(request_of: OpensslRequests) -> str:
    return request_of(*P256)


def der_of(pem: str) -> bytes:
    return base64.b64decode("".join(pem.strip().splitlines()[1:-1]))


def pem_of(der: bytes, label: str = "CERTIFICATE REQUEST") -> str:
    body = "\n".join(textwrap.wrap(base64.b64encode(der).decode(), 64))
    return f"-----BEGIN {label}-----\n{body}\n-----END {label}-----\n"


def key_of(pem: str) -> PublicKey:
    return read_csr(pem).public_key


# --- Accepted -----------------------------------------------------------------------------------------------------

ACCEPTED = {
    "ec-p256": P256,
    "ec-p384": ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384"],
    "ed25519": ["-newkey", "ed25519"],
    "rsa-2048": ["-newkey", "rsa:2048"],
    "rsa-3072": ["-newkey", "rsa:3072"],
    "rsa-4096": ["-newkey", "rsa:4096"],
    "sha-384": [*P256, "-sha384"],
    "sha-512": [*P256, "-sha512"],
    "signed with RSA-PSS": ["-newkey", "rsa:2048", "-sigopt", "rsa_padding_mode:pss"],
    "old label": [*P256, "-newhdr"],
    "asks to be a CA": [*P256, "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=keyCertSign"],
    "asks for names": [*P256, "-addext", "subjectAltName=DNS:broker.example.com,IP:10.0.0.1"],
    "another's name": [*P256, "-subj", "/CN=3fa85f64-5717-4562-b3fc-2c963f66afa6/O=Somebody else"],
    "no name": [*P256, "-subj", "/"],
}


@pytest.mark.parametrize("arguments", ACCEPTED.values(), ids=ACCEPTED)
def test_a_csr_of_openssl_is_accepted(request_of: OpensslRequests, arguments: list[str], tmp_path: Path) -> None:
    pem = request_of(*arguments)
    (tmp_path / "csr").write_text(pem)
    openssl("req", "-in", tmp_path / "csr", "-pubkey", "-noout", "-out", tmp_path / "public")
    assert key_of(pem) == load_pem_public_key((tmp_path / "public").read_bytes())


def test_a_compressed_point_is_accepted(tmp_path: Path) -> None:
    usual, key, csr = tmp_path / "usual", tmp_path / "key", tmp_path / "csr"
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", usual)
    openssl("ec", "-in", usual, "-conv_form", "compressed", "-out", key)
    openssl("req", "-new", "-key", key, "-subj", "/CN=device", "-out", csr)
    pem = csr.read_text()
    public_key = key_of(pem)
    assert public_key.public_bytes(Encoding.X962, PublicFormat.CompressedPoint) in der_of(pem)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda pem: pem.replace("\n", "\r\n"), id="CRLF"),
        pytest.param(lambda pem: f"\n\n  {pem}\n\n", id="blank lines around it"),
        pytest.param(lambda pem: pem.strip(), id="no last newline"),
        pytest.param(lambda pem: pem_one_line(pem), id="Base64 in one line"),
    ],
)
def test_white_space_does_not_matter(good: str, change: Callable[[str], str]) -> None:
    assert key_of(change(good)) == key_of(good)


def pem_one_line(pem: str) -> str:
    lines = pem.splitlines()
    return "\n".join([lines[0], "".join(lines[1:-1]), lines[-1]])


@pytest.mark.parametrize("kind", ["ec-p256", "ec-p384", "ed25519", "rsa-2048", "rsa-4096"])
def test_a_csr_names_its_key_and_goes_from_one_process_to_another(request_of: OpensslRequests, kind: str) -> None:
    csr = read_csr(request_of(*ACCEPTED[kind]))
    assert csr.key_type == kind
    assert csr.key_fingerprint == public_key_fingerprint(csr.public_key)
    copied: Csr = pickle.loads(pickle.dumps(csr))  # noqa: S301 - its own
    assert copied == csr
    assert copied.pem == request_of(*ACCEPTED[kind])


def test_a_csr_is_for_the_key_of_a_certificate_or_not(request_of: OpensslRequests) -> None:
    cas = make_hierarchy(datetime(2030, 1, 1, tzinfo=UTC))
    csr = read_csr(request_of(*P256))
    assert csr.is_for_key_of(cas.device(csr.public_key).der)
    assert not csr.is_for_key_of(cas.device().der)
    assert not csr.is_for_key_of(cas.device(key_of(request_of(*ACCEPTED["rsa-2048"]))).der)


# --- Refused for its key ------------------------------------------------------------------------------------------

REFUSED_KEYS = {
    "RSA of 1024 bits": ["-newkey", "rsa:1024"],
    "RSA of 512 bits": ["-newkey", "rsa:512"],
    "RSA of 2056 bits": ["-newkey", "rsa:2056"],
    "RSA with exponent 3": ["-newkey", "rsa:2048", "-pkeyopt", "rsa_keygen_pubexp:3"],
    "RSA marked for PSS": ["-newkey", "rsa-pss", "-pkeyopt", "rsa_keygen_bits:2048"],
    "secp256k1": ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp256k1"],
    "secp112r1": ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp112r1"],
    "sect233r1": ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:sect233r1"],
    "brainpool": ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:brainpoolP256r1"],
    "P-224": ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-224"],
    "P-521": ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-521"],
    "explicit curve": [*P256, "-pkeyopt", "ec_param_enc:explicit"],
    "Ed448": ["-newkey", "ed448"],
}


@pytest.mark.parametrize("arguments", REFUSED_KEYS.values(), ids=REFUSED_KEYS)
def test_a_csr_with_a_weak_or_unknown_key_is_refused(request_of: OpensslRequests, arguments: list[str]) -> None:
    with pytest.raises(KeyRefused) as refusal:
        read_csr(request_of(*arguments))
    assert refusal.value.errors[0].field == "csr"


def test_a_dsa_key_is_refused(tmp_path: Path) -> None:
    parameters, key, csr = tmp_path / "parameters", tmp_path / "key", tmp_path / "csr"
    openssl("genpkey", "-genparam", "-algorithm", "DSA", "-pkeyopt", "dsa_paramgen_bits:1024", "-out", parameters)
    openssl("genpkey", "-paramfile", parameters, "-out", key)
    openssl("req", "-new", "-key", key, "-subj", "/CN=device", "-out", csr)
    with pytest.raises(KeyRefused):
        read_csr(csr.read_text())


def test_an_ec_point_off_the_curve_is_refused(good: str) -> None:
    der = bytearray(der_of(good))
    public_key = key_of(good)
    point = public_key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    der[der.index(point) + 64] ^= 1
    with pytest.raises(KeyRefused):
        read_csr(pem_of(bytes(der)))


def ed25519_request(public_key: bytes, signature: bytes) -> str:
    """A CSR with this public key under this signature, whether they fit or not."""
    key = ed25519.Ed25519PrivateKey.generate()
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, None)
    der = csr.public_bytes(Encoding.DER)
    return pem_of(der.replace(key.public_key().public_bytes_raw(), public_key).replace(csr.signature, signature))


FIELD = 2**255 - 19
ORDER_8_Y = 2707385501144840649318225287225658788936804267575313519463743609750303402022


@pytest.mark.parametrize("y", [0, 1, FIELD - 1, FIELD, FIELD + 1, ORDER_8_Y, FIELD - ORDER_8_Y])
@pytest.mark.parametrize("sign", [0, 1])
def test_an_ed25519_key_of_small_order_is_refused(y: int, sign: int) -> None:
    public_key = (y | sign << 255).to_bytes(32, "little")
    # The identity as R with zero as S: verifies with no private key at all under the identity as the public key.
    with pytest.raises(KeyRefused, match="Ed25519"):
        read_csr(ed25519_request(public_key, b"\x01" + bytes(63)))


def test_a_point_of_order_8_is_what_the_list_says() -> None:
    # Doubling on -x² + y² = 1 + d x² y² gives y' = (y² + x²) / (1 - d x² y²), and the points of order 4 have y = 0.
    d = -121665 * pow(121666, -1, FIELD) % FIELD
    yy = ORDER_8_Y**2 % FIELD
    xx = (yy - 1) * pow(d * yy + 1, -1, FIELD) % FIELD
    assert (yy + xx) * pow(1 - d * xx * yy, -1, FIELD) % FIELD == 0


# --- Refused for its form or its signature ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "digest"),
    [
        ("ec-p256", "-sha1"),
        ("ec-p256", "-sha224"),
        ("rsa-2048", "-sha1"),
        ("rsa-2048", "-sha224"),
        ("rsa-2048", "-md5"),
    ],
)
def test_a_csr_signed_with_a_weak_hash_is_refused(request_of: OpensslRequests, kind: str, digest: str) -> None:
    with pytest.raises(CsrInvalid, match="SHA-256") as refusal:
        read_csr(request_of(*ACCEPTED[kind], digest))
    assert not isinstance(refusal.value, KeyRefused)


@pytest.mark.parametrize("kind", ["ec-p256", "ec-p384", "ed25519", "rsa-2048", "signed with RSA-PSS"])
def test_a_csr_with_a_wrong_signature_is_refused(request_of: OpensslRequests, kind: str) -> None:
    der = bytearray(der_of(request_of(*ACCEPTED[kind])))
    der[-1] ^= 1
    with pytest.raises(CsrInvalid, match="signature"):
        read_csr(pem_of(bytes(der)))


def test_a_csr_signed_by_another_key_is_refused(good: str) -> None:
    der = der_of(good)
    own = key_of(good).public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    stolen = der.replace(own, other.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint))
    with pytest.raises(CsrInvalid, match="signature is wrong"):
        read_csr(pem_of(stolen))


def test_a_csr_whose_signature_is_of_another_kind_than_its_key_is_refused(good: str) -> None:
    ecdsa_with_sha256 = bytes.fromhex("06082a8648ce3d040302")
    ed25519_oid = bytes.fromhex("06032b6570") + b"\x05\x03abc"
    changed = der_of(good).replace(ecdsa_with_sha256, ed25519_oid)
    with pytest.raises(CsrInvalid):
        read_csr(pem_of(changed))


MALFORMED: dict[str, Callable[[str], Any]] = {
    "nothing": lambda _: "",
    "white space": lambda _: " \n\t",
    "binary": lambda _: bytes(range(256)).decode("latin-1") * 4,
    "NUL bytes": lambda pem: pem.replace("\n", "\x00"),
    "truncated text": lambda pem: pem[: len(pem) // 2],
    "truncated DER": lambda pem: pem_of(der_of(pem)[:-10]),
    "DER with something after it": lambda pem: pem_of(der_of(pem) + b"\x00"),
    "DER in place of PEM": lambda pem: der_of(pem).decode("latin-1"),
    "no header": lambda pem: "\n".join(pem.splitlines()[1:]),
    "empty block": lambda _: pem_of(b""),
    "empty sequence": lambda _: pem_of(b"\x30\x00"),
    "deep nesting": lambda _: pem_of(b"\x30\x80" * 4000),
    "enormous length": lambda _: pem_of(b"\x30\x84\xff\xff\xff\xff"),
    "two blocks": lambda pem: pem + pem,
    "a block of another kind after it": lambda pem: pem + pem_of(b"x", "PRIVATE KEY"),
    "a certificate": lambda pem: pem_of(der_of(pem), "CERTIFICATE"),
    "PEM headers": lambda pem: pem.replace("REQUEST-----\n", "REQUEST-----\nProc-Type: 4,ENCRYPTED\n\n", 1),
    "letters that are not Base64": lambda pem: pem.replace("M", "!", 1),
    "Base64 of a wrong length": lambda pem: pem_one_line(pem).replace("\n-----END", "A\n-----END"),
    "full-width letters": lambda pem: pem.replace("M", "\uff2d", 1),
    "100 KB": lambda pem: pem_of(der_of(pem) + bytes(75_000)),
    "100 KB of white space": lambda pem: pem + " " * 100_000,
    "just over the limit": lambda pem: pem + " " * (16 * 1024 + 1 - len(pem)),
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_csr_is_refused(good: str, change: Callable[[str], Any]) -> None:
    with pytest.raises(CsrInvalid) as refusal:
        read_csr(change(good))
    assert refusal.value.detail.endswith(".")
    assert [problem.field for problem in refusal.value.errors] == ["csr"]


def test_a_csr_of_the_greatest_length_is_read(good: str) -> None:
    assert key_of(good + " " * (16 * 1024 - len(good))) == key_of(good)


def test_a_monstrous_rsa_key_is_refused_before_its_signature_is_checked() -> None:
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "device")])
    csr = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    huge = rsa.RSAPublicNumbers(65537, (1 << 16383) + 1).public_key()
    small = key.public_key()
    request_info = csr.tbs_certrequest_bytes.replace(public_key_der(small), public_key_der(huge))
    body = request_info[4:]
    request_info = b"\x30\x82" + len(body).to_bytes(2, "big") + body
    rest = csr.public_bytes(Encoding.DER)[4 + len(csr.tbs_certrequest_bytes) :]
    whole = request_info + rest
    with pytest.raises(KeyRefused, match="16384 bits"):
        read_csr(pem_of(b"\x30\x82" + len(whole).to_bytes(2, "big") + whole))


# --- Anything at all ----------------------------------------------------------------------------------------------


def cryptography_request(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey) -> bytes:
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "device")])
    san = x509.SubjectAlternativeName([x509.DNSName("example.com")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name).add_extension(san, critical=False)
    rsa_padding = padding.PKCS1v15() if isinstance(key, rsa.RSAPrivateKey) else None
    return builder.sign(key, algorithm, rsa_padding=rsa_padding).public_bytes(Encoding.DER)


REQUESTS = [
    cryptography_request(ca.generate_keypair(kind))
    for kind in KeyType
    if kind not in (KeyType.RSA_3072, KeyType.RSA_4096)
]
KEYS = [key_of(pem_of(der)) for der in REQUESTS]


@settings(max_examples=300, deadline=None)
@given(
    which=st.integers(0, len(REQUESTS) - 1),
    cuts=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 4), st.binary(max_size=4)), min_size=1, max_size=4),
)
def test_whatever_is_changed_in_a_csr_it_is_refused_or_gives_the_same_key(
    which: int, cuts: list[tuple[int, int, bytes]]
) -> None:
    der = REQUESTS[which]
    for start, length, replacement in cuts:
        position = start % (len(der) + 1)
        der = der[:position] + replacement + der[position + length :]
    try:
        key = key_of(pem_of(der))
    except CsrInvalid:
        return
    assert key == KEYS[which]


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(), st.binary(max_size=300).map(pem_of)))
def test_no_text_does_anything_but_being_refused(text: str) -> None:
    with pytest.raises(CsrInvalid):
        read_csr(text)


def test_a_panic_of_the_parser_is_a_refusal() -> None:
    class PanicException(BaseException):
        """Named as pyo3's is."""

    with pytest.raises(CsrInvalid, match="damaged"), failing_as(CsrInvalid("It is damaged.")):
        raise PanicException


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
def test_a_signal_to_the_process_is_no_refusal(signal: type[BaseException]) -> None:
    with pytest.raises(signal), failing_as(CsrInvalid("It is damaged.")):
        raise signal
