"""Makes pictures of the console of a portal with a small fleet, for the documentation."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.support.chromium import PHONE, View, Watched, chromium, opened
from tests.support.deployment import Deployment, wait_until

IMAGES = Path(__file__).parent.parent / "docs" / "images"
FLEET = 24  # devices beside those that are shown by name
NAMED = (
    ("Boiler 1", "boiler", "Vienna, hall 1"),
    ("Cooling pump 4", "pump", "Vienna, hall 2"),
    ("Gate camera", "camera", "Graz, yard"),
    ("Intake valve", "valve", "Graz, hall 1"),
    ("Weather mast", "sensor", "Linz, roof"),
)
CONNECTED = ("Boiler 1", "Gate camera")
REVOKED = "Gate camera"
WINDOW = View(1280, "light")


def main() -> int:
    """Make all pictures; prints the path of each."""
    with contextlib.ExitStack() as stack:
        deployment = Deployment(PORTAL_DEVICE_DAYS="90")
        stack.callback(deployment.__exit__, None, None, None)
        deployment.make_data_folder()
        deployment.start_broker()
        deployment.start_portal()
        for number in range(FLEET):
            fields = {
                "type": "sensor",
                "location": f"Linz, hall {number % 4 + 1}",
                "validity_days": 9 + number * number % 79,
            }
            deployment.register(name=f"Sensor {number + 1:02}", **fields)
        devices = {one[0]: _admitted(deployment, stack, *one) for one in NAMED}
        wait_until(lambda: len(_connected(deployment)) >= len(CONNECTED))
        browser = stack.enter_context(chromium())
        with opened(browser, deployment.url, WINDOW) as watched:
            watched.log_in(deployment.operator["PORTAL_TOKEN"])
            state = watched.page.context.storage_state()
            _take_desktop(watched, devices)
        with opened(browser, deployment.url, View(PHONE, "light"), state=state) as watched:
            watched.page.set_viewport_size({"width": PHONE, "height": 1040})
            _keep(watched.open("/ui/devices?connected=true"), "phone")
    return 0


def _take_desktop(watched: Watched, devices: dict[str, str]) -> None:
    page = watched.page
    page.set_viewport_size({"width": WINDOW.width, "height": 860})
    _keep(watched.open("/ui"), "overview")
    _keep(watched.open("/ui/devices"), "fleet")
    watched.open(f"/ui/devices/{devices[REVOKED]}")
    page.get_by_role("button", name="Revoke", exact=True).click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Why").select_option("key_compromise")
    dialog.get_by_role("button", name="Revoke it now").click()
    expect(page.get_by_role("heading", name="Revoked, and kept out")).to_be_visible(timeout=30_000)
    expect(page.locator("#connection")).to_contain_text("Last seen", timeout=30_000)  # some seconds later
    _keep(page, "revoked")
    watched.open("/ui/devices/register")
    fields = {"Name": "Cooling pump 5", "Type": "pump", "Location": "Vienna, hall 2", "Firmware": "2.1"}
    for label, text in fields.items():
        page.get_by_label(label, exact=True).fill(text)
    page.get_by_role("main").get_by_role("button", name="Register").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Registered")
    _keep(page, "registered")


def _admitted(deployment: Deployment, stack: contextlib.ExitStack, name: str, kind: str, place: str) -> str:
    """Register a device, and connect it if it is to be seen connected; returns its id."""
    fields = {"type": kind, "location": place, "firmware": "2.1"}
    if name not in CONNECTED:
        return str(deployment.register(name=name, **fields)["device_id"])
    device = deployment.onboard(name, *(word for key, value in fields.items() for word in (f"--{key}", value)))
    client = device.client()
    stack.callback(client.close)
    client.is_refused(f"devices/{device.id}/up")  # it says something, as devices do
    return device.id


def _connected(deployment: Deployment) -> list[object]:
    found: list[object] = deployment.call("GET", "/devices?connected=true").json()["devices"]
    return found


def _keep(page: Page, name: str) -> None:
    """Write a picture of what the window shows, in the 256 colours that suit it best."""
    IMAGES.mkdir(exist_ok=True)
    path = IMAGES / f"{name}.png"
    taken = page.screenshot()
    path.write_bytes(subprocess.run(["pngquant", "--strip", "-"], input=taken, check=True, capture_output=True).stdout)
    print(path.relative_to(Path.cwd()))


if __name__ == "__main__":
    sys.exit(main())
