"""The first command of the README: it sets up, serves, stops cleanly, and says what is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.deployment import wait_until
from tests.support.script_process import ROOT, Run, ScriptFolder, machine_without, processes_with
from tests.support.shell_session import masked

pytestmark = pytest.mark.system

SET_UP = r"(Making a virtual environment in .*|Installing the Python packages of .*)\n"


@pytest.fixture
def folder() -> Iterator[Path]:
    with ScriptFolder() as made:
        yield made


def shown_in_readme() -> str:
    text = (ROOT / "README.md").read_text()
    found = re.search(r"```console\n\$ scripts/run\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


def what_it_prints(text: str, project: str, data: str) -> str:
    """Without the lines of a first set-up, and without paths and ports."""
    return masked(re.sub(SET_UP, "", text).replace(data, "<data>").replace(project, "<project>")).strip()


OTHER_ADDRESS = "127.0.0.2"  # reaches who listens on all addresses, and not who listens on 127.0.0.1


def listens_on(address: str, port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex((address, port)) == 0


def test_it_serves_stops_and_continues_with_the_same_data(folder: Path) -> None:
    data = folder / "data"
    with Run(data) as run:
        run.wait_ready()
        home = "/opt/onboarding-portal"
        expected = what_it_prints(shown_in_readme(), home, f"{home}/data")
        assert what_it_prints(run.printed, str(ROOT), str(data)) == expected

        operator = (data / "operator.env").read_text()
        assert stat.S_IMODE((data / "operator.env").stat().st_mode) == 0o600
        names = re.findall(r"^export (\w+)=\S+$", operator, re.MULTILINE)
        assert names[:4] == ["PORTAL_URL", "PORTAL_CA", "PORTAL_TOKEN", "PORTAL_MQTT_PORT"]
        assert names[4:] == ["PORTAL_BIND", "PORTAL_DATA_DIR", "PORTAL_PKI_BIND"]  # what it was given besides
        assert f"PORTAL_MQTT_PORT={run.ports['PORTAL_MQTT_PORT']}\n" in operator

        run.wait_in_force()
        assert run.bash("./portal status").returncode == 0
        registered = run.bash(
            f"./portal register pump-1 --type pump --location here --firmware 1 --out '{folder}/pump'"
        )
        assert registered.returncode == 0, registered.stderr
        published = run.bash(
            f"cd '{folder}/pump' && mosquitto_pub $(grep -v '^#' mosquitto-client.conf)"
            " -t devices/$(openssl x509 -in device.pem -noout -subject | grep -o '[0-9a-f-]*$')/up -m 1 -q 1 -d"
        )
        assert "received PUBACK (Mid: 1, RC:0)" in published.stdout, published

        assert not listens_on(OTHER_ADDRESS, run.ports["PORTAL_MQTT_PORT"])

        # Another one beside it refuses, and does not disturb it.
        with Run(data, run.addresses) as second:
            assert second.wait_end() == 1
        printed = second.printed.removeprefix("Setting up.\n")
        assert printed.startswith(f"Error: The portal of {data} is running already. "), printed
        assert f"source {data}/operator.env;" in printed
        assert run.bash("./portal list").stdout.count("pump-1") == 1

        assert run.terminate() == 0
        assert "Stopped. The data stay in" in run.printed
        assert processes_with(str(data)) == []

    with Run(data, run.addresses | {"PORTAL_MQTT_BIND": "0.0.0.0"}) as again:  # noqa: S104
        again.wait_ready()
        assert listens_on(OTHER_ADDRESS, run.ports["PORTAL_MQTT_PORT"])
        now = (data / "operator.env").read_text().splitlines()
        assert {*now} == {*operator.splitlines(), "export PORTAL_MQTT_BIND=0.0.0.0"}
        listed = again.bash("./portal list")
        assert "pump-1\tpump\there\tactive" in listed.stdout, listed
        assert again.press_ctrl_c() == 0
        assert processes_with(str(data)) == []


def test_a_start_that_is_interrupted_does_not_speak_as_if_a_portal_had_been_stopped(folder: Path) -> None:
    programs = folder / "venv" / "bin"
    programs.mkdir(parents=True)
    for pipe in ("begun", "answer"):
        os.mkfifo(folder / pipe)
    checks = f"echo begun >{folder}/begun; read -r answer <{folder}/answer"
    (programs / "python").write_text(f'#!/bin/sh\n[ "$1" = -c ] || {{ {checks}; }}\n')
    (programs / "pip").symlink_to("/bin/true")
    (programs / "python").chmod(0o755)
    with Run(folder / "data", {"PORTAL_VENV": str(folder / "venv"), "PORTAL_BROKER_CONTROL": "files"}) as run:
        assert (folder / "begun").read_text() == "begun\n"
        os.killpg(run.process.pid, signal.SIGINT)
        answer = os.open(folder / "answer", os.O_RDWR)  # which waits for no reader
        os.write(answer, b"yes\n")
        assert run.wait_end() == 130
        os.close(answer)
    assert run.printed.endswith("\n\nInterrupted before the portal was started.\n")
    assert "Stopped." not in run.printed
    assert processes_with(str(folder / "data")) == []


ASKS = """#!/bin/sh
case $2 in
    "") exit ;;
    flask)
        echo "effective=yes trust_anchor=none PORTAL_PUBLIC_URL=none PORTAL_MQTT_BIND=127.0.0.1 PORTAL_MQTT_TLS=1.2"
        echo "PORTAL_BROKER_DIR=$PORTAL_DATA_DIR PORTAL_BROKER_SOCKET=$PORTAL_DATA_DIR/socket"
        exec >&-
        exec sleep 60 ;;
