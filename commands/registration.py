"""The commands that give a device its certificate: register and renew."""

from __future__ import annotations

import contextlib
import secrets
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from commands.bundle import CA, CERTIFICATE, CHAIN, FILES, FORMATS, certificates_only, check_credentials, csr_public_key
from commands.client import check_link
from commands.context import DEVICE_ID, Command, Portal, metadata_from, new_secret_file, require, topics_from
from commands.delivery import Password, fetch, show_files, summary, unpack_fetched
from commands.errors import CliError, ConnectionLost, Refused
from commands.files import Folder, NewFile, ReservedFile, read_input, read_secret, write_new
from commands.output import Cell, moment, text

KEY_TYPES = ("ec-p256", "ec-p384", "ed25519", "rsa-2048", "rsa-3072")
LOST_PASSWORD = "bundle-password.txt"  # noqa: S105 - the name of a file
NEW_CERTIFICATE = (CERTIFICATE, CHAIN, CA)


@dataclass(frozen=True)
class Asking:
    """What the portal is asked to do, in the words that go with it."""

    path: str
    doing: str
    done: str
    is_done: str


REGISTRATION = Asking("/register", "Registering…", "Registered", "is registered")


@dataclass(frozen=True)
class Places:
    """Where the results go, made ready before the portal is asked; ``None`` where it was not wanted."""

    folder: Folder | None
    password_file: ReservedFile | None


@click.command(
    "register",
    cls=Command,
    examples=[
        "portal register sensor-7 --type thermometer --location 'Hall 2' --firmware 1.4.2",
        "portal register sensor-7 --type thermometer --location 'Hall 2' --firmware 1.4.2 --out sensor-7",
        "portal register sensor-7 --type … --location … --firmware … --topic 'devices/{id}/#:readwrite'",
        "portal register sensor-7 --type … --location … --firmware … --csr sensor-7.csr --out sensor-7",
    ],
)
@click.argument("name", help="What people call the device.")
@click.option("--type", "type_", metavar="TYPE", required=True, help="What kind of device it is.")
@click.option("--location", metavar="PLACE", required=True, help="Where it stands.")
@click.option("--firmware", metavar="VERSION", required=True, help="The firmware that it runs.")
@click.option("--metadata", metavar="KEY=VALUE", multiple=True, help="Anything else to remember; may be repeated.")
@click.option(
    "--topic",
    "topics",
    metavar="FILTER:ACCESS",
    multiple=True,
    help="What it may do: read, write or readwrite; {id} stands for its id. May be repeated.",
)
@click.option("--key-type", type=click.Choice(KEY_TYPES), help="Kind of key; the portal's default if not given.")
@click.option("--days", type=click.IntRange(1, 36500), metavar="DAYS", help="Life of its certificate.")
@click.option("--format", "format_", type=click.Choice(FORMATS), help="How the bundle is packed; zip if not given.")
@click.option("--csr", metavar="FILE", help="The device's own request (PKCS#10, PEM); its key stays where it is.")
@click.option(
    "--password-file", metavar="FILE", help="File with a password to use for the bundle; - for standard input."
)
@click.option("--password-out", metavar="FILE", help="New file (0600) for the password that the portal made.")
@click.option("--out", metavar="FOLDER", type=click.Path(path_type=Path), help="Fetch and unpack at once, into FOLDER.")
@click.option("--force", is_flag=True, help="Replace files that are there.")
@click.option(
    "--idempotency-key", metavar="KEY", help="Repeat an earlier call within 24 hours, to get its answer again."
)
@click.pass_obj
def register(
    portal: Portal,
    name: str,
    type_: str,
    location: str,
    firmware: str,
    metadata: tuple[str, ...],
    topics: tuple[str, ...],
    key_type: str | None,
    days: int | None,
    format_: str | None,
    csr: str | None,
    password_file: str | None,
    password_out: str | None,
    out: Path | None,
    force: bool,
    idempotency_key: str | None,
) -> None:
    """Register a device: a certificate, its topics, a bundle.

    The portal answers with a one-time link to the device's bundle. The password that opens it is shown once, here;
    send it to the device by another way than the link.
    """
    if csr is not None and (key_type or format_ or password_file or password_out):
        options = "--key-type, --format, --password-file or --password-out"
        raise click.UsageError(f"With --csr there is no bundle, so no {options}.")
    if password_file and password_out:
        raise click.UsageError("Give --password-file for a password of your own, or --password-out for the portal's.")
    body: dict[str, Any] = {"name": name, "type": type_, "location": location, "firmware": firmware}
    optional = {
        "metadata": metadata_from(metadata),
        "topics": topics_from(topics),
        "key_type": key_type,
        "validity_days": days,
        "bundle_format": format_,
        "bundle_password": read_secret(password_file, "password") if password_file else None,
    }
    body |= {field: value for field, value in optional.items() if value}
    if csr is not None:
        ask_by_csr(portal, REGISTRATION, body, read_input(csr), out, force, idempotency_key)
    else:
        ask_for_bundle(portal, REGISTRATION, body, password_out, out, force, idempotency_key)


