"""How a certificate is issued and delivered, and the command that registers a device."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from commands.context import (
    EXTERNAL_ID,
    FORCE_HELP,
    GROUPS,
    PROFILE,
    Remote,
    check_secret_seen,
    command,
    metadata_from,
    option_group,
    require,
    topics_from,
    trusted_of_broker,
    warn_of_restart,
)
from commands.delivery import Password, fetch, show_files, summary, unpack_fetched
from commands.errors import CliError, ConnectionLost, Refused
from commands.files import Folder, NewFile, ReservedFile, read_input, read_secret, write_new
from commands.handover import show_handover
from commands.links import check_link, key_of_download, new_idempotency_key
from commands.output import Cell, moment, text
from commands.times import VALIDITY
from commands.vocabulary import (
    CA,
    CERTIFICATE,
    CHAIN,
    CLIENT_CONFIGURATION,
    FILES,
    FORMATS,
    KEY,
    KEY_STAYS_ENCRYPTED,
    KEY_TYPES,
    P12,
    README,
)

_AGAIN = "It may have succeeded; to find out, and get the answer, repeat the command with --idempotency-key "
SAVED_PASSWORD = "bundle-password.txt"  # noqa: S105 - the name of a file
CERTIFICATE_FILES = (CERTIFICATE, CHAIN, CA)


@dataclass(frozen=True, slots=True)
class Operation:
    """A request to the portal that issues a certificate, and the words that describe its progress.

    ``about`` is the name of the id in the answer, ``show`` the command that shows what has that id; ``names_known``:
    what has that id was there before.
    """

    path: str
    doing: str
    done: str
    is_done: str
    about: str = "device_id"
    show: str = "portal show"
    names_known: bool = False


@dataclass(frozen=True, slots=True)
class DeliveryOptions:
    """The options that say how the credentials are delivered."""

    csr: str | None
    password_file: str | None
    password_out: str | None
    out: Path | None
    force: bool
    idempotency_key: str | None


# The options that the commands share that ask for a certificate; ``issue`` reads them.
issuing_options = option_group(
    click.option("--key-type", type=click.Choice(KEY_TYPES), help="Type of key.  [default: the portal's]"),
    VALIDITY,
    click.option("--format", "bundle_format", type=click.Choice(FORMATS), help="Bundle format.  [default: zip]"),
    click.option(
        "--csr", metavar="FILE", help="CSR (PKCS#10, PEM or DER) for a key of its own; the portal then makes no key."
    ),
    click.option("--password-file", metavar="FILE", help="Use the bundle password in FILE; - for standard input."),
    click.option("--password-out", metavar="FILE", help="Write the generated bundle password to FILE (new, 0600)."),
    click.option("--out", metavar="FOLDER", type=click.Path(path_type=Path), help="Download and unpack into FOLDER."),
    click.option("--force", is_flag=True, help=FORCE_HELP),
    click.option("--idempotency-key", metavar="KEY", help="Repeat an earlier call (24 hours) and get its answer."),
)


@command(
    "register",
    examples=[
        "portal register sensor-7 --type thermometer --location 'Hall 2' --firmware 1.4.2",
        "portal register sensor-7 --type thermometer --location 'Hall 2' --firmware 1.4.2 --out sensor-7",
        "portal register sensor-7 --type … --location … --firmware … --topic 'devices/{id}/#:readwrite'",
        "portal register sensor-7 --type … --location … --firmware … --csr sensor-7.csr --out sensor-7",
    ],
)
@click.argument("name", help="Name of the device.")
@click.option("--type", metavar="TYPE", required=True, help="Type of the device.")
@click.option("--location", metavar="PLACE", required=True, help="Location of the device.")
@click.option("--firmware", metavar="VERSION", required=True, help="Firmware version of the device.")
@click.option("--metadata", metavar="KEY=VALUE", multiple=True, help="Additional information. Repeatable.")
@click.option(
    "--topic",
    "topics",
    metavar="FILTER:ACCESS",
    multiple=True,
    help="MQTT topic filter, and read, write or readwrite; {id} is replaced by the device id. Repeatable.",
)
@PROFILE
@GROUPS
@EXTERNAL_ID
@issuing_options
def register(
    portal: Remote, /, metadata: tuple[str, ...], topics: tuple[str, ...], groups: tuple[str, ...], **options: Any
) -> None:
    """Register a device: certificate, topics, credential bundle.

    The portal answers with a one-time link to the device's encrypted bundle. The bundle password is shown once; send
    it to the device on a different channel than the link.
    """
    given = {"metadata": metadata_from(metadata), "topics": topics_from(topics), "groups": list(groups)}
    options |= {field: value for field, value in given.items() if value}
    issue(portal, Operation("/register", "Registering…", "Registered", "is registered"), options)


def issue(portal: Remote, operation: Operation, options: dict[str, Any]) -> None:
    """Send the request and deliver what the portal issues: a bundle, or a certificate for a CSR."""
    delivery = DeliveryOptions(**{name: options.pop(name) for name in DeliveryOptions.__dataclass_fields__})
    body = {field: value for field, value in options.items() if value is not None}
    if delivery.csr is not None and (
        {"key_type", "bundle_format"} & set(body) or delivery.password_file or delivery.password_out
    ):
        excluded = "--key-type, --format, --password-file or --password-out"
        raise click.UsageError(f"--csr cannot be used with {excluded}: there is no bundle.")
    if delivery.password_file and delivery.password_out:
        raise click.UsageError("Use --password-file to choose a password, or --password-out to save a generated one.")
    if delivery.csr is not None:
        _issue_for_csr(portal, operation, body, read_input(delivery.csr), delivery)
    else:
        _issue_bundle(portal, operation, body, delivery)


def _issue_bundle(portal: Remote, operation: Operation, body: dict[str, Any], delivery: DeliveryOptions) -> None:
    """Let the portal make key and bundle; unpack it into the folder of ``--out``, or show its link."""
    chosen = read_secret(delivery.password_file, "password") if delivery.password_file else None
    needed = delivery.out is None or body.get("bundle_format") in KEY_STAYS_ENCRYPTED
    if chosen is not None:
        body["bundle_password"] = chosen
    elif needed:
        check_secret_seen(delivery.password_out, "--password-out", "bundle password", out=portal.out)
    sent = delivery.idempotency_key or new_idempotency_key()
    with _targets(delivery, FILES) as (folder, password_file), _said_to_be_repeatable(portal, sent):
        answer = _post(portal, operation, body, sent)
        require(answer, operation.about, "download_url")
        # A chosen password is known to the caller, so it is not shown again.
        password = str(answer.pop("bundle_password", None) or "")
        if password_file is not None:
            require({"bundle_password": password or None}, "bundle_password")
            password_file.write(password)
        if folder is not None:
            keep_password = chosen is None and password_file is None
            with _undelivered(portal, operation, answer[operation.about], password if keep_password else "", folder):
                answer["files"] = _unpack(portal, answer, chosen or password, folder, key_of_download(sent))
                needed = _is_key_encrypted(folder.path)  # the format may be that of the tenant
    shown = password if chosen is None and needed and password_file is None else ""
    _show(portal, operation, answer, shown, delivery.password_out)


def _is_key_encrypted(folder: Path) -> bool:
    """Return whether the key in a folder needs the bundle password still."""
    return (folder / P12).exists() or b"ENCRYPTED" in (folder / KEY).read_bytes()


def _unpack(portal: Remote, answer: dict[str, Any], password: str, folder: Folder, key: str) -> dict[str, Any]:
    link = check_link(answer["download_url"])
    try:
        content, kept = fetch(portal, link, folder.path, key)
    except CliError as error:
        again = f"portal download {shlex.quote(link)} --idempotency-key {key}"
        error.hints = (*error.hints, f"Download it within a few minutes with: {again}")
        raise
    return unpack_fetched(portal, content, kept, Password(password), folder=folder, force=True)


@contextlib.contextmanager
def _undelivered(portal: Remote, operation: Operation, device_id: str, password: str, folder: Folder) -> Iterator[None]:
    """Say that the request itself succeeded if the delivery fails, and save a password that is shown nowhere."""
    try:
        yield
    except CliError as error:
        portal.out.warning(f"{device_id} {operation.is_done}, but its bundle is not unpacked.")
        if password:
            path = folder.path / SAVED_PASSWORD
            write_new(path, NewFile(password.encode() + b"\n", 0o600), force=True)
            error.hints = (*error.hints, f"The bundle password is in {path}.")
        raise


def _issue_for_csr(
    portal: Remote, operation: Operation, body: dict[str, Any], csr: bytes, delivery: DeliveryOptions
) -> None:
    """Let the portal certify the key of a CSR; write the certificate into the folder of ``--out``, or print it."""
    from commands.bundle import certificates_only, check_credentials
    from commands.csr import CsrFile

    own = CsrFile.of(csr)
    body["csr"] = own.pem
    sent = delivery.idempotency_key or new_idempotency_key()
    files = (*CERTIFICATE_FILES, CLIENT_CONFIGURATION)
    with _targets(delivery, files) as (folder, _), _said_to_be_repeatable(portal, sent):
        answer = _post(portal, operation, body, sent)
        require(answer, operation.about, "certificate", "chain")
        certificate, chain = answer["certificate"], answer["chain"]
        if not chain.strip().startswith(certificate.strip()):
            chain = f"{certificate.rstrip()}\n{chain}"
        ca = trusted_of_broker(portal)
        checked = check_credentials(
            own.has_key, certificate=certificate.encode(), chain=chain.encode(), ca=ca, now=datetime.now(UTC)
        )
        if folder is not None:
            contents = dict(zip(CERTIFICATE_FILES, (certificate.encode(), chain.encode(), ca), strict=True))
            written = {name: NewFile(certificates_only(pem)) for name, pem in contents.items()}
            if operation.about == "device_id":
                written |= _client_configuration(portal, str(answer["device_id"]))
            folder.write(written)
            answer["files"] = summary(checked, folder.path, written)
    if not portal.out.as_json and folder is None:
        portal.out.done(_done(operation, answer))
        if operation.path == "/register":
            warn_of_restart(portal, answer)
        portal.out.raw(certificates_only(chain.encode()).decode())
        return
    _show(portal, operation, answer, "", None)


def _client_configuration(portal: Remote, device_id: str) -> dict[str, NewFile]:
    """Return the file that says where the broker is; none, with a warning, if the portal does not say it."""
    from commands.snippets import client_options

    try:
        device = portal.client.call("GET", f"/devices/{device_id}").json()
        return {CLIENT_CONFIGURATION: NewFile(client_options(device).encode())}
    except CliError as error:  # the certificate is there all the same
        portal.out.warning(f"{CLIENT_CONFIGURATION} is not written. {error.sentence}")
        return {}


@contextlib.contextmanager
def _targets(delivery: DeliveryOptions, names: tuple[str, ...]) -> Iterator[tuple[Folder | None, ReservedFile | None]]:
    """Prepare where the results are written before the request is sent; ``None`` if not asked for."""
    folder = Folder(delivery.out, names, force=delivery.force) if delivery.out is not None else None
    password_file = None
    try:
        password_file = ReservedFile(Path(delivery.password_out)) if delivery.password_out is not None else None
        yield folder, password_file
    finally:
        if password_file is not None:
            password_file.discard()
        if folder is not None:
            folder.leave()


@contextlib.contextmanager
def _said_to_be_repeatable(portal: Remote, key: str) -> Iterator[None]:
    """Say after Ctrl-C in the block how to see what became of the request, and to get its answer."""
    try:
        yield
    except KeyboardInterrupt:
        portal.client.unfinished = None  # what is said of that is said here
        portal.out.warning(f"{_AGAIN}{key}")
        raise


def _post(portal: Remote, operation: Operation, body: dict[str, Any], sent: str) -> dict[str, Any]:
    try:
        with portal.out.working(operation.doing):
            return portal.client.call("POST", operation.path, body=body, headers={"Idempotency-Key": sent}).json()
    except (ConnectionLost, Refused) as error:
        if isinstance(error, ConnectionLost) or error.status >= 500:
            hint = f"{_AGAIN}{sent}"
            error.hints = (*error.hints, hint)
        raise


def _done(operation: Operation, answer: dict[str, Any]) -> str:
    name, about = answer.get("name"), answer[operation.about]
    if not name:
        return f"{operation.done} {about}"
    return f"{operation.done} {name} ({about})" if operation.names_known else f"{operation.done} {name} as {about}"


def _show(
    portal: Remote, operation: Operation, answer: dict[str, Any], password: str, password_out: str | None
) -> None:
    out, files = portal.out, answer.get("files")
    if out.as_json:
        out.json(answer | ({"bundle_password": password} if password else {}))
        return
    out.done(_done(operation, answer))
    if operation.path == "/register":
        warn_of_restart(portal, answer)
    until = answer.get("previous_valid_until")
    if files:
        show_files(portal, files, about=operation.about)
        if until:
            out.fields({"previous_valid_until": moment(until)})
        if password:
            out.fields({"bundle_password": Cell(password, style="bold")})
            out.note("The device's key is encrypted with this password, which is shown only once.")
        if CLIENT_CONFIGURATION in files["files"] and README not in files["files"]:
            out.note(f"{CLIENT_CONFIGURATION} says how to connect; put the key of the CSR beside it as {KEY}.")
        out.next_step(f"{operation.show} {answer[operation.about]}")
        return
    fields = {
        operation.about: text(answer[operation.about]),
        "fingerprint": text(answer.get("fingerprint")),
        "expires_at": moment(answer.get("expires_at"), expiry=True),
    }
    if until:
        fields["previous_valid_until"] = moment(until)
    fields["download_url"] = text(answer.get("download_url"))
    fields["download_expires_at"] = moment(answer.get("download_expires_at"))
    if password:
        fields["bundle_password"] = Cell(password, style="bold")
    out.fields(fields)
    if password:
        out.note("The password is shown only once; send it on a different channel than the link.")
    elif password_out:
        out.note(f"The bundle password is in {password_out}.")
    until = fields["download_expires_at"].shown.partition(" (")[0]
    show_handover(
        portal,
        str(answer["download_url"]),
        name=str(answer.get("name") or answer[operation.about]),
        device_id=str(answer[operation.about]),
        until=until,
    )
