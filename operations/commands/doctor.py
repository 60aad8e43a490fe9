"""The command that checks a living installation."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import click

from operations.commands.plain import plainly, settings_here
from operations.doctor import doctor as doctors
from operations.doctor.findings import Finding, State, exit_status
from operations.wiring import utc_now

_COLOURS = {State.OK: "green", State.WARNING: "yellow", State.PROBLEM: "red"}


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print a list of {name, state, detail, advice}.")
@click.option(
    "--broker-config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The broker's configuration; the running broker's is found by itself.",
)
@plainly
def doctor(as_json: bool, broker_config: Path | None) -> None:
    """Check this installation from outside in, one line a check; nothing is changed.

    Run it as the portal's user. Ends with status 0 where all is well, 1 where there is a problem, 2 where there are
    warnings only.
    """
    findings: list[Finding] = []
    for finding in doctors.examine(
        settings_here(), utc_now, broker_config=broker_config.absolute() if broker_config else None
    ):
        findings.append(finding)
        if not as_json:
            click.echo(_line(finding))
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    sys.exit(exit_status(findings))


def _line(finding: Finding) -> str:
    state = click.style(f"{finding.state:<7}", fg=_COLOURS[finding.state])
    advice = f" -> {finding.advice}" if finding.advice else ""
    return f"{state}  {finding.name:<20}  {finding.detail}{advice}"
