"""The commands that make a backup and put one back."""

from __future__ import annotations

from pathlib import Path

import click

from operations.backup import backup as backups
from operations.backup import restore as backup_restore
from operations.commands.plain import plainly, settings_here
from operations.wiring import utc_now


@click.command("backup")
@click.argument("file", type=click.Path(path_type=Path))
@plainly
def backup(file: Path) -> None:
    """Write a backup to FILE while the portal goes on serving.

    FILE must be new. It holds the database, the encrypted CA keys and the secrets, but not the passphrase of the CA
    keys: keep that apart.
    """
    made = backups.back_up(settings_here(), file.absolute(), now=utc_now())
    counts = made.manifest.counts
    click.echo(f"Backup         {file} ({made.size} bytes, mode 0600)")
    click.echo(
        f"Holds          {counts['devices']} devices, {counts['certificates']} certificates,"
        f" {counts['audit_entries']} audit entries, of {made.manifest.made_at}"
    )
    click.echo(f"Not in it      the passphrase of the CA keys ({made.passphrase_at}): keep a copy of it, but elsewhere")


@click.command("restore")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--replace", is_flag=True, help="Replace a database that has devices; it is kept beside.")
@click.option("--keep-links", is_flag=True, help="Leave open download links that nobody used since.")
@plainly
def restore(file: Path, replace: bool, keep_links: bool) -> None:
    """Put the backup FILE back, while no portal runs on this data folder.

    Whatever was revoked since stays revoked, as far as the broker's CRL and the database being replaced know it.
    """
    done = backup_restore.restore(
        settings_here(), file.absolute(), replace=replace, keep_links=keep_links, now=utc_now()
    )
    click.echo(f"Restored       {done.counts['devices']} devices, as of {done.made_at}")
    if done.before is not None:
        click.echo(f"Before         {done.before} holds what was there")
    if done.links_expired:
        click.echo(f"Links          {done.links_expired} bundles that waited for their download were destroyed")
    for kept in done.kept:
        why = f"{kept.reason}, " if kept.reason else ""
        click.echo(f"Kept revoked   {kept.what} ({why}{kept.at.isoformat(timespec='seconds')})")
    if not done.kept:
        click.echo("Kept revoked   nothing: all that is known here as revoked is revoked in the copy")
    for note in done.notes:
        click.echo(f"Note           {note}")
    click.echo(f"Next           start the portal: it brings the broker to generation {done.generation} and proves it")
    if any("which the copy does not know" in kept.what for kept in done.kept):
        click.echo("               and restart the broker, to end sessions of devices that the copy does not know")
