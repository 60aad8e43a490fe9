"""The files that an installation needs beside the portal's modules, which an installed wheel has inside it."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from operations.command_base import without_traceback

FOLDERS = ("mosquitto", "rabbitmq", "deploy", "device")
_TREE = Path(__file__).parents[1]


@click.command("files")
@click.argument("folder", type=click.Path(path_type=Path))
@without_traceback
def write_files(folder: Path) -> None:
    """Write the files for broker, services and devices.

    FOLDER must not exist. In it mosquitto/ has the broker's configuration and the sources of the guard, rabbitmq/ that
    of a cluster's nodes, deploy/ the units, nginx's configuration and the container files, device/ what enrols a
    device. Build the guard by: make -C FOLDER/mosquitto/guard install
    """
    try:
        folder.mkdir(parents=True)
        for name in FOLDERS:
            shutil.copytree(_TREE / name, folder / name, ignore=shutil.ignore_patterns("*.so", "tests", "__pycache__"))
    except OSError as error:
        raise click.ClickException(f"{folder} cannot be written: {error.strerror}.") from error
    click.echo(f"Wrote {', '.join(FOLDERS)} to {folder}")
