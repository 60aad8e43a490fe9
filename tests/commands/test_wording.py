"""Every text of an error that the portal can send is shown in words of the command line."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from cli import cli
from commands.wording import in_words_of_the_cli, without_requests
from core import errors
from tests.support.cli_session import Session
from tests.support.portal_stub import PortalStub, Reply

pytest_plugins = ("tests.support.cli_fixtures",)
ROOT = Path(__file__).parents[2]
SENT = ("attestation", "core", "store", "web/api", "workflows", "pki")
RAISED = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)}
# Words with underscores that people meet elsewhere: values of options, keys of files and of the broker's configuration.
KNOWN_TO_PEOPLE = {
    *("at_once", "client_auth", "when_used", "after_overlap", "next_cursor"),
    *("acl_file", "password_file", "plugin_opt_journal", "max_queued_bytes", "use_identity_as_username"),
    *("realm_access", "cessation_of_operation", "key_compromise"),
    *("class_id", "integrity_registers", "at_least", "ek_certificate", "ak_certificate", "ak_public", "policy_id"),
}


def texts() -> Iterator[tuple[str, str]]:
    """Where each error is raised that a client may see, and its text."""
    for package in SENT:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and node.args and _name(node.func) in {*RAISED, "ValueError"}:
                    for inner in ast.walk(node.args[0]):
                        if text := _text(inner):
                            yield f"{path.relative_to(ROOT)}:{node.lineno}", text


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _text(node: ast.expr | ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_no_error_text_speaks_of_requests_or_fields_of_json() -> None:
    wrong = {}
    count = 0
    for place, text in texts():
        count += 1
        # Those of rows are shown as they are: their names are those of the columns.
        said = without_requests(text).replace("external_id", "") if "/bulk/" in place else in_words_of_the_cli(text)
        left = set(re.findall(r"(?<![\w.{-])[a-z]+(?:_[a-z]+)+\b", said)) - KNOWN_TO_PEOPLE
        if left or re.search(r"\b(GET|POST|PUT|PATCH|DELETE)\b", said):
            wrong[place] = said
    assert count > 300
    assert list(wrong.items()) == []


@pytest.mark.parametrize(
    ("sentence", "said"),
    [
        (
            "There is no tenant of this name; list them with GET /tenants.",
            "There is no tenant of this name; list them with portal tenant list.",
        ),
        ("It is gone; ask with GET /nothing/{id}.", "It is gone."),
        ("has server_auth, which needs dns_names", "has --server-auth, which needs --dns-name"),
        ("The reason key_compromise stays.", "The reason key_compromise stays."),
    ],
)
def test_requests_become_commands_and_fields_options(sentence: str, said: str) -> None:
    assert in_words_of_the_cli(sentence) == said


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("token add", "token create"),
        ("enrolment add", "enrolment create"),
        ("webhook create", "webhook add"),
        ("webhook delete", "webhook remove"),
        ("profile create", "profile add"),
        ("tenant delete", "tenant remove"),
        ("application remove", "application revoke"),
        ("token delete", "token revoke"),
    ],
)
def test_a_verb_of_another_group_is_understood(typed: str, meant: str, session: Session) -> None:
    shown = [session.run(*words.split(), "--help").output.split("\n", 1)[1] for words in (typed, meant)]
    assert shown[0] == shown[1]


def test_one_verb_is_used_for_one_act_in_all_groups() -> None:
    groups = {name: command for name, command in cli.commands.items() if isinstance(command, click.Group)}
    verbs = {(name, verb) for name, group in groups.items() for verb in group.commands}
    assert {verb for _, verb in verbs} & {"delete", "new", "edit", "set", "get"} == set()
    assert {name for name, verb in verbs if verb == "create"} == {"token", "enrolment"}  # what the portal makes
    assert not [name for name, verb in verbs if verb == "remove" and (name, "add") not in verbs]


def test_former_names_of_options_work_and_are_not_shown(session: Session) -> None:
    shown = session.run("list", "--help").output
    assert "--search TEXT" in shown
    assert not re.search(r"--q\b|--expiring\b", shown)
    assert session.run("list", "--q", "x").exit_code == 0
    assert session.run("audit", "export").exit_code == 2
    assert session.run("audit", "export", "a.ndjson", "--out", "b.ndjson").exit_code == 2


def test_an_export_is_saved_with_or_without_the_option(session: Session, stub: PortalStub) -> None:
    stub.replies["GET", "/audit/export"] = Reply(body=b"{}\n")
    assert session.run("audit", "export", "before.ndjson").exit_code == 0
    assert session.run("audit", "export", "--out", "after.ndjson").exit_code == 0
    assert Path("before.ndjson").read_bytes() == Path("after.ndjson").read_bytes() == b"{}\n"
