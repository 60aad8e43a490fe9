"""Programs with a device's values in them: as far as they can be judged without a broker."""

from __future__ import annotations

import ast
import json
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from commands.errors import CheckFailed, Unreachable
from commands.snippets import SNIPPETS, snippet_for
from tests.support.cli_session import PROJECT, Session
from tests.support.portal_stub import PortalStub

pytest_plugins = ("tests.support.cli_fixtures",)
ID = "0f9d2c4e-5b1a-4c7d-9e8f-102030405060"
BROKERS = [{"host": "mqtt.example.com", "port": 8883}]
HEADERS = PROJECT / "tests" / "support" / "headers"
STRANGE = 'devices/{id}/it\'s "a" $topic \\ ${x} `x`'  # what a topic may be, and no language may take for its own


def device(*topics: tuple[str, str], **fields: Any) -> dict[str, Any]:
    shown = [{"filter": pattern, "access": access} for pattern, access in topics or [("devices/{id}/#", "readwrite")]]
    return {"device_id": ID, "brokers": BROKERS, "topics": shown} | fields


@pytest.mark.parametrize("kind", SNIPPETS)
def test_a_program_has_the_values_of_the_device(kind: str) -> None:
    program = snippet_for(device(("devices/{id}/down", "read"), ("devices/{id}/up/+/#", "write")), kind)
    for value in ("mqtt.example.com", "8883", ID, f"devices/{ID}/up/hello/hello", "ca", "chain", "key"):
        assert value in program, value
    assert "$" not in program.replace("${COMPONENT_TARGET}", "")


@pytest.mark.parametrize("topic", ["devices/{id}/#", STRANGE])
@pytest.mark.parametrize(("kind", "suffix"), [("esp-idf", "c"), ("zephyr", "c"), ("node", "js"), ("python", "py")])
def test_each_program_is_one_of_its_language_whatever_the_topic_is(
    tmp_path: Path, kind: str, suffix: str, topic: str
) -> None:
    path = tmp_path / f"program.{suffix}"
    path.write_text(snippet_for(device((topic, "write")), kind))
    if kind == "python":
        literals = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        assert topic.replace("{id}", ID).replace("#", "hello") in literals
        return
    if kind == "node":
        command = ["node", "--check", str(path)]
    else:
        include = HEADERS / "esp" if kind == "esp-idf" else HEADERS
        command = ["gcc", "-std=gnu17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{include}", str(path)]
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_mosquitto_s_lines_are_words_of_a_shell_and_there_is_one_for_what_the_device_may() -> None:
    for topics, programs in (
        ([(STRANGE, "readwrite")], ["mosquitto_pub", "mosquitto_sub"]),
        ([(STRANGE, "read")], ["mosquitto_sub"]),
        ([(STRANGE, "write")], ["mosquitto_pub"]),
    ):
        _, *lines = snippet_for(device(*topics), "mosquitto").splitlines()
        words = [shlex.split(line) for line in lines]
        assert [line[0] for line in words] == programs
        assert {line[line.index("-t") + 1] for line in words} == {STRANGE.replace("{id}", ID)}


def test_a_device_that_only_reads_has_no_program_that_publishes() -> None:
    with pytest.raises(CheckFailed, match="--snippet mosquitto"):
        snippet_for(device(("devices/{id}/down", "read")), "python")


def test_an_older_portal_does_not_say_where_the_broker_is() -> None:
    for older in (device(brokers=[]), {"device_id": ID}, device(brokers=[{"host": "*/ x", "port": 1}])):
        with pytest.raises(Unreachable):
            snippet_for(older, "python")


def test_show_prints_the_program_and_nothing_else(session: Session, stub: PortalStub) -> None:
    device_id = stub.add_device(brokers=BROKERS)
    result = session.run("show", "sensor-7", "--snippet", "python")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == snippet_for(stub.devices[device_id], "python")
    assert session.json("show", "sensor-7", "--snippet", "node")["program"].startswith("// npm install mqtt")
    assert "brokers" not in session.run("show", "sensor-7").stdout
    assert json.loads(session.run("show", "sensor-7", "--json").stdout)["brokers"] == BROKERS
