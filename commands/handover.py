"""What is passed on to who sets up a device: the link, and the commands that fetch and open its bundle."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from commands.context import Remote
from commands.errors import CheckFailed, CliError, Unreachable
from onboarding_portal import VERSION
from onboarding_portal.handover import Trust, base_of, text_to_pass_on

if TYPE_CHECKING:
    from commands.client import Client

SECONDS = 5.0  # that what is only for the block may take
MAX_CERTIFICATE = 64 * 1024  # bytes


class RootFingerprint(click.ParamType[str]):
    """The SHA-256 fingerprint of a certificate: 64 hexadecimal digits, with colons or without."""

    name = "sha256"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the digits in lower case."""
        digits = value.replace(":", "").lower()
        if not re.fullmatch("[0-9a-f]{64}", digits):
            self.fail("a fingerprint has 64 hexadecimal digits.", param, ctx)
        return digits


FINGERPRINT = click.option(
    "--fingerprint",
    type=RootFingerprint(),
    metavar="SHA256",
    help="Trust the portal by the fingerprint of its root certificate, in place of --ca-file.",
)


# --- Whom the recipient trusts ------------------------------------------------------------------------------------


def trust_at(portal: Remote, base: str) -> Trust:
    """Return how the portal is verified at the URL in its links, which may be another than the operator's."""
    ca_file = portal.settings.ca_file
    if ca_file is None or not base.startswith("https:"):
        return Trust()
    client = _hasty_client(portal)
    try:
        served = [root for root in _roots(ca_file) if _is_served(client, base, root)]
    except CliError:
        # Not by the operator's CA: behind a front server, or not to be reached from here.
        return Trust() if base != portal.settings.url else Trust(ca_file=ca_file)
    if not served:
        return Trust(ca_file=ca_file)
    leading = served if len(served) == 1 else [root for root in served if _leads_to(base, root)]
    return Trust(sha256(leading[0] if leading else served[0]).hexdigest())


def _hasty_client(portal: Remote) -> Client:
    from commands.client import Client  # imported by what makes a call

    return Client(portal.settings, version=VERSION, patience=SECONDS)


def _roots(ca_file: Path) -> Sequence[bytes]:
    """Return the self-signed certificates in a file, each in DER."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        found = x509.load_pem_x509_certificates(ca_file.read_bytes())
    except (OSError, ValueError):
        return ()
    return [one.public_bytes(Encoding.DER) for one in found if one.subject == one.issuer]


def _is_root(der: bytes) -> bool:
    from cryptography import x509

    try:
        found = x509.load_der_x509_certificate(der)
    except ValueError:
        return False
    return found.subject == found.issuer


def _is_served(client: Client, base: str, root: bytes) -> bool:
    answer = client.get_public(f"{base}/ca/{sha256(root).hexdigest()}.cer")
    return answer.status == 200 and answer.body == root


def _leads_to(base: str, root: bytes) -> bool:
    """Tell whether the server's certificate verifies by this root alone, while there are two of them."""
    import socket
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=root)
    parts = urlsplit(base)
    host = parts.hostname or ""
    with (
        contextlib.suppress(OSError),
        socket.create_connection((host, parts.port or 443), timeout=SECONDS) as plain,
        context.wrap_socket(plain, server_hostname=host),
    ):
        return True
    return False


def trust_by_fingerprint(portal: Remote, link: str, fingerprint: str) -> None:
    """Fetch the root certificate with this fingerprint, and verify the portal by it from now on.

    It is fetched from a server that nothing verifies yet, which is no harm: no other certificate has this SHA-256.
    Raises ``CheckFailed`` if the server has none, ``Unreachable``.
    """
    import ssl
    import tempfile
    import warnings

    import requests
    from urllib3.exceptions import HTTPError, InsecureRequestWarning

    base = base_of(link)
    try:
        with contextlib.closing(requests.Session()) as session, warnings.catch_warnings():
            warnings.simplefilter("ignore", InsecureRequestWarning)
            session.trust_env = False
            answer = session.get(
                f"{base}/ca/{fingerprint}.cer", verify=False, timeout=SECONDS, allow_redirects=False, stream=True
            )
            der = answer.raw.read(MAX_CERTIFICATE, decode_content=True)
    except (requests.RequestException, HTTPError):
        raise Unreachable(f"The portal does not answer at {base}.", hints=["Check the link and the network."]) from None
    if sha256(der).hexdigest() != fingerprint:
        raise CheckFailed(
            f"The server at {base} has no root certificate with this fingerprint, so it may be another than the portal;"
            " the link was not used.",
            hints=[
                "Check that link and fingerprint were copied whole; ask whoever sent them."
                if base.startswith("https:")
                else f"The portal speaks HTTPS; the link must begin with https:{base.partition(':')[2]}"
            ],
        )
    if not _is_root(der):
        raise CheckFailed(
            "This is the fingerprint of a certificate that is not the root's, so it cannot verify the portal;"
            " the link was not used.",
            hints=["Ask for the fingerprint of the portal's root certificate, the last one in its ca.pem."],
        )
    with tempfile.NamedTemporaryFile("w", suffix=".pem", delete=False) as file:
        file.write(ssl.DER_cert_to_PEM_cert(der))
    portal.trust(Path(file.name))


# --- The block ----------------------------------------------------------------------------------------------------


def show_handover(portal: Remote, link: str, *, name: str, device_id: str, until: str) -> None:
    """Print what to pass on: the link, what to do with it, never the password."""
    trust, file = trust_at(portal, base_of(link)), _file_behind(portal, link) or f"{device_id}.zip"
    lines = text_to_pass_on(link, file, trust, name=name, until=until)
    portal.out.block("Pass this on, and the password by another way:", lines)
    if trust.ca_file is not None:
        portal.out.note(f"Send {trust.ca_file} along: the portal is verified by it.")


def _file_behind(portal: Remote, link: str) -> str | None:
    with contextlib.suppress(CliError):
        return _hasty_client(portal).file_behind(link)
    return None
