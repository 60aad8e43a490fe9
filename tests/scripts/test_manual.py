"""Man pages and completions: one for each command, complete, and without anything that troff or a shell objects to."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from app import server_commands
from cli import cli
from operations.server_program import OTHER_NAMES, SUMMARIES
from scripts.manual import PROGRAMS, command_files


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return command_files()


def commands(command: click.Command, *words: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield words, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from commands(inner, *words, name)


ALL = [*commands(cli, "portal"), *commands(PROGRAMS["portal-server"], "portal-server")]


def test_there_is_a_page_for_each_command(files: dict[str, str]) -> None:
    pages = {place for place in files if "/man1/" in place}
    assert len(ALL) > 60
    assert pages == {f"share/man/man1/{'-'.join(words)}.1" for words, _ in ALL}


def test_80_columns_show_the_summary_of_each_command_whole() -> None:
    summaries = {words: (command.help or "").partition("\n")[0] for words, command in ALL if len(words) > 1}
    assert {words: summary for words, summary in summaries.items() if len(summary) > 60 or summary[-1:] != "."} == {}


def test_the_server_program_has_each_of_its_commands_with_the_summary_of_its_help() -> None:
    helps = {
        words[1]: (command.help or "").partition("\n")[0]
        for words, command in ALL
        if words[0] == "portal-server" and len(words) == 2
    }
    loaded = {OTHER_NAMES.get(str(command.name), command.name) for command in server_commands()}
    assert helps == SUMMARIES
    assert loaded == set(SUMMARIES)


def test_troff_finds_nothing_wrong(files: dict[str, str], tmp_path: Path) -> None:
    pages = [tmp_path / Path(place).name for place in files if "/man1/" in place]
    for path in pages:
        path.write_text(files[f"share/man/man1/{path.name}"])
    done = subprocess.run(["groff", "-man", "-ww", "-z", *pages], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def shown(page: str) -> str:
    """A page as a terminal shows it, in one line."""
    command = ["groff", "-man", "-Tutf8", "-P-c", "-P-b", "-P-u", "-rHY=0"]
    done = subprocess.run(command, input=page, capture_output=True, text=True, check=True)
    return " ".join(done.stdout.split())


@pytest.mark.parametrize("words", [("portal", "register"), ("portal", "webhook", "add"), ("portal-server", "restore")])
def test_a_page_says_what_the_help_says(words: tuple[str, ...], files: dict[str, str]) -> None:
    command = dict(ALL)[words]
    text = shown(files[f"share/man/man1/{'-'.join(words)}.1"])
    assert (command.help or "").partition("\n")[0] in text
    shown_ones = [param for param in command.params if isinstance(param, click.Option) and not param.hidden]
    assert len(shown_ones) >= 3
    for option in (one for param in shown_ones for one in param.opts if one.startswith("--")):
        assert option in text
    for example in getattr(command, "examples", ()):
        assert " ".join(example.split()) in text


def test_a_page_of_a_group_lists_its_commands_in_the_lines_of_its_help(files: dict[str, str]) -> None:
    text = shown(files["share/man/man1/portal.1"])
    assert "portal register Register a device: certificate, topics, credential bundle." in text
    assert "\nSettings are taken from options" in files["share/man/man1/portal.1"]


@pytest.mark.parametrize("program", ["portal", "portal-server"])
def test_bash_takes_the_completion_and_asks_the_program(program: str, files: dict[str, str]) -> None:
    script = files[f"share/bash-completion/completions/{program}"]
    done = subprocess.run(
        ["bash", "-c", f"{script}\ncomplete -p {program}"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert f"{program}\n" in done.stdout
    assert f"_{program.replace('-', '_').upper()}_COMPLETE=bash_complete" in script
    assert f"#compdef {program}" in files[f"share/zsh/site-functions/_{program}"]
    assert f"complete --no-files --command {program}" in files[f"share/fish/vendor_completions.d/{program}.fish"]