esac
trap 'echo "Traceback" >&2; exit 1' INT
echo begun >"$FOLDER/begun"
read -r answer <"$FOLDER/answer"
"""


def test_what_it_was_just_asking_says_nothing_when_it_is_interrupted(folder: Path) -> None:
    programs = folder / "venv" / "bin"
    programs.mkdir(parents=True)
    for pipe in ("begun", "answer"):
        os.mkfifo(folder / pipe)
    (programs / "python").write_text(ASKS)
    (programs / "python").chmod(0o755)
    (programs / "pip").symlink_to("/bin/true")
    settings = {"PORTAL_VENV": str(folder / "venv"), "PORTAL_BROKER_CONTROL": "files", "FOLDER": str(folder)}
    with Run(folder / "data", settings) as run:
        assert (folder / "begun").read_text() == "begun\n"
        os.killpg(run.process.pid, signal.SIGINT)
        answer = os.open(folder / "answer", os.O_RDWR)  # which waits for no reader
        os.write(answer, b"yes\n")
        assert run.wait_end() == 130
        os.close(answer)
    assert "Traceback" not in run.printed
    assert run.printed.endswith(f"\nStopping.\nStopped. The data stay in {folder}/data; scripts/run uses them again.\n")


@pytest.mark.parametrize("variable", ["PORTAL_BIND", "PORTAL_MQTT_PORT"])
def test_a_port_in_use_is_said_in_one_sentence(folder: Path, variable: str) -> None:
    run = Run(folder / "data")
    with socket.create_server(("127.0.0.1", run.ports[variable])), run:
        assert run.wait_end() == 1
    last = run.printed.splitlines()[-1]
    assert re.fullmatch(
        rf"(Error: )?Port {run.ports[variable]}( on 127\.0\.0\.1)? is in use; stop what uses it or set {variable}\.",
        last,
    ), run.printed
    # Those of the portal before anything is made, since the CA's first certificates name them.
    assert (folder / "data" / "ca.pem").exists() is (variable == "PORTAL_MQTT_PORT")
    assert processes_with(str(folder / "data")) == []


def test_a_wrong_setting_is_said_in_one_sentence(folder: Path) -> None:
    with Run(folder / "data", {"PORTAL_DEVICE_DAYS": "many"}) as run:
        assert run.wait_end() == 1
    assert re.fullmatch(r"Setting up\.\n(.*\n)?Error: PORTAL_DEVICE_DAYS must be .*\.\n", run.printed), run.printed


def test_it_ends_and_says_so_when_the_broker_has_died(folder: Path) -> None:
    with Run(folder / "data") as run:
        run.wait_ready()
        os.kill(int((folder / "data" / "broker" / "mosquitto.pid").read_text()), signal.SIGKILL)
        assert run.wait_end() == 1
    assert f"Mosquitto has stopped by itself. The last lines of {folder}/data/broker/mosquitto.log:" in run.printed
    assert run.printed.endswith("\nPortal and broker are stopped. To start again, run: scripts/run\n")
    assert "Killed" not in run.printed  # as bash says of its children
    assert processes_with(str(folder / "data")) == []


def control_of(run: Run) -> str:
    """What the broker folder says, once the portal has seen the broker obey."""
    run.wait_in_force()
    record = json.loads((run.data / "broker" / "projection.json").read_text())
    loads_guard = "\nplugin " in (run.data / "broker" / "mosquitto.conf").read_text()
    assert loads_guard == (record.get("control") == "guard")
    return "guard" if loads_guard else "files"


def register(run: Run, name: str) -> str:
    """Register a device, and return its id; its credentials are in a folder of its name."""
    out = run.data.parent / name
    done = run.bash(f"./portal register {name} --type pump --location here --firmware 1 --out '{out}' --json")
    assert done.returncode == 0, done
    return str(json.loads(done.stdout)["device_id"])


def publishes(run: Run, name: str, device_id: str) -> bool:
    done = run.bash(
        f"cd '{run.data.parent / name}' && mosquitto_pub $(grep -v '^#' mosquitto-client.conf)"
        f" -t devices/{device_id}/up -m 1 -q 1 -V 5 -d"
    )
    return "RC:0)" in done.stdout or "RC:16)" in done.stdout


def test_a_data_folder_goes_over_to_the_guard_at_one_start_and_back_at_another(folder: Path) -> None:
    data = folder / "data"
    addresses: dict[str, str] = {}
    good = revoked = ""
    for control in ("files", "", "files"):
        with Run(data, addresses | {"PORTAL_BROKER_CONTROL": control}) as run:
            addresses = run.addresses
            run.wait_ready()
            assert control_of(run) == (control or "guard")
            if not good:
                good, revoked = register(run, "good"), register(run, "revoked")
                run.bash(f"./portal revoke {revoked} --yes")
            assert publishes(run, "good", good)
            assert not publishes(run, "revoked", revoked)
            assert run.terminate() == 0


def test_it_restarts_the_broker_with_the_guard_when_the_portal_asks(folder: Path) -> None:
    data = folder / "data"
    pid_file = data / "broker" / "mosquitto.pid"
    with Run(data) as run:
        run.wait_ready()
        assert control_of(run) == "guard"
        before = pid_file.read_text()
        environment = Path(f"/proc/{before.strip()}/environ").read_text()
        assert f"OPENSSL_CONF={data}/broker/openssl.cnf" in environment.split("\0")
        run.process.send_signal(signal.SIGUSR1)
        wait_until(lambda: pid_file.exists() and pid_file.read_text() not in ("", before))
        run.wait_in_force()
        assert run.terminate() == 0
    assert processes_with(str(data)) == []


def test_where_the_guard_cannot_be_built_it_goes_on_with_files_and_says_so(folder: Path) -> None:
    root, path = machine_without(folder, "gcc", "cc", "x86_64-linux-gnu-gcc", "apt", "sudo")
    with Run(folder / "data", {"PATH": path}, root=root) as run:
        run.wait_ready()
        said = "The guard cannot be built, so the portal controls the broker by files; to change that: apt-get install "
        assert f"\n{said}gcc make mosquitto-dev libmosquitto-dev.\n" in run.printed
        assert control_of(run) == "files"
        assert run.terminate() == 0


def test_without_mosquitto_it_names_the_package_and_writes_the_files(folder: Path) -> None:
    root, path = machine_without(folder, "mosquitto", "apt", "sudo")
    with Run(folder / "data", {"PATH": path, "PORTAL_ACL_STYLE": "per-device"}, root=root) as run:
        run.wait_ready()
        assert "Install it with: apt-get install mosquitto\n" in run.printed
        assert f"No broker is running; its files are in {folder}/data/broker\n" in run.printed
        done = run.bash(
            f"./portal register pump-1 --type pump --location here --firmware 1 --csr '{_csr(folder)}' --json"
        )
        assert '"status": "active"' in done.stdout, done
        device_id = re.findall(r'"device_id": "(.*?)"', done.stdout)[0]
        wait_until(lambda: f"user {device_id}" in (folder / "data" / "broker" / "acl").read_text())
        assert run.terminate() == 0
    assert processes_with(str(folder / "data")) == []


def _csr(folder: Path) -> Path:
    make = "openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=x -keyout key -out csr"
    subprocess.run(make.split(), cwd=folder, check=True, capture_output=True)
    return folder / "csr"
