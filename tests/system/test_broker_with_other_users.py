"""A Mosquitto with other users: its listener, passwords, ACL, dynamic security and bridge go on beside the portal."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.deployment import Deployment, examine, wait_until
from tests.support.mosquitto import BESIDE, Mosquitto, mosquitto_program
from tests.support.mqtt import NOT_AUTHORISED, MqttClient
from tests.support.ports import free_port

pytestmark = pytest.mark.system

DYNSEC = "/usr/lib/x86_64-linux-gnu/mosquitto_dynamic_security.so"
RIGHT, WRONG = "right", "wrong"  # passwords
# An operator's broker that was there first: house automation, a bridge, dynamic security, and the portal's part.
MAIN = """\
persistence true
persistence_location {folder}/state/
log_dest stderr
log_type all
allow_anonymous false
password_file {folder}/passwd
acl_file {folder}/house.acl
listener {house} 127.0.0.1

connection upstream
address 127.0.0.1:{upstream}
topic house/# out 1
topic devices/# out 1

include_dir {folder}/conf.d
"""
ACL = "user kitchen\ntopic readwrite house/#\n\nuser backend\ntopic readwrite devices/#\n"


def run(*words: str | Path) -> None:
    subprocess.run(words, check=True, capture_output=True)


def is_open(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


class HouseBroker(Mosquitto):
    """The operator's broker, with its files in ``home`` and the portal's in ``folder``."""

    def __init__(self, home: Path, folder: Path, port: int) -> None:
        super().__init__(folder, port, guard=True)
        self.home = home
        self.house, self.upstream = free_port(), free_port()

    def configuration_text(self) -> str:
        parts, state = self.home / "conf.d", self.home / "state"
        parts.mkdir()
        (parts / "00-portal.conf").write_text(self.filled_in(BESIDE.read_text()))
        (parts / "dynsec.conf").write_text(f"plugin {DYNSEC}\nplugin_opt_config_file {state}/dynsec.json\n")
        (self.home / "house.acl").write_text(ACL)
        for path in (parts, state, *parts.iterdir(), *state.iterdir(), self.home / "house.acl", self.home / "passwd"):
            path.chmod(0o777 if path.is_dir() else 0o666)  # the broker has a user of its own
        return MAIN.format(folder=self.home, house=self.house, upstream=self.upstream)

    def client(self, user: str, password: str = RIGHT, *, client_id: str = "") -> MqttClient | None:
        """A user of the operator's, connected; nobody if it is refused."""
        client = MqttClient(socket.create_connection(("127.0.0.1", self.house), 10))
        if client.connect(client_id or f"house-{user}", username=user, password=password) == 0:
            return client
        client.close()
        return None

    def may(self, user: str, topic: str) -> bool:
        """Say whether a user of the operator's may publish there."""
        client = self.client(user)
        assert client is not None
        with client:
            return client.publish(topic) != NOT_AUTHORISED


class HouseDeployment(Deployment):
    """A portal whose broker is the operator's."""

    def start_broker(self) -> HouseBroker:
        (self.folder / "passwd").touch()
        (self.folder / "state").mkdir()
        for user in ("kitchen", "backend"):
            run("mosquitto_passwd", "-b", self.folder / "passwd", user, RIGHT)
        run("mosquitto_ctrl", "dynsec", "init", self.folder / "state" / "dynsec.json", "admin", RIGHT)
        self.house = HouseBroker(self.folder, self.data / "broker", self.mqtt_port)
        configuration = self.folder / "upstream.conf"
        configuration.write_text(f"listener {self.house.upstream} 127.0.0.1\nallow_anonymous true\n")
        self.upstream = subprocess.Popen([mosquitto_program(), "-c", configuration], stderr=subprocess.DEVNULL)
        wait_until(lambda: is_open(self.house.upstream))
        self.broker = self.house.start()
        return self.house

    def stop_broker(self) -> None:
        super().stop_broker()
        self.upstream.terminate()
        self.upstream.wait(10)

    def dynsec(self, *commands: dict[str, object]) -> None:
        """Command dynamic security, as its administrator."""
        admin = self.house.client("admin")
        assert admin is not None
        with admin:
            assert admin.subscribe("$CONTROL/dynamic-security/v1/response") == 1
            admin.publish("$CONTROL/dynamic-security/v1", json.dumps({"commands": commands}).encode())
            answers = json.loads(admin.receive().payload)["responses"]
        assert not [answer for answer in answers if "error" in answer], answers