def ask_for_bundle(
    portal: Portal,
    asking: Asking,
    body: dict[str, Any],
    password_out: str | None,
    out: Path | None,
    force: bool,
    key: str | None,
) -> None:
    """Have the portal make key and bundle; fetch and unpack it where ``out`` is a folder, and show the rest."""
    chosen = "bundle_password" in body
    if not chosen and out is None:
        new_secret_file(password_out, "--password-out", "bundle's password", out=portal.out)
    with _places(out, FILES, None if chosen else password_out, force=force) as places:
        answer = _post(portal, asking, body, key)
        require(answer, "device_id", "download_url")
        # What was chosen is known to who chose it, so it is not shown again.
        password = str(answer.pop("bundle_password", None) or "")
        if places.password_file is not None:
            require({"bundle_password": password or None}, "bundle_password")
            places.password_file.write(password)
        if places.folder is not None:
            opener = body["bundle_password"] if chosen else password
            answer["files"] = _deliver(portal, asking, answer, opener, places, show=not chosen)
    shown = "" if chosen or places.folder or places.password_file else password
    _show(portal, asking, answer, shown, password_out)


def _deliver(
    portal: Portal, asking: Asking, answer: dict[str, Any], password: str, places: Places, *, show: bool
) -> dict[str, Any]:
    folder = places.folder
    if folder is None:
        return {}
    link = check_link(answer["download_url"])
    hints: tuple[str, ...] = (f"Fetch it with: portal download {shlex.quote(link)}",)
    try:
        content, kept = fetch(portal, link, folder.path)
        hints = ()
        return unpack_fetched(portal, content, kept, Password(password), folder=folder, force=True)
    except CliError as error:
        portal.out.warning(f"{answer['device_id']} {asking.is_done}, but its bundle is not unpacked.")
        if show and places.password_file is None:
            path = folder.path / LOST_PASSWORD
            write_new(path, NewFile(password.encode() + b"\n", 0o600), force=True)
            hints = (*hints, f"The bundle's password is kept in {path}.")
        error.hints = (*error.hints, *hints)
        raise


def ask_by_csr(
    portal: Portal, asking: Asking, body: dict[str, Any], csr: bytes, out: Path | None, force: bool, key: str | None
) -> None:
    """Have the portal certify the key of a CSR; write what it answers where ``out`` is a folder."""
    public_key = csr_public_key(csr)
    body["csr"] = csr.decode("ascii", "replace")
    with _places(out, NEW_CERTIFICATE, None, force=force) as places:
        answer = _post(portal, asking, body, key)
        require(answer, "device_id", "certificate", "chain")
        certificate, chain = answer["certificate"], answer["chain"]
        if not chain.strip().startswith(certificate.strip()):
            chain = f"{certificate.rstrip()}\n{chain}"
        ca = portal.client.call("GET", "/ca.pem", anonymous=True).body
        checked = check_credentials(
            public_key, certificate=certificate.encode(), chain=chain.encode(), ca=ca, now=datetime.now(UTC)
        )
        if places.folder is not None:
            contents = dict(zip(NEW_CERTIFICATE, (certificate.encode(), chain.encode(), ca), strict=True))
            places.folder.write({name: NewFile(certificates_only(pem)) for name, pem in contents.items()})
            answer["files"] = summary(checked, places.folder.path, contents)
    if not portal.out.as_json and places.folder is None:
        portal.out.done(_done(asking, answer))
        portal.out.raw(certificates_only(chain.encode()).decode())
        return
    _show(portal, asking, answer, "", None)


@contextlib.contextmanager
def _places(out: Path | None, names: tuple[str, ...], password_out: str | None, *, force: bool) -> Iterator[Places]:
    folder = Folder(out, names, force=force) if out is not None else None
    password_file = None
    try:
        password_file = ReservedFile(Path(password_out)) if password_out is not None else None
        yield Places(folder, password_file)
    finally:
        if password_file is not None:
            password_file.discard()
        if folder is not None:
            folder.leave()


def _post(portal: Portal, asking: Asking, body: dict[str, Any], key: str | None) -> dict[str, Any]:
    # 192 random bits: the portal seals the answer under this key.
    sent = key or secrets.token_urlsafe(24)
    try:
        with portal.out.working(asking.doing):
            return portal.client.call("POST", asking.path, body=body, headers={"Idempotency-Key": sent}).json()
    except (ConnectionLost, Refused) as error:
        if isinstance(error, ConnectionLost) or error.status >= 500:
            hint = f"It may have been done; to find out, repeat the command with --idempotency-key {sent}"
            error.hints = (*error.hints, hint)
        raise


