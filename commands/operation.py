"""The commands about the portal itself: status, CA certificates, shell completion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands.context import FORCE_HELP, Remote, command, trusted_of_broker
from commands.errors import Unreachable
from commands.files import NewFile, write_new
from commands.output import Cell, moment, text

SHELLS = {
    "bash": 'eval "$(portal completion bash)"    # in ~/.bashrc',
    "zsh": 'eval "$(portal completion zsh)"    # in ~/.zshrc',
    "fish": "portal completion fish > ~/.config/fish/completions/portal.fish",
}


@command("status", examples=["portal status", "portal status --json | jq '.checks[] | select(.ok | not)'"])
def status(portal: Remote) -> None:
    """Check whether the portal is ready, and if not, why.

    The exit status is 1 if it is not ready.
    """
    alive = portal.client.call("GET", "/healthz", anonymous=True, accept=(503,)).status == 200
    # Without a token the portal names the failed checks, but not the reasons.
    answer = portal.client.call("GET", "/readyz", anonymous=portal.settings.token is None, accept=(503,))
    checks = answer.json().get("checks")
    if not isinstance(checks, list) or not all(isinstance(check, dict) for check in checks):
        raise Unreachable(f"The answer of {answer.origin} has no list of checks; its version may differ.")
    ready = alive and answer.status == 200
    fields = {"portal": text(portal.settings.url), "alive": _yes(alive), "ready": _yes(ready)}
    fields |= {str(check.get("name")): _check(check) for check in checks}
    portal.out.result({"alive": alive, "ready": ready, "checks": checks}, fields)
    if not ready:
        raise click.exceptions.Exit(1)


def _yes(good: bool) -> Cell:
    return Cell("yes" if good else "no", style="green" if good else "bold red")


def _check(check: dict[str, Any]) -> Cell:
    good = check.get("ok") is True
    return _yes(good) if good else Cell(f"no: {check.get('problem') or 'no reason given'}", style="bold red")


@command("ca", examples=["portal ca", "portal ca --out ca.pem", "portal ca --broker --out broker-ca.pem"])
@click.option("--out", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False), help="Save them in FILE.")
@click.option(
    "--broker", is_flag=True, help="The CAs to trust for the broker, whose certificate may be another issuer's."
)
@click.option("--force", is_flag=True, help=FORCE_HELP)
def ca(portal: Remote, out: Path | None, broker: bool, force: bool) -> None:
    """Print or save the portal's CA certificates.

    The issuing CA comes first, the root last; with --broker followed by the root of the broker's certificate, if that
    is of another issuer. Compare the fingerprint of the root with the one that the portal's operator tells you.
    """
    anonymous = portal.settings.token is None  # else they are those of the operator's tenant
    from commands.bundle import certificates_only, describe

    pem = certificates_only(
        trusted_of_broker(portal) if broker else portal.client.call("GET", "/ca.pem", anonymous=anonymous).body
    )
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
        portal.out.done(f"Saved the CA certificates in {out}")


@command("completion", connects=False, examples=list(SHELLS.values()))
@click.argument("shell", type=click.Choice(tuple(SHELLS)), help="bash, zsh or fish.")
def completion(portal: Remote, shell: str) -> None:
    """Print a shell completion script."""
    from click.shell_completion import get_completion_class

    completes = get_completion_class(shell)
    if completes is None:  # click knows the three that SHELLS has
        raise click.UsageError(f"There is no completion script for {shell}.")
    root = click.get_current_context().find_root().command
    script = completes(root, {}, "portal", "_PORTAL_COMPLETE").source()
    if portal.out.as_json:
        portal.out.json({"shell": shell, "script": script})
    else:
        portal.out.raw(script)