@pytest.fixture(scope="module")
def deployment() -> Iterator[HouseDeployment]:
    with HouseDeployment(PORTAL_BROKER_CONTROL="guard") as running:
        running.wait_ready()
        yield running


def test_users_with_a_password_have_what_the_operators_acl_says(deployment: HouseDeployment) -> None:
    house = deployment.house
    assert house.may("kitchen", "house/lamp")
    assert not house.may("kitchen", "devices/lamp")
    assert house.may("backend", "devices/lamp")
    assert house.client("kitchen", WRONG) is None
    assert house.client("portal", WRONG) is None


def test_dynamic_security_goes_on(deployment: HouseDeployment) -> None:
    allow = {"acltype": "publishClientSend", "topic": "garden/#", "allow": True}
    deployment.dynsec(
        {"command": "createRole", "rolename": "gardener", "acls": [allow]},
        {"command": "createClient", "username": "gardener", "password": RIGHT, "roles": [{"rolename": "gardener"}]},
    )
    assert deployment.house.may("gardener", "garden/gate")
    assert not deployment.house.may("gardener", "house/lamp")


def test_devices_are_the_guards_alone(deployment: HouseDeployment) -> None:
    house, device = deployment.house, deployment.onboard()
    # A client that has the name of a device by dynamic security or as its client id is refused.
    allow = {"acltype": "publishClientSend", "topic": "house/#", "allow": True}
    deployment.dynsec(
        {"command": "createRole", "rolename": "intruder", "acls": [allow]},
        {"command": "createClient", "username": device.id, "password": RIGHT, "roles": [{"rolename": "intruder"}]},
    )
    assert house.client(device.id) is None
    assert house.client("kitchen", client_id=device.id) is None
    client = device.client()
    assert client.publish(f"devices/{device.id}/x") in ("Success", "No matching subscribers")
    for topic in ("house/lamp", "devices/lamp", "garden/gate"):
        assert client.publish(topic) == "Not authorized", topic
    kitchen = house.client("kitchen")
    assert kitchen is not None
    with kitchen:
        assert deployment.call("POST", f"/revoke/{device.id}", {}).json()["broker"] == "enforced"
        client.wait_cut()
        kitchen.ping()
    client.close()


def test_the_bridge_goes_on_and_doctor_names_what_it_carries(deployment: HouseDeployment) -> None:
    house = deployment.house
    with MqttClient(socket.create_connection(("127.0.0.1", house.upstream), 10)) as far:
        assert far.connect("far") == 0
        assert far.subscribe("house/#") == 1
        assert house.may("kitchen", "house/lamp")
        assert far.receive().topic == "house/lamp"
    _, bad = examine(deployment, "--broker-config", str(house.configuration))
    assert bad.keys() == {"broker configuration"}
    assert "The bridge upstream (topic devices/# out 1) copies devices' messages" in bad["broker configuration"]


def test_settings_of_each_listener_alone_are_named(deployment: HouseDeployment) -> None:
    """The one thing that such an operator has to change."""
    text = "per_listener_settings true\n" + deployment.house.configuration.read_text()
    other = deployment.folder / "other.conf"
    other.write_text(text)
    _, bad = examine(deployment, "--broker-config", str(other))
    assert "per_listener_settings is true" in bad["broker configuration"]