def _previous(answer: dict[str, Any]) -> dict[str, Cell]:
    until = answer.get("previous_valid_until")
    return {"previous_valid_until": moment(until)} if until else {}


def _done(asking: Asking, answer: dict[str, Any]) -> str:
    name = answer.get("name")
    return f"{asking.done} {name} as {answer['device_id']}" if name else f"{asking.done} {answer['device_id']}"


def _show(portal: Portal, asking: Asking, answer: dict[str, Any], password: str, password_out: str | None) -> None:
    out, files = portal.out, answer.get("files")
    if out.as_json:
        out.json(answer | ({"bundle_password": password} if password else {}))
        return
    out.done(_done(asking, answer))
    if files:
        show_files(portal, files)
        out.next_step(f"portal show {answer['device_id']}")
        return
    fields = {
        "device_id": text(answer["device_id"]),
        "fingerprint": text(answer.get("fingerprint")),
        "expires_at": moment(answer.get("expires_at"), expiry=True),
        **_previous(answer),
        "download_url": text(answer.get("download_url")),
        "download_expires_at": moment(answer.get("download_expires_at")),
    }
    if password:
        fields["bundle_password"] = Cell(password, style="bold")
    out.fields(fields)
    if password:
        out.note("The password is shown this once; send it by another way than the link.")
    elif password_out:
        out.note(f"The bundle's password is in {password_out}.")
    out.next_step(f"portal download {shlex.quote(str(answer['download_url']))}")


@click.command(
    "renew",
    cls=Command,
    examples=[
        "portal renew 0f9d2c4e-5b1a-4c7d-9e8f-102030405060 --out sensor-7-new",
        "portal renew 0f9d2c4e-5b1a-4c7d-9e8f-102030405060 --csr sensor-7.csr --out sensor-7-new",
        "portal renew 0f9d2c4e-5b1a-4c7d-9e8f-102030405060 --overlap-hours 0",
    ],
)
@click.argument("device_id", metavar="ID", type=DEVICE_ID, help="The device's id, in full.")
@click.option("--key-type", type=click.Choice(KEY_TYPES), help="Kind of key; the portal's default if not given.")
@click.option("--days", type=click.IntRange(1, 36500), metavar="DAYS", help="Life of the new certificate.")
@click.option(
    "--overlap-hours",
    type=click.IntRange(0, 8760),
    metavar="HOURS",
    help="How long the old one goes on; 0: not at all.",
)
@click.option("--when-used", is_flag=True, help="End the old one once the portal has seen the new one in use.")
@click.option("--format", "format_", type=click.Choice(FORMATS), help="How the bundle is packed; zip if not given.")
@click.option("--csr", metavar="FILE", help="The device's own request (PKCS#10, PEM); its key stays where it is.")
@click.option(
    "--password-file", metavar="FILE", help="File with a password to use for the bundle; - for standard input."
)
@click.option("--password-out", metavar="FILE", help="New file (0600) for the password that the portal made.")
@click.option("--out", metavar="FOLDER", type=click.Path(path_type=Path), help="Fetch and unpack at once, into FOLDER.")
@click.option("--force", is_flag=True, help="Replace files that are there.")
@click.option(
    "--idempotency-key", metavar="KEY", help="Repeat an earlier call within 24 hours, to get its answer again."
)
@click.pass_obj
def renew(
    portal: Portal,
    device_id: str,
    key_type: str | None,
    days: int | None,
    overlap_hours: int | None,
    when_used: bool,
    format_: str | None,
    csr: str | None,
    password_file: str | None,
    password_out: str | None,
    out: Path | None,
    force: bool,
    idempotency_key: str | None,
) -> None:
    """Give a device a new certificate; the old one goes on.

    The new one works at once, in a bundle as after a registration or for the device's own CSR. The old one works on
    until the overlap is over, a day if not told otherwise, and is then revoked.
    """
    if csr is not None and (key_type or format_ or password_file or password_out):
        options = "--key-type, --format, --password-file or --password-out"
        raise click.UsageError(f"With --csr there is no bundle, so no {options}.")
    if password_file and password_out:
        raise click.UsageError("Give --password-file for a password of your own, or --password-out for the portal's.")
    optional = {
        "key_type": key_type,
        "validity_days": days,
        "overlap_hours": overlap_hours,
        "revoke_previous": "when_used" if when_used else None,
        "bundle_format": format_,
        "bundle_password": read_secret(password_file, "password") if password_file else None,
    }
    body = {field: value for field, value in optional.items() if value is not None}
    asking = Asking(f"/devices/{device_id}/renew", "Renewing…", "Renewed", "is renewed")
    if csr is not None:
        ask_by_csr(portal, asking, body, read_input(csr), out, force, idempotency_key)
    else:
        ask_for_bundle(portal, asking, body, password_out, out, force, idempotency_key)
