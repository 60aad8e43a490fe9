"""Link and password of new credentials, shown once, with the text to pass on, which the command line prints, too."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from core.errors import PortalError
from delivery.formats import BundleFormat
from onboarding_portal.handover import Trust, text_to_pass_on
from web.console.pages import Shown, Visit
from web.console.qr import qr_code
from workflows.credentials import CredentialAnswer

if TYPE_CHECKING:
    from operations.wiring import Portal


def handed_over(
    visit: Visit, issued: CredentialAnswer, name: str, *, is_renewal: bool = False, back: str | None = None
) -> Shown:
    """Return the page that shows new credentials, which no browser keeps; ``back`` is that of an application's list."""
    link, values = issued.download_url, {"issued": issued, "name": name, "is_renewal": is_renewal, "back": back}
    if link is None:  # for a CSR there is the certificate, and nothing that is secret
        return Shown("credentials.html", {**values, "code": None, "text": ""}, status=201)
    until = "" if issued.download_expires_at is None else f"{issued.download_expires_at:%Y-%m-%d %H:%M:%S} UTC"
    trust, file = trust_of(visit.portal), _file_behind(visit.portal, link, issued.device_id)
    text = "\n".join(text_to_pass_on(link, file, trust, name=name, until=until))
    values |= {"code": qr_code(link), "text": text, "along": trust.ca_file}
    return Shown("credentials.html", values, status=201)


def trust_of(portal: Portal) -> Trust:
    """Return how somebody without an account verifies the portal at its public URL."""
    settings = portal.settings
    if not settings.public_url.startswith("https:") or settings.trusted_proxies or settings.bind.is_unix:
        return Trust()  # a front server's certificate, which browsers know
    if settings.tls_certificate is not None:
        return Trust(ca_file=settings.https_ca_file)
    return Trust(portal.authority.current.https_fingerprint)


def _file_behind(portal: Portal, link: str, device_id: str) -> str:
    """Return what a bundle is called; once it was fetched, as if it were a ZIP."""
    found = BundleFormat.ZIP
    with contextlib.suppress(PortalError):
        found = BundleFormat(portal.deliveries.check_download(link.rpartition("/")[2]).format)
    return f"{device_id}.{found.extension}"
