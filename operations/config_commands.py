"""The commands about the settings: which count, where each comes from, and what is wrong with them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import click

from config import Settings
from core.given_settings import SEPARATORS, TABLES, Given, config_file, gathered, masked
from operations.command_base import print_table, without_traceback


@click.group("config")
def config_group() -> None:
    """Check and show the settings, and where each comes from.

    They are variables of the environment and keys of the file that --config or PORTAL_CONFIG names; the environment
    wins. Secrets are never shown.
    """


_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@config_group.command("check")
@_as_json
@without_traceback
def check_config(as_json: bool) -> None:
    """Name all problems of the settings, and show those set.

    Nothing is opened or changed; the doctor looks further. The exit status is 0 if the settings can be used, 1 if not.
    """
    given = gathered(os.environ, Settings.model_fields)
    problems = given.all_problems(Settings.of_texts)
    rows = [row for row in _rows(given, {}) if row["source"] != "default"]
    file = _file()
    if as_json:
        click.echo(json.dumps({"file": file, "problems": problems, "settings": rows}, indent=1))
    else:
        click.echo(f"File           {file or 'none (--config FILE or PORTAL_CONFIG names one)'}")
        click.echo(f"Set            {len(rows)} of {len(Settings.model_fields)} settings")
        if rows:
            click.echo()
            _print(rows)
            click.echo()
        for problem in problems:
            click.echo(f"Problem        {problem}")
    if problems:
        raise SystemExit(1)
    if not as_json:
        click.echo("Found no problems.")


@config_group.command("show")
@_as_json
@without_traceback
def show_config(as_json: bool) -> None:
    """Show all settings as they count, and where each comes from."""
    given = gathered(os.environ, Settings.model_fields)
    settings = Settings.from_env(os.environ)
    effective = {name: _shown(name, getattr(settings, name)) for name in Settings.model_fields if name not in TABLES}
    rows = _rows(given, effective)
    if as_json:
        click.echo(json.dumps({"file": _file(), "settings": rows}, indent=1))
    else:
        _print(rows)


def _file() -> str | None:
    path = config_file(os.environ)
    return None if path is None else str(path)


def _rows(given: Given, effective: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return a row for each setting, with the ``effective`` value, or else the text that was given."""
    return [
        {
            "setting": name,
            "value": masked(field, name, effective.get(name, given.texts.get(name, ""))),
            "source": given.places.get(name, "default"),
        }
        for name, field in Settings.model_fields.items()
    ]


def _print(rows: list[dict[str, Any]]) -> None:
    print_table(["setting", "value", "from"], [[row["setting"], row["value"], row["source"]] for row in rows])


def _shown(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    separator = SEPARATORS.get(name)
    return (
        str(value)
        if separator is None or isinstance(value, str)
        else separator.join("file" if one is None else str(one) for one in value)
    )
