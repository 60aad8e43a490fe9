"""A person who has a link, the password and nothing else gets a device connected, by the commands that are printed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from tests.support.deployment import ROOT, SECONDS, Deployment, deployed

pytestmark = pytest.mark.system
CHROMIUM = "/usr/bin/chromium"
REGISTER = ("register", "pump-3", "--type", "pump", "--location", "Hall 2", "--firmware", "1.0")
FIREFOX = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with deployed(PORTAL_VENV=sys.prefix) as running:
        running.wait_ready()
        yield running


class Recipient:
    """Somebody in an empty folder, without account and CA file, who was sent a block and a password."""

    def __init__(self, deployment: Deployment, folder: Path, bundle_format: str) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        (folder / "bin" / "portal").symlink_to(ROOT / "portal")
        kept = {name: value for name, value in deployment.environment.items() if not name.startswith("PORTAL_")}
        path = f"{folder}/bin:{kept['PATH']}"
        self.environment = kept | {"HOME": str(folder), "PATH": path, "PORTAL_VENV": sys.prefix, "NO_PROXY": "*"}
        command = [str(ROOT / "portal"), *REGISTER, "--format", bundle_format, "--password-out", f"{folder}/password"]
        done = subprocess.run(
            command,
            env=deployment.environment | deployment.operator,
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stderr
        self.block = done.stderr.partition("Pass this on, and the password by another way:")[2]
        self.password = (folder / "password").read_text().strip()
        assert self.password not in done.stderr + done.stdout
        fields = dict(line.split("\t", 1) for line in done.stdout.splitlines())
        self.id, self.link = fields["device_id"], fields["download_url"]

    def commands(self) -> list[str]:
        """The commands of the block, each as it is printed."""
        return [part for part in self.block.split("\n\n") if part.startswith("    ")]

    def run(self, command: str, **environment: str) -> str:
        """What a command prints; it reads the password from its standard input, having no terminal."""
        done = subprocess.run(
            ["setsid", "bash", "-euc", command],
            cwd=self.folder,
            env=self.environment | environment,
            input=3 * f"{self.password}\n",
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def publish(deployment: Deployment, folder: Path) -> None:
    """Connect with the options of the bundle, as its README says."""
    options = [line for line in (folder / "mosquitto-client.conf").read_text().splitlines() if line.startswith("-")]
    words = [word for line in options for word in line.split(" ", 1)]
    topic = f"devices/{words[words.index('-i') + 1]}/up"
    command = ["mosquitto_pub", *words, "-t", topic, "-m", "hello", "-q", "1", "-V", "mqttv5"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_portal_command_of_the_block_fetches_and_checks(deployment: Deployment, tmp_path: Path) -> None:
    one = Recipient(deployment, tmp_path, "zip")
    by_portal, _ = one.commands()
    assert re.search(r"--fingerprint [0-9a-f]{64}$", by_portal)
    one.run(by_portal, PORTAL_BUNDLE_PASSWORD=one.password)
    publish(deployment, tmp_path / one.id)


def test_the_other_command_of_the_block_needs_nothing_of_the_portal(deployment: Deployment, tmp_path: Path) -> None:
    one = Recipient(deployment, tmp_path, "zip")
    one.run(one.commands()[1])
    checked = one.run(f"cd {one.id} && sha256sum --check SHA256SUMS")
    assert "README.txt: OK" in checked
    publish(deployment, tmp_path / one.id)


def test_it_stops_before_the_link_if_the_server_is_another(deployment: Deployment, tmp_path: Path) -> None:
    one = Recipient(deployment, tmp_path, "zip")
    altered = re.sub("[0-9a-f]{64}", "0" * 64, one.commands()[1])
    with pytest.raises(AssertionError, match="404"):
        one.run(altered)
    assert deployment.session.head(one.link, timeout=20).status_code == 200


@pytest.mark.parametrize("bundle_format", ["p12", "pem"])
def test_the_commands_fit_the_other_formats(deployment: Deployment, tmp_path: Path, bundle_format: str) -> None:
    one = Recipient(deployment, tmp_path, bundle_format)
    one.run(one.commands()[1])
    if bundle_format == "p12":
        assert "BEGIN ENCRYPTED PRIVATE KEY" in (tmp_path / f"{one.id}.pem").read_text()
        return
    one.run(
        f"openssl pkey -in {one.id}/device.key -passin stdin -out {one.id}/open.key && mv {one.id}/{{open,device}}.key"
    )
    publish(deployment, tmp_path / one.id)


def test_a_browser_looks_presses_the_button_and_opens_the_file_as_the_page_says(
    deployment: Deployment, tmp_path: Path
) -> None:
    one = Recipient(deployment, tmp_path, "zip")
    for _ in range(2):
        answer = deployment.session.get(one.link, headers={"Accept": FIREFOX}, timeout=20)
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    key = re.search(r'name="idempotency_key" value="([^"]+)"', answer.text)
    assert key is not None
    headers = {"Accept": FIREFOX, "Sec-Fetch-Site": "same-origin", "Origin": "null"}
    pressed = deployment.session.post(one.link, data={"idempotency_key": key[1]}, headers=headers, timeout=20)
    name = re.search('filename="(.+)"', pressed.headers["Content-Disposition"])
    assert name is not None
    (tmp_path / name[1]).write_bytes(pressed.content)
    linux = re.search(r"Linux</summary>.*?<pre><code>(.*?)</code>", answer.text, re.DOTALL)
    assert linux is not None
    one.run(linux[1].replace("&amp;", "&"))
    publish(deployment, tmp_path / one.id)
    assert deployment.session.get(one.link, headers={"Accept": FIREFOX}, timeout=20).status_code == 410


@pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="needs chromium")
def test_the_button_works_in_a_real_browser_by_keyboard_alone_and_a_double_click_loses_nothing(
    deployment: Deployment, tmp_path: Path
) -> None:
    one = Recipient(deployment, tmp_path, "zip")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(ignore_https_errors=True, viewport={"width": 390, "height": 844})
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(one.link)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        page.keyboard.press("Tab")
        with page.expect_download() as download:
            page.keyboard.press("Enter")
        download.value.save_as(tmp_path / download.value.suggested_filename)
        assert download.value.suggested_filename == f"{one.id}.zip"
        with page.expect_download():
            page.get_by_role("button", name="Download the file").dblclick()
        assert page.get_by_role("heading", level=1).inner_text() == "Credentials of pump-3"
        page.reload()
        assert page.get_by_role("heading", level=1).inner_text() == "This link has been used"
        assert not [text for text in complaints if "Content Security Policy" in text]
        browser.close()
    one.run(f"7z x -o{one.id} {one.id}.zip")
    publish(deployment, tmp_path / one.id)
