"""The commands that bring a device's credentials to its disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from commands.bundle import BUNDLE_MOST, README
from commands.client import check_link
from commands.context import Command, Portal
from commands.files import Folder, read_input, require_writable
from commands.formats import FILES
from commands.unpack import bundle_password, fetch, show_files, unpack, unpack_fetched

OUT_HELP = "Folder for the files; one named for the device, here, if not given."
PASSWORD_HELP = "File that holds the bundle's password; - for standard input."  # noqa: S105 - a help text
FORCE_HELP = "Replace files that are there."


@click.command(
    "download",
    cls=Command,
    examples=[
        "portal download 'https://127.0.0.1:8443/download/…'",
        "portal download 'https://…' --out sensor-7 --password-file password.txt",
    ],
)
@click.argument("link", help="The one-time link, in quotes.")
@click.option("--out", metavar="FOLDER", type=click.Path(path_type=Path), help=OUT_HELP)
@click.option("--password-file", metavar="FILE", help=PASSWORD_HELP)
@click.option("--force", is_flag=True, help=FORCE_HELP)
@click.pass_obj
def download(portal: Portal, link: str, out: Path | None, password_file: str | None, force: bool) -> None:
    """Fetch a device's bundle, check it, write its files.

    The link works once, and needs no operator token. The password is read from the file, from
    PORTAL_BUNDLE_PASSWORD or from the terminal. Key, certificate and chain must belong together, else nothing is
    written. Should anything go wrong after the fetch, the encrypted bundle is kept for: portal unpack.
    """
    link = check_link(link)
    _ = portal.settings  # a wrong one shows before the password is asked for
    with _folder(out, force=force) as folder:
        password = bundle_password(password_file, before_asking=lambda: portal.client.look_at_link(link))
        content, kept = fetch(portal, link, folder.path if folder else Path())
        files = unpack_fetched(portal, content, kept, password, folder=folder, force=force)
    _show(portal, files)


@click.command(
    "unpack",
    cls=Command,
    connects=False,
    examples=[
        "portal unpack bundle-1f2e3d4c.zip",
        "portal unpack bundle.zip --out sensor-7 --password-file password.txt",
    ],
)
@click.argument("bundle", type=click.Path(dir_okay=False), help="The encrypted bundle.")
@click.option("--out", metavar="FOLDER", type=click.Path(path_type=Path), help=OUT_HELP)
@click.option("--password-file", metavar="FILE", help=PASSWORD_HELP)
@click.option("--force", is_flag=True, help=FORCE_HELP)
@click.pass_obj
def unpack_command(portal: Portal, bundle: str, out: Path | None, password_file: str | None, force: bool) -> None:
    """Check a bundle that was fetched before, write its files.

    The second half of portal download. The file is left where it is; delete it once the files are written.
    """
    content = read_input(bundle, most=BUNDLE_MOST)
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


def _show(portal: Portal, files: dict[str, Any]) -> None:
    if portal.out.as_json:
        portal.out.json(files)
        return
    show_files(portal, files)
    if README in files["files"]:
        portal.out.note(f"{README} there says how to connect.")
