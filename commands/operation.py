"""The commands about the portal itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from commands.bundle import certificates_only, describe
from commands.context import Command, Portal
from commands.devices import DEFAULT_LIMIT, read_pages
from commands.errors import Unreachable
from commands.files import NewFile, write_new
from commands.output import Cell, moment, state, text

SHELLS = {
    "bash": 'eval "$(portal completion bash)"    # in ~/.bashrc',
    "zsh": 'eval "$(portal completion zsh)"    # in ~/.zshrc',
    "fish": "portal completion fish > ~/.config/fish/completions/portal.fish",
}


@click.command(
    "status", cls=Command, examples=["portal status", "portal status --json | jq '.checks[] | select(.ok | not)'"]
)
@click.pass_context
def status(ctx: click.Context) -> None:
    """Say whether the portal is ready, or what keeps it.

    The exit status is 1 where it is not.
    """
    portal: Portal = ctx.obj
    alive = portal.client.call("GET", "/healthz", anonymous=True, accept=(503,)).status == 200
    # The reasons are for operators; without a token it says only what fails.
    answer = portal.client.call("GET", "/readyz", anonymous=portal.settings.token is None, accept=(503,))
    checks = answer.json().get("checks")
    if not isinstance(checks, list) or not all(isinstance(check, dict) for check in checks):
        raise Unreachable(f"The answer of {answer.origin} does not say what it checked; it may be of another version.")
    ready = alive and answer.status == 200
    if portal.out.as_json:
        portal.out.json({"alive": alive, "ready": ready, "checks": checks})
    else:
        fields = {"portal": text(portal.settings.url), "alive": _yes(alive), "ready": _yes(ready)}
        portal.out.fields(fields | {str(check.get("name")): _check(check) for check in checks})
    if not ready:
        ctx.exit(1)


def _yes(good: bool) -> Cell:
    return Cell("yes" if good else "no", style="green" if good else "bold red")


def _check(check: dict[str, Any]) -> Cell:
    good = check.get("ok") is True
    return _yes(good) if good else Cell(f"no: {check.get('problem') or 'no reason was given'}", style="bold red")


@click.command("ca", cls=Command, examples=["portal ca", "portal ca --out ca.pem"])
@click.option("--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Save it in this file.")
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
@click.pass_obj
def ca(portal: Portal, out: Path | None, force: bool) -> None:
    """Print or save the portal's CA certificates.

    Issuing CA first, root last. Compare the root's fingerprint with what the portal's operator tells you.
    """
    pem = certificates_only(portal.client.call("GET", "/ca.pem", anonymous=True).body)
    found = describe(pem)
    if out is not None:
        write_new(out, NewFile(pem), force=force)
    if portal.out.as_json:
        portal.out.json({"certificates": found, "pem": pem.decode(), "file": str(out) if out else None})
        return
    if out is None and not portal.out.for_people:
        portal.out.raw(pem.decode())
        return
    for certificate in found:
        portal.out.fields(
            {
                "subject": text(certificate["subject"]),
                "fingerprint": text(certificate["fingerprint"]),
                "expires_at": moment(certificate["not_after"], expiry=True),
            }
        )
    if out is None:
        portal.out.raw(pem.decode())
    else:
        portal.out.done(f"Saved in {out}")


@click.command(
    "audit",
    cls=Command,
    examples=["portal audit --limit 20", "portal audit --action device:revoke --all --json"],
)
@click.option("--action", metavar="TAG", help="Such as device:register.")
@click.option("--actor", metavar="WHO", help="Who did it, as the record shows it.")
@click.option("--object", "object_", metavar="WHAT", help="What it was done to, such as device:ID.")
@click.option("--outcome", type=click.Choice(("done", "refused")), help="How it ended.")
@click.option("--limit", type=click.IntRange(1), default=DEFAULT_LIMIT, show_default=True, help="How many at the most.")
@click.option("--all", "all_", is_flag=True, help="All of them, however many.")
@click.option("--cursor", metavar="CURSOR", help="Go on where an earlier --json answer ended (next_cursor).")
@click.pass_obj
def audit(
    portal: Portal,
    action: str | None,
    actor: str | None,
    object_: str | None,
    outcome: str | None,
    limit: int,
    all_: bool,
    cursor: str | None,
) -> None:
    """Read the audit record, newest first.

    Piped, each entry is a line: time, actor, action, object, outcome, address, request id, detail.
    """
    filters = {"action": action, "actor": actor, "object": object_, "outcome": outcome}
    most = None if all_ else limit
    entries, next_cursor = read_pages(portal, "/audit", "entries", most=most, cursor=cursor, filters=filters)
    if portal.out.as_json:
        portal.out.json({"entries": entries, "next_cursor": next_cursor})
        return
    portal.out.table(
        ("time", "actor", "action", "object", "outcome", "address", "request id", "detail"),
        [
            (
                Cell(str(entry.get("at", "")), str(entry.get("at", ""))[:19].replace("T", " ")),
                text(entry.get("actor")),
                text(entry.get("action")),
                text(entry.get("object")),
                state(entry.get("outcome")),
                text(entry.get("address")),
                text(entry.get("request_id")),
                text(json.dumps(entry["detail"], sort_keys=True) if entry.get("detail") else None),
            )
            for entry in entries
        ],
        empty="No entry fits." if any(filters.values()) else "There is no entry.",
        spare=("address", "request id", "detail"),
        whole=("action", "outcome"),
    )
    if next_cursor:
        portal.out.note(f"These are the newest {len(entries)}; --all shows all.")


@click.command("completion", cls=Command, connects=False, examples=list(SHELLS.values()))
@click.argument("shell", type=click.Choice(tuple(SHELLS)), help="bash, zsh or fish.")
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell."""
    portal: Portal = ctx.obj
    found = get_completion_class(shell)
    if found is None:  # click knows all three
        raise click.UsageError(f"There is no completion for {shell}.")
    script = found(ctx.find_root().command, {}, "portal", "_PORTAL_COMPLETE").source()
    if portal.out.as_json:
        portal.out.json({"shell": shell, "script": script})
        return
    portal.out.raw(script)
