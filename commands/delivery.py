"""The commands that download and unpack a device's credentials, without ever losing a bundle."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.context import FORCE_HELP, Remote, ask_secret, command
from commands.errors import BundleLocked, CheckFailed, CliError, ConnectionLost
from commands.files import Folder, NewFile, read_input, read_secret, require_writable, write_new
from commands.handover import FINGERPRINT, trust_by_fingerprint
from commands.links import check_link, new_idempotency_key
from commands.output import moment, text
from commands.vocabulary import FILES, FORMATS, README

if TYPE_CHECKING:
    from commands.bundle import Checked, DeviceBundle

PASSWORD_VARIABLE = "PORTAL_BUNDLE_PASSWORD"  # noqa: S105 - a name, not a password
ATTEMPTS = 3


OUT_HELP = "Folder for the files.  [default: the device id]"
PASSWORD_HELP = "File with the bundle password; - for standard input."  # noqa: S105 - a help text


@dataclass(frozen=True)
class Password:
    """The password of a bundle; if it was ``asked`` for, it may be asked for again."""

    text: str
    asked: bool = False

    def __repr__(self) -> str:
        return "Password()"


def bundle_password(password_file: str | None, *, before_asking: Callable[[], None] | None = None) -> Password:
    """Return the password from the file, the environment or the terminal.

    ``before_asking`` is called before the user has to type it, and raises if there is no use in that.
    """
    if password_file is not None:
        return Password(read_secret(password_file, "password"))
    if os.environ.get(PASSWORD_VARIABLE):
        return Password(os.environ[PASSWORD_VARIABLE])
    if before_asking is not None and sys.stdin.isatty():
        before_asking()
    return Password(_ask(), asked=True)


def _ask() -> str:
    return ask_secret("Bundle password", instead=f"add --password-file FILE, or set {PASSWORD_VARIABLE}")


def keep_bundle(content: bytes, where: Path) -> Path:
    """Save the encrypted bundle in a 0600 file, since its link works only once; raises ``CheckFailed``."""
    from commands.bundle import extension_of

    path = where / f"bundle-{sha256(content).hexdigest()[:8]}.{extension_of(content)}"
    write_new(path, NewFile(content, 0o600), force=True)
    return path


def unpack(portal: Remote, content: bytes, password: Password, *, folder: Folder | None, force: bool) -> dict[str, Any]:
    """Open, check and write a bundle, by default into a folder named after the device; return a summary for JSON.

    Raises ``CheckFailed`` (``BundleLocked`` for a wrong password) and writes nothing then.
    """
    from commands.bundle import check_bundle

    bundle = _open(portal, content, password)
    checked = check_bundle(bundle, now=datetime.now(UTC))
    folder = folder or Folder(Path(checked.device_id), FILES, force=force)
    folder.write(bundle.new_files())
    for note in bundle.notes:
        portal.out.warning(note)
    return summary(checked, folder.path, bundle.files)


def _open(portal: Remote, content: bytes, password: Password) -> DeviceBundle:
    from commands.bundle import open_bundle

    for _ in range(ATTEMPTS - 1):
        try:
            return open_bundle(content, password.text)
        except BundleLocked:
            if not password.asked or not sys.stdin.isatty():
                raise
            portal.out.warning("Wrong password; try again.")
            password = Password(_ask(), asked=True)
    return open_bundle(content, password.text)


def fetch(portal: Remote, link: str, where: Path, key: str, bundle_format: str | None = None) -> tuple[bytes, Path]:
    """Download the bundle and save it, encrypted, before anything else is done with it; uses the link up.

    Only the idempotency ``key`` can fetch it again, for a few minutes.
    """
    with portal.out.working("Downloading the bundle…"):
        content = portal.client.fetch_bundle(link, key, bundle_format)
    return content, keep_bundle(content, where)


def unpack_fetched(
    portal: Remote, content: bytes, kept: Path, password: Password, *, folder: Folder | None, force: bool
) -> dict[str, Any]:
    """Unpack what ``fetch`` saved; delete that file afterwards, or say where it is if something fails."""
    command = f"portal unpack {shlex.quote(str(kept))}"
    try:
        files = unpack(portal, content, password, folder=folder, force=force)
    except CliError as error:
        kept_in = f"The link is used up; the encrypted bundle is saved in {kept}."
        raise CheckFailed(error.sentence, hints=(*error.hints, kept_in, f"Try again: {command}")) from None
    except click.Abort:
        portal.out.warning(f"The link is used up; the encrypted bundle is saved. Continue with: {command}")
        raise
    kept.unlink(missing_ok=True)
    return files


def summary(checked: Checked, folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Return what was written where, for JSON."""
    return {
        "device_id": checked.device_id,
        "folder": str(folder.absolute()),
        "files": sorted(names),
        "fingerprint": checked.fingerprint,
        "serial_number": checked.serial_number,
        "expires_at": f"{checked.not_after:%Y-%m-%dT%H:%M:%SZ}",
        "trusts": checked.root,
    }


