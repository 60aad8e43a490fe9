"""Man pages and shell completions for ``portal`` and ``portal-server``, from their commands.

A page is made of what ``--help`` shows: summary, usage, text, options and examples.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from app import create_app, server_commands
from cli import cli
from onboarding_portal import VERSION
from operations.server_program import program

server = program(lambda: (create_app, server_commands()))
PROGRAMS: dict[str, click.Group] = {"portal": cli, "portal-server": server}
PLACES: dict[type[ShellComplete], str] = {
    BashComplete: "share/bash-completion/completions/{}",
    ZshComplete: "share/zsh/site-functions/_{}",
    FishComplete: "share/fish/vendor_completions.d/{}.fish",
}
EXIT_STATUS = {
    "portal": "0 success, 1 failure, 2 wrong usage, 3 the portal was not reached, 130 interrupted.",
    "portal-server": "0 success, 1 failure, 2 wrong usage, 130 interrupted;"
    " doctor and restore have others, which they name.",
}


def command_files() -> dict[str, str]:
    """Return each file's text by its place below the environment's folder."""
    files = {}
    for name, group in PROGRAMS.items():
        for words, context in _contexts(group, name, None):
            files[f"share/man/man1/{'-'.join(words)}.1"] = _page(words, context)
        for shell, place in PLACES.items():
            variable = f"_{name.replace('-', '_')}_complete".upper()
            files[place.format(name)] = shell(group, {}, name, variable).source()
    return files


def _contexts(
    command: click.Command, name: str, parent: click.Context | None
) -> Iterator[tuple[list[str], click.Context]]:
    context = command.context_class(command, info_name=name, parent=parent, **(command.context_settings or {}))
    yield context.command_path.split(), context
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            if found is not None:
                yield from _contexts(found, inner, context)


def _page(words: list[str], context: click.Context) -> str:
    command, name = context.command, "-".join(words)
    summary = (command.help or "").partition("\n")[0].rstrip(".")
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [
        f'.TH {_quoted(name.upper())} 1 "" {_quoted(f"device-onboarding-portal {VERSION}")}',
        ".ad l",
        ".SH NAME",
        f"{_text(name)} \\- {_text(summary)}",
        ".SH SYNOPSIS",
        f".B {_text(context.command_path)}",
        _text(usage),
        ".SH DESCRIPTION",
        *_description(command.help or ""),
    ]
    options = [record for param in command.get_params(context) if (record := param.get_help_record(context))]
    lines += _definitions("OPTIONS", options)
    if isinstance(command, click.Group):
        inner = [(" ".join((*words, each)), one.get_short_help_str(200)) for each, one in command.commands.items()]
        lines += _definitions("COMMANDS", inner)
    if examples := getattr(command, "examples", ()):
        lines += [".SH EXAMPLES", ".nf", *map(_text, examples), ".fi"]
    lines += [".SH EXIT STATUS", _text(EXIT_STATUS[words[0]])]
    if len(words) > 1:
        lines += [".SH SEE ALSO", f".BR {_text('-'.join(words[:-1]))} (1)"]
    return "\n".join(lines) + "\n"


def _definitions(title: str, rows: list[tuple[str, str]]) -> list[str]:
    section = [f".SH {title}"] if rows else []
    for name, text in rows:
        section += [".TP", f".B {_text(name)}", _text(text) or "\\&"]
    return section


def _description(text: str) -> list[str]:
    """Return the paragraphs; those after a line with ``\\b`` keep their lines, as in click."""
    lines = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        as_it_is = paragraph.startswith("\b")
        rows = [_text(row.strip()) for row in paragraph.strip("\b \n").splitlines()]
        lines += [".PP", *([".nf", *rows, ".fi"] if as_it_is else rows)]
    return lines


def _text(text: str) -> str:
    """Escape what troff would read as a request or a special letter."""
    escaped = " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    escaped = re.sub(r"[^ -~]", lambda letter: f"\\[u{ord(letter[0]):04X}]", escaped)
    escaped = escaped.replace("|", "|\\:")  # where a line may end
    return f"\\&{escaped}" if escaped.startswith((".", "\\(aq")) else escaped


def _quoted(text: str) -> str:
    return f'"{_text(text)}"'
