"""Identifies the device behind a TLS client certificate, and checks whether that is still accepted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy.engine import Connection

from config import Settings
from core.errors import ClientCertificateRefused, Conflict, FieldProblem, ManufacturerInvalid
from core.files import FileLock, replace_file
from core.states import ClientKind, DeviceStatus, IssuerKind
from pki import client_certificates
from pki.client_certificates import ClientCertificate
from pki.foreign import Name
from store import certificates, enrolment, tenants
from store.certificates import CertificateRecord
from store.database import Database
from store.enrolment import ManufacturerRecord
from store.locks import InstallationLock, lock_installation
from store.scope import ALL_TENANTS, widened
from workflows.authority.issuers import Authority, RecordedIssuer

CLIENT_CAS = "client-cas.pem"  # in the folder of the portal's own TLS files
_OUT_OF_DATE = "The client certificate has expired or is not valid yet."


@dataclass(frozen=True, slots=True)
class DeviceClient:
    """A device, or by its ``kind`` an application, that has shown a valid certificate of this portal."""

    tenant_id: str
    device_id: str
    certificate: CertificateRecord
    kind: ClientKind = ClientKind.DEVICE


@dataclass(frozen=True, slots=True)
class ManufacturedClient:
    """A device that has shown its factory certificate (IDevID), issued by a registered manufacturer's CA."""

    tenant_id: str
    manufacturer: ManufacturerRecord
    certificate: ClientCertificate