def show_files(portal: Remote, files: dict[str, Any], *, about: str = "device_id") -> None:
    """Show what was written; ``about`` is what the id is called."""
    portal.out.done("Key, certificate and chain match.")
    portal.out.done(f"Wrote {len(files['files'])} files to {files['folder']}")
    portal.out.fields(
        {
            about: text(files["device_id"]),
            "folder": text(files["folder"]),
            "files": text(" ".join(files["files"])),
            "fingerprint": text(files["fingerprint"]),
            "expires_at": moment(files["expires_at"], expiry=True),
        }
    )


@command(
    "download",
    examples=[
        "portal download 'https://127.0.0.1:8443/download/…'",
        "portal download 'https://…' --fingerprint 4f1c…",
        "portal download 'https://…' --out sensor-7 --password-file password.txt",
    ],
)
@click.argument("link", help="The one-time download link, in quotes.")
@click.option("--out", metavar="FOLDER", type=click.Path(path_type=Path), help=OUT_HELP)
@click.option("--password-file", metavar="FILE", help=PASSWORD_HELP)
@click.option("--force", is_flag=True, help=FORCE_HELP)
@FINGERPRINT
@click.option("--format", "bundle_format", type=click.Choice(FORMATS), help="Format.  [default: as registered]")
@click.option("--idempotency-key", metavar="KEY", help="Repeat a download that broke off a few minutes ago.")
def download(
    portal: Remote,
    link: str,
    out: Path | None,
    password_file: str | None,
    force: bool,
    fingerprint: str | None,
    bundle_format: str | None,
    idempotency_key: str | None,
) -> None:
    """Download a device's bundle, check it and unpack it.

    The link works once and needs no operator token. The password is read from the file, from PORTAL_BUNDLE_PASSWORD or
    from the terminal. Files are written only if key, certificate and chain match. If anything fails after the
    download, the encrypted bundle is saved for portal unpack. A download that breaks off is repeated. Without a CA file
    the portal is verified by the fingerprint that came with the link.
    """
    link = check_link(link)
    _ = portal.settings  # a wrong setting is reported before the password is asked for
    with _folder(out, force=force) as folder:
        if fingerprint is not None:
            trust_by_fingerprint(portal, link, fingerprint)
        key = idempotency_key or new_idempotency_key()
        password = bundle_password(password_file, before_asking=lambda: portal.client.check_link_works(link, key))
        try:
            content, kept = fetch(portal, link, folder.path if folder else Path(), key, bundle_format)
        except ConnectionLost as error:
            hint = f"The link may be used up; repeat the command within a few minutes with --idempotency-key {key}"
            error.hints = (*error.hints, hint)
            raise
        files = unpack_fetched(portal, content, kept, password, folder=folder, force=force)
    _show(portal, files)


@command(
    "unpack",
    connects=False,
    examples=[
        "portal unpack bundle-1f2e3d4c.zip",
        "portal unpack bundle.zip --out sensor-7 --password-file password.txt",
    ],
)
@click.argument("bundle", type=click.Path(dir_okay=False), help="File of the encrypted bundle.")
@click.option("--out", metavar="FOLDER", type=click.Path(path_type=Path), help=OUT_HELP)
@click.option("--password-file", metavar="FILE", help=PASSWORD_HELP)
@click.option("--force", is_flag=True, help=FORCE_HELP)
def unpack_command(portal: Remote, bundle: str, out: Path | None, password_file: str | None, force: bool) -> None:
    """Check and unpack a bundle that was downloaded before.

    The file of the bundle is kept; delete it after unpacking.
    """
    from commands.bundle import MAX_BUNDLE

    content = read_input(bundle, limit=MAX_BUNDLE)
    with _folder(out, force=force) as folder:
        files = unpack(portal, content, bundle_password(password_file), folder=folder, force=force)
    _show(portal, files)


@contextlib.contextmanager
def _folder(out: Path | None, *, force: bool) -> Iterator[Folder | None]:
    if out is None:
        require_writable(Path())
        yield None
        return
    folder = Folder(out, FILES, force=force)
    try:
        yield folder
    finally:
        folder.leave()


def _show(portal: Remote, files: dict[str, Any]) -> None:
    if portal.out.as_json:
        portal.out.json(files)
        return
    show_files(portal, files)
    if README in files["files"]:
        portal.out.note(f"{README} in this folder explains how to connect.")
