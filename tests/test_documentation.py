"""The documentation: its links lead somewhere, and what it names exists."""

from __future__ import annotations

import ast
import functools
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import pytest
from click.testing import CliRunner

from cli import SECTIONS, cli
from config import Settings
from core.given_settings import variable_of
from operations import commands as server_commands

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/README.md"), *ROOT.glob("docs/**/*.md")])
OTHER_VARIABLES = {
    "PORTAL_URL",
    "PORTAL_PROFILE",
    "PORTAL_CONFIG",
    "PORTAL_CA",
    "PORTAL_TOKEN",
    "PORTAL_BUNDLE_PASSWORD",
    "PORTAL_VENV",
    "PORTAL_FAILPOINT",
    "PORTAL_SERVER_COMMAND",
}
PACKAGES = ("attestation", "broker", "commands", "core", "delivery", "operations", "pki", "store", "web", "workflows")
FOLDERS = (
    "bench",
    "deploy",
    "device",
    "docs",
    "migrations",
    "mosquitto",
    "scripts",
    "templates",
    "tests",
    ".ci",
)

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def code(text: str) -> list[str]:
    """What is in backticks, and each line of the blocks."""
    fenced = re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    without = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^ {4,}(.+)$", without, re.MULTILINE)
    lines = [line for block in fenced for line in block.splitlines()] + indented
    return [*re.findall(r"`([^`\n]+)`", without), *(line.strip().removeprefix("$ ") for line in lines)]


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        path, _, anchor = target.partition("#")
        leads_to = (document.parent / path).resolve() if path else document
        assert leads_to.is_file(), target
        assert leads_to.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(leads_to.read_text()), target


def test_every_document_can_be_reached_from_the_readme() -> None:
    linked = {(ROOT / target).resolve() for target in re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())}
    assert set(DOCUMENTS) - {ROOT / "README.md"} <= linked


@each_document
def test_files_and_folders_that_are_named_exist(document: Path) -> None:
    folders, packages = "|".join(map(re.escape, FOLDERS)), "|".join(PACKAGES)  # a data folder has a broker/ of its own
    place = re.compile(
        rf"^(?:\./)?(?:(?:{folders})/[\w./*-]*|(?:{packages})/[\w/*]*\.py|[\w*]+\.py|requirements[\w-]*\.txt)$"
    )
    for word in (word for text in code(document.read_text()) for word in text.split()[:1]):
        if place.match(word):
            assert list(ROOT.glob(word.rstrip("/"))), word


@each_document
def test_functions_and_classes_that_are_named_exist(document: Path) -> None:
    for path, name in re.findall(r"`([\w/]+\.py):([A-Za-z_][\w.]*)`", document.read_text()):
        assert name in defined_in(ROOT / path), f"{path}:{name}"