@dataclass(eq=False, repr=False)
class TlsClients:
    """Checks client certificates for each request: the TLS layer did it only when the connection was set up."""

    _settings: Settings
    _database: Database
    _authority: Authority
    _clock: Callable[[], datetime]
    _by_name: tuple[tuple[RecordedIssuer, ...], Mapping[Name, Sequence[RecordedIssuer]]] = field(
        init=False, default=((), {})
    )

    _listed: tuple[tuple[RecordedIssuer, ...], Sequence[bytes], bytes] = field(init=False, default=((), (), b""))

    def identify(self, der: bytes, tenant_id: str | None = None) -> DeviceClient | ManufacturedClient:
        """Find out whose certificate, DER, a client has shown.

        Several tenants may have registered the CA of one manufacturer: then ``tenant_id`` says which is meant, and
        without one the certificate is refused.

        Raises ``ClientCertificateRefused`` if it is revoked, on hold or expired, or its CA is not registered here.
        """
        client = client_certificates.read_client(der)
        grace = timedelta(days=self._settings.renewal_grace_days)  # in which an expired one may still be renewed
        if not client.not_before <= self._clock() <= client.not_after + grace:
            raise ClientCertificateRefused(_OUT_OF_DATE)
        if not client_certificates.may_identify_a_client(client):
            raise ClientCertificateRefused("The client certificate may not be used by a TLS client.")
        named = self._issuing().get(client.certificate.issuer, ())
        if any(client_certificates.is_issued_by(client.certificate, item.der) for item in named):
            return self._device(client)
        return self._manufactured(client, tenant_id)

    def _issuing(self) -> Mapping[Name, Sequence[RecordedIssuer]]:
        """Return the issuing CAs by their names; made again when the CAs have changed."""
        issuers = self._authority.issuers
        if self._by_name[0] is not issuers:
            by_name: dict[Name, list[RecordedIssuer]] = {}
            for item in issuers:
                if item.kind == IssuerKind.ISSUING:
                    by_name.setdefault(client_certificates.subject_of(item.der), []).append(item)
            self._by_name = issuers, by_name
        return self._by_name[1]

    def _device(self, client: ClientCertificate) -> DeviceClient:
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            shown = certificates.find_device_certificate(tx, client.fingerprint)
        if shown is None or shown.certificate.device_id is None:
            raise ClientCertificateRefused("The client certificate is not one of a device that is known here.")
        if shown.device_status is not DeviceStatus.ACTIVE or shown.certificate.revoked_at is not None:
            raise ClientCertificateRefused("The device, or its client certificate, is revoked or suspended.")
        return DeviceClient(shown.tenant_id, shown.certificate.device_id, shown.certificate, shown.kind)

    def _manufactured(self, client: ClientCertificate, tenant_id: str | None) -> ManufacturedClient:
        if client.not_after < self._clock():
            raise ClientCertificateRefused(_OUT_OF_DATE)
        with self._database.snapshot(sees=ALL_TENANTS) as tx:
            issuers = [
                record
                for record in enrolment.registered_manufacturers(tx, tenant_id=tenant_id)
                if self._clock() <= record.not_after
                and client_certificates.is_issued_by(client.certificate, record.der)
            ]
        permitted = [one for one in issuers if client_certificates.is_permitted_by(client.certificate, one.der)]
        if len({record.tenant_id for record in permitted}) > 1:
            raise ClientCertificateRefused(
                "The CA of the client certificate is registered by several tenants; use the EST path with the label of"
                " the one that the device belongs to."
            )
        for record in permitted:
            return ManufacturedClient(record.tenant_id, record, client)
        if issuers:
            raise ClientCertificateRefused(
                "The CA that issued the client certificate may not issue it for its names (name constraints)."
            )
        raise ClientCertificateRefused(
            "The CA that issued the client certificate directly is not registered here; see POST /manufacturers."
        )

    def check_identifier(self, tx: Connection, der: bytes) -> None:
        """Raise ``ManufacturerInvalid`` if a CA, DER, could take the place of another tenant's in TLS.

        Else whoever made one of the same name first would keep the other tenant from registering its own.
        """
        if tenants.are_several(tx) and not client_certificates.has_identifier_of_its_key(der):
            raise ManufacturerInvalid(
                "The certificate has no subjectKeyIdentifier that is a hash of its key, without which TLS cannot tell"
                " it from CAs of other tenants; have it issued again with one (RFC 5280 section 4.2.1.2).",
                [FieldProblem("certificate", "must have a subjectKeyIdentifier that is a hash of its key")],
            )

    def check_distinct(self, tx: Connection, tenant_id: str, der: bytes) -> None:
        """Raise ``Conflict`` if TLS could take a CA that is to be registered, DER, for one whose clients it accepts.

        That can be one of another tenant, of which the error says nothing more. Call it in the transaction that
        registers: no other one is registered before that ends.
        """
        lock_installation(tx, InstallationLock.CLIENT_CAS)
        issuing = [
            (item.issuer.name if item.tenant_id == tenant_id else "of another issuer", item.der)
            for item in self._authority.issuers
            if item.kind == IssuerKind.ISSUING
        ]
        with widened(tx):
            manufacturers = enrolment.registered_manufacturers(tx)
        registered = [
            (record.name if record.tenant_id == tenant_id else "of another manufacturer", record.der)
            for record in manufacturers
        ]
        for name, accepted in (*issuing, *registered):
            if client_certificates.may_be_confused(der, accepted):
                raise Conflict(
                    f"The CA {name} has the same name and another key, and without key identifiers in both certificates"
                    " TLS refuses the devices of one of them: remove that one, or register a certificate of this CA"
                    " with a subjectKeyIdentifier."
                )

    def write_authorities(self) -> None:
        """Update the file of the CAs whose client certificates TLS accepts; a worker notices within a second."""
        path = self._settings.tls_dir / CLIENT_CAS
        with FileLock(self._settings.data_dir / ".client-cas.lock").hold():  # so that the newest state is written last
            with self._database.snapshot(sees=ALL_TENANTS) as tx:
                manufacturers = enrolment.registered_manufacturers(tx)
            wanted = self._authority.issuers, [record.der for record in manufacturers]
            if self._listed[0] is not wanted[0] or self._listed[1] != wanted[1]:
                issuing = [item.der for item in wanted[0] if item.kind == IssuerKind.ISSUING]
                self._listed = (*wanted, client_certificates.pem_bundle([*issuing, *wanted[1]]))
            if not path.exists() or path.read_bytes() != self._listed[2]:
                replace_file(path, self._listed[2])
