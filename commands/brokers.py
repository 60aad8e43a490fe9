"""The commands about brokers, for the role system: what is enforced is what each of them enforces that counts."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import click

from commands.completing import Listed
from commands.context import YES, Remote, command, confirm, create_with_secret, group, require_confirmable
from commands.errors import CliError
from commands.names import Label
from commands.output import Cell, moment, state, text


class BrokerName(Label):
    """The name of a broker, which is a DNS label."""

    listed = Listed("/brokers", "brokers", "name", "state")


NAME = click.argument("name", type=BrokerName(), help="Name of the broker.")


@group("broker")
def broker() -> None:
    """Brokers: list, show, add, update, away, back, remove."""


@command("list", broker, examples=["portal broker list"])
def broker_list(portal: Remote) -> None:
    """List brokers in the order in which they were added.

    When piped, prints tab-separated lines: name, state, generation, last report, address, problem.
    """
    answer = portal.client.get("/brokers")
    portal.out.table(
        answer,
        "brokers",
        {
            "name": "name",
            "state": lambda row: state(row.get("state")),
            "generation": lambda row: text(f"{row.get('enforced_generation')} of {row.get('generation')}"),
            "reported": lambda row: moment(row.get("reported_at")),
            "address": "address",
            "problem": "problem",
        },
        empty="No brokers.",
        spare=("address", "problem"),
    )
    if not answer["brokers"]:
        portal.out.next_step("portal broker add NAME --address HOST:PORT")


@command("show", broker, examples=["portal broker show edge-1"])
@NAME
def broker_show(portal: Remote, name: str) -> None:
    """Show a broker: what it was seen to enforce, and when."""
    _show(portal, portal.client.get(f"/brokers/{name}"))


@command(
    "add",
    broker,
    examples=[
        "portal broker add edge-1 --address edge-1.example.com:8883",
        "portal broker add edge-1 --address edge-1.example.com --code-out edge-1.code",
    ],
)
@NAME
@click.option("--address", required=True, metavar="HOST:PORT", help="What clients connect to.")
@click.option("--code-out", metavar="FILE", help="Write the code to FILE (new, 0600).")
def broker_add(portal: Remote, name: str, address: str, code_out: str | None) -> None:
    """Add a broker on another machine, which an agent joins.

    The code is shown once, and works once within an hour. The broker counts once its agent has joined.
    """

    def fields(answer: dict[str, Any]) -> dict[str, Cell]:
        known = {field: text(answer.get(field)) for field in ("name", "address", "url", "fingerprint")}
        return known | {"expires_at": moment(answer.get("expires_at"), expiry=True)}

    done = f"Added the broker {name}"
    body = {"name": name, "address": address}
    answer = create_with_secret(
        portal, "/brokers", body, shown_once="code", save_in=code_out, done=done, fields=fields, needs=("url",)
    )
    fingerprint = answer.get("fingerprint")
    options = ["--url", str(answer["url"]), *(["--fingerprint", str(fingerprint)] if fingerprint else [])]
    code = "CODE" if code_out else str(answer["code"])
    portal.out.block("On the other machine:", [shlex.join(["portal-server", "agent", "join", *options, code])])


@command("update", broker, examples=["portal broker update edge-1 --address edge-1.example.com:8883"])
@NAME
@click.option("--address", metavar="HOST:PORT", help="What clients connect to; empty for none.")
def broker_update(portal: Remote, name: str, address: str | None) -> None:
    """Change what is known of a broker.

    If the host of an agent's broker changes, its Mosquitto must be restarted: until then changes are pending there.
    """
    if address is None:
        raise click.UsageError("Nothing to change: use --address.")
    answer = portal.client.call("PATCH", f"/brokers/{name}", body={"address": address or None}).json()
    _show(portal, answer, done=f"Changed the address of {name}")
    if address and answer.get("told_by") == "agent":
        portal.out.note(
            "If the host is another one than before, its Mosquitto shows a certificate for it after a restart only, and"
            " changes are pending there until then: restart it, unless PORTAL_BROKER_RESTART of its agent does."
        )


@command("away", broker, examples=["portal broker away edge-1 --reason 'The site is closed'"])
@NAME
@click.option("--reason", required=True, metavar="TEXT", help="Why, for the audit record.")
@YES
def broker_away(portal: Remote, name: str, reason: str, yes: bool) -> None:
    """Declare a broker away: changes are enforced without it.

    If it runs all the same, it may go on to admit devices that were revoked meanwhile.
    """
    if not yes:
        _ask_whether_away(portal, name)
    answer = portal.client.call("POST", f"/brokers/{name}/away", body={"reason": reason}, repeatable=True).json()
    _show(portal, answer, done=f"Declared {name} away")
    portal.out.next_step(f"portal broker back {name}")


def _ask_whether_away(portal: Remote, name: str) -> None:
    require_confirmable()
    known = portal.client.get(f"/brokers/{name}")
    if known.get("state") not in ("enforced", "pending"):
        return  # the portal says what is wrong, or nothing changes
    portal.out.question({"Name": text(known.get("name")), "Last report": moment(known.get("reported_at"))})
    portal.out.warning(
        "Changes will be called enforced without it. If it runs, it may admit devices that are revoked meanwhile."
    )
    confirm("Declare this broker away?", yes=False)


@command("back", broker, examples=["portal broker back edge-1"])
@NAME
def broker_back(portal: Remote, name: str) -> None:
    """Let a broker count again that was declared away.

    Nothing is enforced until it has everything.
    """
    answer = portal.client.call("POST", f"/brokers/{name}/back", repeatable=True).json()
    _show(portal, answer, done=f"{name} counts again")


@command("remove", broker, examples=["portal broker remove edge-1", "portal broker remove edge-1 --confirm edge-1"])
@NAME
@click.option("--confirm", "typed", metavar="NAME", help="The name again; asked for if it is left out.")
def broker_remove(portal: Remote, name: str, typed: str | None) -> None:
    """Remove the broker of an agent.

    It is told nothing any more. Stop it there, too: it may admit devices that are revoked later.
    """
    if typed is None:
        if not sys.stdin.isatty():
            raise click.UsageError(f"There is no terminal to ask for confirmation; add --confirm {name}.")
        typed = click.prompt("Its agent is told nothing any more. Type the broker's name", err=True)
    if typed != name:
        raise CliError("This is not the name of the broker. Nothing was changed.")
    answer = portal.client.call("DELETE", f"/brokers/{name}", params={"confirm": typed}).json()
    _show(portal, answer, done=f"Removed the broker {name}")


def _show(portal: Remote, answer: dict[str, Any], *, done: str = "") -> None:
    fields = {"name": text(answer.get("name")), "state": state(answer.get("state"))}
    fields |= {name: text(answer.get(name)) for name in ("generation", "enforced_generation")}
    fields |= {name: moment(answer.get(name)) for name in ("enforced_at", "reported_at", "away_since", "joined_at")}
    fields |= {name: text(answer.get(name)) for name in ("told_by", "engine", "address", "problem")}
    portal.out.result(answer, fields, done=done)