@functools.cache
def defined_in(path: Path) -> set[str]:
    """The functions, classes, methods and variables of a module."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_no_entry_of_the_newest_section_of_the_changes_says_what_another_one_says() -> None:
    newest = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1]
    entries = {entry: set(re.findall(r"\w+", entry.lower())) for entry in newest.split("\n- ")[1:]}
    assert len(entries) == newest.count("\n- ")
    pairs = itertools.permutations(entries.items(), 2)
    assert [entry for (entry, words), (_, others) in pairs if words <= others] == []


def test_each_term_of_the_glossary_is_used() -> None:
    glossary = (ROOT / "docs" / "glossary.md").read_text()
    terms = re.findall(r"^\| ([^|]+) \| [^|]+ \| ?[^|]*\|$", glossary, re.MULTILINE)[2:]
    sources = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    documents = [path for path in DOCUMENTS if path.name not in ("glossary.md", "CHANGELOG.md")]
    text = " ".join(" ".join(path.read_text().lower().split()) for path in (*documents, *sources))
    words = {term: term.lower().split(", ") for term in terms}
    assert [term for term in terms if not any(re.search(rf"\b{re.escape(one)}", text) for one in words[term])] == []


def test_the_picture_of_the_readme_is_small_and_its_texts_fit() -> None:
    source = (ROOT / "docs" / "picture.svg").read_text()
    assert len(source) < 6000
    picture = ElementTree.fromstring(source)  # noqa: S314 - ours
    space = "{http://www.w3.org/2000/svg}"
    _, _, width, height = map(float, picture.attrib["viewBox"].split())
    texts = {str(one.text): one.attrib for one in picture.iter(f"{space}text")}
    for text, at in texts.items():
        long = {"name": 10.5, "small": 6.7}.get(at.get("class", ""), 7.6) * len(text)  # as wide as a browser has them
        left = float(at["x"]) - (long if at.get("text-anchor") == "end" else 0)
        assert 0 <= left <= left + long <= width, text
        assert 0 < float(at["y"]) < height, text
    steps = sorted(text[0] for text in texts if text[0].isdigit())
    assert steps == [str(number) for number in range(1, len(steps) + 1)]
    readme = (ROOT / "README.md").read_text()
    assert f"![{picture.findtext(f'{space}title')}](docs/picture.svg)" in readme


def test_the_readme_has_the_way_in_and_the_licence() -> None:
    readme = (ROOT / "README.md").read_text()
    for title in ("## Two commands", "## Installing", "## Guides", "## Reference", "## Licence"):
        assert f"\n{title}\n" in readme


def test_the_terms_of_the_glossary_are_in_order_and_each_is_one_line() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ?[^|]*\|$", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    terms = [term for term, _ in rows][2:]
    assert len(terms) > 40
    assert terms == sorted(terms, key=str.lower)


def test_every_package_and_root_module_is_on_the_map() -> None:
    named = set(code((ROOT / "docs" / "changing.md").read_text()))
    assert {f"{package}/" for package in PACKAGES} | {path.name for path in ROOT.glob("*.py")} <= named


def calls_of(program: str) -> list[tuple[str, list[str]]]:
    """Each call of a program in the documents, with its words."""
    found = []
    for document in DOCUMENTS:
        for text in code(document.read_text()):
            match = re.match(rf"(?:\./)?{re.escape(program)} ([a-z-].*)", text)
            if match:
                found.append((f"{document.name}: {text}", match[1].split()))
    return found


def commands(group: click.Group, *parents: str) -> dict[str, click.Command]:
    """All commands by what is typed for them."""
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= commands(command, *parents, name)
        else:
            found[" ".join((*parents, name))] = command
    return found


def options(command: click.Command) -> set[str]:
    named = {name for parameter in command.params if isinstance(parameter, click.Option) for name in parameter.opts}
    return named | {"--help", "-h"}


def test_commands_of_the_cli_that_are_named_exist_with_their_options() -> None:
    calls = calls_of("./portal") + calls_of("portal")
    assert len(calls) >= 8
    for where, words in calls:
        command: click.Command = cli
        while words and isinstance(command, click.Group) and not words[0].startswith("-"):
            assert words[0] in command.commands, where
            command = command.commands[words.pop(0)]
        for word in words:
            if word.startswith("-"):
                assert word.partition("=")[0] in options(command) | options(cli), where


def test_commands_of_the_server_that_are_named_exist() -> None:
    nothing: Callable[..., Any] = lambda *_, **__: None  # noqa: E731 - the commands are looked at, not run
    known = {command.name for command in server_commands.commands(*[nothing] * 4)} | {
        "run",
        "--config",
    }
    calls = calls_of("portal-server")
    assert len(calls) >= 8
    assert {words[0] for _, words in calls} <= known
    assert {words[0] for _, words in calls_of("flask --app app")} <= known


@each_document
def test_variables_that_are_named_are_settings(document: Path) -> None:
    settings = {variable_of(name) for name in Settings.model_fields}
    assert set(re.findall(r"PORTAL_[A-Z_]+[A-Z]", document.read_text())) <= settings | OTHER_VARIABLES


@pytest.mark.parametrize("name", commands(cli))
def test_each_command_has_help_with_examples_and_json_as_the_readme_says(name: str) -> None:
    done = CliRunner().invoke(cli, [*name.split(), "--help"])
    assert done.exit_code == 0
    assert "Examples:\n" in done.output
    assert "--json" in options(commands(cli)[name])


def test_the_readme_shows_the_options_that_all_commands_share() -> None:
    for option in options(cli) - {"-h"}:
        assert re.search(rf"^  (-h, )?{option} ", (ROOT / "README.md").read_text(), re.MULTILINE), option


def test_the_readme_lists_all_commands() -> None:
    listed = re.findall(r"^  (\w+) {2,}[A-Z].*\.$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert listed == [name for section in SECTIONS.values() for name in section]


@pytest.mark.parametrize(
    "path",
    [
        "docs/how-to/something-is-lost.md",
        "docs/operating.md",
        "docs/security.md",
        "docs/reliability.md",
        "core/errors.py",
    ],
)
def test_what_to_do_about_a_link_that_is_lost_is_said_in_one_way(path: str) -> None:
    text = re.sub(r'"\s+"', "", (ROOT / path).read_text())
    assert re.search(r"portal renew (DEVICE|pump-5) --overlap 0", text), path


WRITTEN = re.compile(
    r"(?:--(?:token-|password-)?out|--export|--results|portal-server backup|(?<![|2&])>) +([\w.-]+/?[\w.-]*)"
)


def written_by(document: Path) -> set[str]:
    """Files and folders that the commands of a document make, but for what a placeholder stands for."""
    lines = [line for line in code(document.read_text()) if "portal" in line or "openssl" in line or "curl" in line]
    names = {name for line in lines for name in WRITTEN.findall(line)}
    return {name for name in names if not name.isupper()}


def test_no_two_documents_make_the_same_file_or_device() -> None:
    """Somebody follows them in one folder, one after the other: nothing may be refused because of a page before."""
    made: dict[str, Path] = {}
    for document in DOCUMENTS:
        text = document.read_text()
        devices = set(re.findall(r"portal (?:register|expect) ([a-z]+-\d+)\b", text))
        for name in written_by(document) | devices:
            other = made.setdefault(name, document)
            assert other == document, f"{name} is made by {other.relative_to(ROOT)} and {document.relative_to(ROOT)}"
    assert {"pump-1", "sensor-1", "fleet", "factory.token", "acme.ndjson", "renewed.ndjson"} <= made.keys()
