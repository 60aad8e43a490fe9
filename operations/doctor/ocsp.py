"""Checks of OCSP: the certificates that sign its answers, and what a client is told."""

from __future__ import annotations

import base64
from datetime import timedelta
from urllib.parse import quote

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import ocsp
from cryptography.x509.ocsp import OCSPCertStatus, OCSPRequestBuilder, OCSPResponseStatus

from core.errors import IssuerUnusable
from core.states import IssuerKind
from operations.doctor.findings import Verdict, problem, together, warning
from operations.doctor.network import served
from operations.doctor.subject import Subject
from pki import ocsp as pki_ocsp
from pki.issuers import Issuer

_START = "Start the portal, which makes a new one within a minute; else see its log."
_LATE = timedelta(hours=1)


def responders(subject: Subject) -> Verdict:
    """Whether each issuing CA has a responder, of its own and renewed in time; the root's key may be away."""
    now, found = subject.clock(), []
    for record in subject.issuers():
        if record.kind == IssuerKind.ROOT:
            continue
        path = subject.settings.ocsp_dir / f"{record.name}.pem"
        try:
            issuer = Issuer(record.name, x509.load_der_x509_certificate(record.der))
            signer = pki_ocsp.open_signer(path.read_bytes(), issuer)
        except OSError as error:
            found.append(problem(f"{path} cannot be read ({error.strerror}).", _START))
            continue
        except IssuerUnusable as error:
            found.append(problem(error.detail, _START))
            continue
        said = f"The OCSP responder of {record.name} ends {signer.not_after:%Y-%m-%d %H:%M} UTC"
        if not signer.not_before <= now < signer.not_after:
            found.append(problem(f"{said}, so that it is not valid now.", _START))
        elif now > signer.not_before + (signer.not_after - signer.not_before) * 2 / 3 + _LATE:
            found.append(warning(f"{said}, and should have been renewed.", "The portal renews it: see its log."))
    return together(found, "Each issuing CA has a responder that is renewed in time.")


def answers(subject: Subject) -> Verdict:
    """What the plain HTTP listener says of the two probe certificates, and whether that is signed as it must be."""
    found = []
    probes = subject.probe_certificates
    for probe, wanted in ((probes.good, OCSPCertStatus.GOOD), (probes.revoked, OCSPCertStatus.REVOKED)):
        certificate, issuer = x509.load_pem_x509_certificates(probe.certificate.read_bytes())[:2]
        request = OCSPRequestBuilder().add_certificate(certificate, issuer, SHA256()).build()
        text = quote(base64.b64encode(request.public_bytes(Encoding.DER)).decode(), safe="")
        problem_seen = _problem(served(subject, f"/ocsp/{text}"), certificate, issuer, wanted, subject)
        if problem_seen is not None:
            name = probe.certificate.stem
            found.append(
                problem(
                    f"Asked about the {name} probe certificate, {problem_seen}.", "Restart the portal; see its log."
                )
            )
    url = f"http://{subject.settings.pki_bind}/ocsp"
    return together(found, f"{url} tells the good probe certificate from the revoked one.")


def _problem(
    der: bytes, certificate: x509.Certificate, issuer: x509.Certificate, wanted: OCSPCertStatus, subject: Subject
) -> str | None:
    try:
        answer = ocsp.load_der_ocsp_response(der)
    except ValueError:
        return "it gives no OCSP answer"
    if answer.response_status is not OCSPResponseStatus.SUCCESSFUL:
        return f"it answers {answer.response_status.name.lower()}"
    try:
        responder = answer.certificates[0]
        responder.verify_directly_issued_by(issuer)
        key = responder.public_key()
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(answer.signature, answer.tbs_response_bytes, ec.ECDSA(SHA256()))
    except (IndexError, ValueError, TypeError, InvalidSignature):
        return "its answer is not signed by a responder of the CA"
    if answer.serial_number != certificate.serial_number or answer.certificate_status is not wanted:
        return f"it says {answer.certificate_status.name.lower()}, not {wanted.name.lower()}"
    if answer.next_update_utc is None or answer.next_update_utc <= subject.clock():
        return "its answer is over already"
    return None
