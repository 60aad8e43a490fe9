"""What a device has to know to connect to its broker, told to its certificate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from core.errors import ClientCertificateRefused
from core.states import ClientKind, renewable_from
from core.topics import Access, expand
from web.api.device_clients import client_of, used
from web.api.devices import BrokerAddressModel
from web.api.fields import Fingerprint, Hex
from web.api.routing import ANYONE, AnswerModel, Call, Routes, Timestamp, share_of
from workflows.bundles import broker_trust
from workflows.enrolment.clients import DeviceClient

ROUTES = Routes("Enrolment by devices")
# Networks forget a connection that is silent for some minutes. The broker notices a lost device after 1.5 times this.
KEEP_ALIVE_SECONDS = 60
Filters = Annotated[list[str], Field(description="Topic filters, with the id in the place of `{id}`")]


class TlsModel(AnswerModel):
    """How to verify the broker: its certificate by `ca` (PEM) and by its host's name."""

    ca: str
    min_version: Literal["1.2", "1.3"]


class ShownCertificateModel(AnswerModel):
    """The certificate that the request was made with; from `renewable_from` on it may be renewed."""

    serial_number: Hex
    fingerprint: Fingerprint
    not_before: Timestamp
    not_after: Timestamp
    renewable_from: Timestamp


class RenewalModel(AnswerModel):
    """Where to renew (RFC 7030 section 4.2.2), and how long the previous certificate keeps working after that."""

    url: str
    overlap_hours: int


class DeviceConfiguration(AnswerModel):
    """What a device has to know to connect. Try the brokers in their order.

    The broker takes the client id from the certificate: it is `client_id`, whatever a client sends. A second connection
    ends the first. `publish` and `subscribe` are empty while the broker denies the device everything.
    """

    client_id: str
    kind: Literal["device", "application"]
    name: str
    brokers: list[BrokerAddressModel]
    tls: TlsModel
    keep_alive_seconds: int
    publish: Filters
    subscribe: Filters
    certificate: ShownCertificateModel
    renewal: RenewalModel


@ROUTES.add("GET", "/.well-known/onboarding/config", ANYONE, errors=(403, 429, 503))
def device_configuration(call: Call) -> DeviceConfiguration:
    """Tell a device by its TLS client certificate how to connect to the broker, and what it may do there."""
    holder = client_of(call)
    if not isinstance(holder, DeviceClient):
        raise ClientCertificateRefused(
            "Ask with the certificate that the portal has issued for the device as the TLS client certificate."
            if holder is None
            else "The client certificate was not issued by this portal; enrol first, and ask with the new one."
        )
    with share_of(call.portal, holder.tenant_id):
        return _told(call, holder)


def _told(call: Call, holder: DeviceClient) -> DeviceConfiguration:
    used(call, holder)
    settings, shown = call.portal.settings, holder.certificate
    details = call.portal.inventory.device(holder.tenant_id, holder.device_id, kind=holder.kind)
    topics = () if details.problem else details.topics
    opens = renewable_from(shown.not_before, shown.not_after, from_percent=settings.renewal_from)
    return DeviceConfiguration(
        client_id=holder.device_id,
        kind="application" if holder.kind is ClientKind.APPLICATION else "device",
        name=details.device.name,
        brokers=[
            BrokerAddressModel(host=one.host, port=one.port) for one in settings.broker_addresses_of(holder.tenant_id)
        ],
        tls=TlsModel.model_validate(
            {
                "ca": broker_trust(settings, call.portal.authority.of(holder.tenant_id).ca_pem),
                "min_version": settings.mqtt_tls,
            }
        ),
        keep_alive_seconds=KEEP_ALIVE_SECONDS,
        publish=[expand(one, holder.device_id) for one in topics if one.access is not Access.READ],
        subscribe=[expand(one, holder.device_id) for one in topics if one.access is not Access.WRITE],
        certificate=ShownCertificateModel.of(shown, renewable_from=opens),
        renewal=RenewalModel(
            url=f"{settings.public_url}/.well-known/est/simplereenroll", overlap_hours=settings.renewal_overlap_hours
        ),
    )
