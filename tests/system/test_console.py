"""The console in a real browser: each screen at each width, light and dark; and what a stranger does with it alone."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Locator, Page, StorageState, expect

from bench.fleet import add_fleet
from tests.support.chromium import DESKTOP, PHONE, VIEWS, View, Watched, chromium, opened
from tests.support.deployment import Deployment, Onboarded, wait_until
from tests.support.harness import csr_pem
from tests.support.pki import PEM, Authority
from web.console.screens import PAGES

pytestmark = pytest.mark.system
DEVICES, MANY = 120, 10_000
FILLS = ("empty", "filled")
WIDE = "W" * 128


@dataclass(frozen=True, slots=True)
class Screen:
    """A page of the console: its path, and its heading; ``{device}`` stands for a device."""

    name: str
    path: str
    heading: str
    fills: tuple[str, ...] = FILLS
    opens: str = ""  # the button of a dialog that is looked at, too


SCREENS = (
    Screen("overview", "/ui", "Overview"),
    Screen("fleet", "/ui/devices", "Fleet", opens="Register"),
    Screen("search", "/ui/devices?q=pump&sort=name", "Fleet"),
    Screen("device", "/ui/devices/{device}", WIDE, ("filled",), opens="Revoke"),
    Screen("revoked", "/ui/devices/{revoked}", "pump-0000001", ("filled",)),
    Screen("edit", "/ui/devices/{device}/edit", "Edit", ("filled",)),
    Screen("register", "/ui/devices/register", "Register a device", ("empty",)),
    Screen("sessions", "/ui/sessions", "Sessions"),
    Screen("waiting", "/ui/waiting", "Waiting", ("empty",)),
    Screen("tokens", "/ui/access/tokens", "Access", ("empty",), opens="Revoke the token first admin"),
    Screen("new token", "/ui/access/tokens/new", "New operator token", ("empty",)),
    Screen("enrolment", "/ui/access/enrolment", "Access", ("empty",)),
    Screen("new enrolment token", "/ui/access/enrolment/new", "New enrolment token", ("empty",)),
    Screen("manufacturers", "/ui/access/manufacturers", "Access", ("empty",)),
    Screen("new manufacturer", "/ui/access/manufacturers/new", "New manufacturer", ("empty",)),
    Screen("applications", "/ui/access/applications", "Access", ("empty",)),
    Screen("new application", "/ui/access/applications/new", "New application", ("empty",)),
    Screen("evidence", "/ui/access/enrolment/{token}/evidence", "Evidence for line 3", ("filled",)),
    Screen("edit manufacturer", "/ui/access/manufacturers/{maker}/edit", "Edit A maker", ("filled",)),
    Screen("edit application", "/ui/access/applications/{application}/edit", "Edit back end", ("filled",)),
    Screen("tenants", "/ui/access/tenants", "Access", ("filled",)),
    Screen("brokers", "/ui/access/brokers", "Access", ("filled",)),
    Screen("edit tenant", "/ui/access/tenants/empty/edit", "Edit empty", ("filled",)),
    Screen("new tenant", "/ui/access/tenants/new", "New tenant", ("filled",)),
    Screen("brokers", "/ui/access/brokers", "Access", ("filled",)),
    Screen("manufacturer", "/ui/access/manufacturers/{maker}", "A maker", ("filled",)),
    Screen("request", "/ui/waiting/{request}", "somebody-else", ("filled",)),
    Screen("webhook", "/ui/record/webhooks/{webhook}", "alarm", ("filled",)),
    Screen("record", "/ui/record", "Record"),
    Screen("webhooks", "/ui/record/webhooks", "Record", ("empty",)),
    Screen("new webhook", "/ui/record/webhooks/new", "New webhook", ("empty",)),
)
# Pages that are not screens, or that other tests look at: what they lead to, files, parts of a page, and logins.
NO_SCREENS = {
    "/ui/access", "/ui/devices.csv", "/ui/record.csv", "/ui/devices/{device_id}/enforcement", "/ui/broker",
    "/ui/login", "/ui/login/oidc", "/ui/login/oidc/callback", "/ui/{rest}",
}  # fmt: skip
CASES = [(screen, fill) for screen in SCREENS for fill in screen.fills]


@dataclass
class Place:
    """A portal whose first tenant has devices and whose second has none, with a browser that is logged in to both."""

    deployment: Deployment
    browser: Browser
    states: dict[str, StorageState]
    ids: dict[str, str]

    @contextlib.contextmanager
    def page(self, fill: str = "filled", view: View | None = None) -> Iterator[Watched]:
        with opened(self.browser, self.deployment.url, view, state=self.states[fill]) as watched:
            yield watched


@contextlib.contextmanager
def place(devices: int) -> Iterator[Place]:
    with contextlib.ExitStack() as stack:
        deployment = Deployment(PORTAL_ENFORCE_TIMEOUT="60")  # for which no answer to a revocation may wait
        stack.callback(deployment.__exit__, None, None, None)
        deployment.make_data_folder()
        add_fleet(deployment.data, devices, revoked=10)
        deployment.run_flask("init")  # the broker's files have the devices, too
        deployment.start_broker()
        deployment.start_portal()
        browser = stack.enter_context(chromium())
        ids = {
            "device": deployment.register(name=WIDE, location=WIDE, metadata={"note": WIDE})["device_id"],
            "revoked": deployment.call("GET", "/devices?named=pump-0000001").json()["devices"][0]["device_id"],
        }
        ids |= ids_of_access(deployment)
        added = deployment.call("POST", "/tenants", {"name": "empty"})
        assert added.status_code == 201, added.text
        states = {}
        for fill, token in (("filled", deployment.operator["PORTAL_TOKEN"]), ("empty", added.json()["token"])):
            with opened(browser, deployment.url) as watched:
                watched.log_in(token)
                states[fill] = watched.page.context.storage_state()
        yield Place(deployment, browser, states, ids)


def ids_of_access(deployment: Deployment) -> dict[str, str]:
    certificate = Authority("A maker's CA").certificate.public_bytes(PEM).decode()
    topics = [{"filter": "devices/+/telemetry", "access": "read"}]
    added = {
        "token": ("/enrolment-tokens", "enrolment_token_id", {"name": "line 3"}),
        "maker": ("/manufacturers", "manufacturer_id", {"name": "A maker", "certificate": certificate}),
        "application": ("/applications", "application_id", {"name": "back end", "topics": topics}),
    }
    ids = {name: deployment.call("POST", path, body).json()[key] for name, (path, key, body) in added.items()}
    return ids | {"request": request_that_waits(deployment), "webhook": webhook(deployment)}


def request_that_waits(deployment: Deployment) -> str:
    """The id of a device that asks for a certificate, and needs an operator's approval."""
    token = deployment.call("POST", "/enrolment-tokens", {"name": "a press", "approval": "operator"}).json()["token"]
    asked = deployment.call("POST", "/enroll", {"csr": csr_pem()}, auth=("device", token))
    assert asked.status_code == 202, asked.text
    found: str = deployment.call("GET", "/enrolments").json()["enrolments"][0]["device_id"]
    return found


def webhook(deployment: Deployment) -> str:
    """The id of a webhook that is sent nothing."""
    body = {"name": "alarm", "url": "https://alarm.example.com/in", "events": ["link_reused"]}
    added = deployment.call("POST", "/webhooks", body)
    assert added.status_code == 201, added.text
    found: str = added.json()["webhook_id"]
    return found


@pytest.fixture(scope="module")
def console() -> Iterator[Place]:
    with place(DEVICES) as made:
        yield made


@pytest.fixture(scope="module")
def large() -> Iterator[Place]:
    with place(MANY) as made:
        yield made


def look(console: Place, screen: Screen, fill: str, view: View) -> None:
    """Open a screen, and its dialog; fails on anything that is wrong with what is seen."""
    with console.page(fill, view) as watched:
        page = watched.open(screen.path.format_map(console.ids))
        expect(page.get_by_role("heading", level=1)).to_have_text(screen.heading)
        faults = watched.faults()
        if screen.opens:
            page.get_by_role("button", name=screen.opens, exact=True).first.click()
            expect(page.get_by_role("dialog")).to_be_visible()
            faults += watched.faults()
        assert not faults


def test_each_page_of_the_console_is_a_screen_that_is_looked_at() -> None:
    looked_at = {urlsplit(screen.path).path for screen in SCREENS}
    patterns = {page.path for page in PAGES if page.method == "GET"}
    exact = looked_at & patterns  # a page of its own before one whose path has a part to fill in
    found = {
        pattern
        for pattern in patterns - exact
        if any(re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", pattern), path) for path in looked_at - exact)
    }
    assert patterns - exact - found == NO_SCREENS


@pytest.mark.parametrize(
    ("screen", "fill", "view"),
    [(*case, VIEWS[number % len(VIEWS)]) for number, case in enumerate(CASES)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_screen_is_accessible_fits_its_window_and_asks_nobody_else(
    console: Place, screen: Screen, fill: str, view: View
) -> None:
    look(console, screen, fill, view)


@pytest.mark.long
@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize(("screen", "fill"), CASES, ids=lambda value: getattr(value, "name", str(value)))
def test_each_screen_does_so_in_each_window_with_ten_thousand_devices(
    large: Place, screen: Screen, fill: str, view: View
) -> None:
    look(large, screen, fill, view)


@pytest.mark.parametrize("view", [View(PHONE, "dark"), View(DESKTOP, "light")], ids=str)
def test_so_are_the_login_an_error_and_what_is_not_there(console: Place, view: View) -> None:
    with opened(console.browser, console.deployment.url, view) as watched:
        page = watched.open("/ui/login?next=/ui")
        faults = watched.faults()
        page.get_by_label("Operator token").fill("op_wrong")
        page.get_by_role("button", name="Log in", exact=True).click()
        expect(page.get_by_role("alert")).to_be_visible()
        watched.complaints.clear()  # Chromium itself notes the status
        faults += watched.faults()
        assert not faults
    with console.page("filled", view) as watched:
        watched.page.goto("/ui/devices/00000000-0000-4000-8000-000000000000")
        expect(watched.page.get_by_role("heading", level=1)).to_be_visible()
        watched.complaints.clear()
        assert not watched.faults()
        watched.page.get_by_role("link", name="Fleet").first.click()
        expect(watched.page).to_have_url(re.compile("/ui/devices$"))


def test_a_search_shows_devices_as_it_is_typed_and_the_address_has_it(console: Place) -> None:
    with console.page() as watched:
        page = watched.open("/ui/devices")
        rows = page.locator("#results tbody tr")
        expect(rows).to_have_count(50)
        page.get_by_role("searchbox").press_sequentially("0000017", delay=30)
        expect(rows).to_have_count(1)
        expect(rows.get_by_role("link")).to_have_text("pump-0000017")
        expect(page).to_have_url(re.compile(r"/ui/devices\?q=0000017$"))
        page.get_by_label("Status").select_option("revoked")
        expect(page.get_by_text("No matching devices")).to_be_visible()
        page.go_back()
        expect(rows).to_have_count(1)
        assert not watched.complaints + watched.elsewhere


def test_a_reader_without_a_mouse_gets_everywhere(console: Place) -> None:
    with console.page() as watched:
        page = watched.open("/ui/devices")
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        expect(page.get_by_role("button", name="Register", exact=True)).to_be_focused()
        page.keyboard.press("/")
        expect(page.get_by_role("searchbox")).to_be_focused()
        page.keyboard.type("0000019")
        link = page.get_by_role("link", name="pump-0000019")
        expect(page.locator("#results tbody tr")).to_have_count(1)
        until_focused(page, link)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_have_text("pump-0000019")
        revoke = page.get_by_role("button", name="Revoke", exact=True)
        until_focused(page, revoke)
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_be_hidden()
        expect(revoke).to_be_focused()
        until_focused(page, page.locator("details.account summary"), back=True)
        page.keyboard.press("Enter")
        until_focused(page, page.get_by_role("link", name="Sessions"))
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_have_text("Sessions")


def until_focused(page: Page, wanted: Locator, *, back: bool = False) -> None:
    """Press Tab until the element has the focus; fails if thirty do not suffice, or the focus cannot be seen."""
    for _ in range(30):
        page.keyboard.press("Shift+Tab" if back else "Tab")
        if wanted.evaluate("(one) => one === document.activeElement"):
            assert wanted.evaluate("(one) => getComputedStyle(one).outlineStyle") != "none"
            return
    raise AssertionError(f"no Tab leads to {wanted}")


STEPS = ["Recorded", "Denied", "Cut", "Refused", "Enforced"]


def test_a_stranger_registers_a_device_puts_it_on_the_broker_and_revokes_it_by_the_console_alone(
    console: Place, tmp_path: Path
) -> None:
    deployment = console.deployment
    with opened(console.browser, deployment.url) as watched:
        watched.log_in(deployment.operator["PORTAL_TOKEN"])
        page = watched.open("/ui/devices")
        page.get_by_role("button", name="Register", exact=True).click()
        form = page.get_by_role("dialog")
        for label, text in (("Name", "pump 9"), ("Type", "pump"), ("Location", "hall 1"), ("Firmware", "1.0")):
            form.get_by_label(label, exact=True).fill(text)
        form.get_by_role("button", name="Register").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Registered")
        expect(page.get_by_role("img", name="QR code of the link")).to_be_visible()
        link, password = page.locator("#link").inner_text(), page.locator("#password").inner_text()
        page.get_by_role("link", name="To the device").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("pump 9")
        device = fetched(link, password, page.url.rpartition("/")[2], deployment, tmp_path)
        client = device.client()
        assert not client.is_refused(f"devices/{device.id}/up")
        seen = page.locator(".badge", has_text="Connected")
        wait_until(lambda: page.reload() is not None and seen.count() > 0)  # once the broker has reported it
        with standing_still(deployment):  # so that each step can be seen pending
            page.get_by_role("button", name="Revoke", exact=True).click()
            page.get_by_role("dialog").get_by_role("button", name="Revoke it now").click()
            expect(page.get_by_role("heading", name="Revoked: taking hold")).to_be_visible()
            expect(page.locator(".step strong")).to_have_text(STEPS)
            expect(page.locator(".step-pending strong")).to_have_text(STEPS[1:])
        assert client.wait_cut()
        expect(page.get_by_role("heading", name="Revoked, and kept out")).to_be_visible(timeout=30_000)
        expect(page.locator(".step-pending")).to_have_count(0)
        expect(page.locator("#states .badge")).to_have_text(["Revoked", "Offline"])  # without a reload
        expect(page.locator("#connection")).to_contain_text("Last seen")
        shown = page.locator(".step strong").all_inner_texts()
        assert (shown[0], shown[-1], sorted(shown)) == ("Recorded", "Enforced", sorted(STEPS))
        assert all(re.fullmatch(r"[\d.,]+ m?s", time) for time in page.locator(".step-time").all_inner_texts())
        assert not watched.complaints + watched.elsewhere
    client.close()
    assert device.refusal()


def test_what_waits_for_the_broker_is_said_of_applications_and_tenants_and_watched(console: Place) -> None:
    topics = [{"filter": "devices/+/telemetry", "access": "read"}]
    assert console.deployment.call("POST", "/applications", {"name": "dash", "topics": topics}).status_code == 201
    with console.page() as watched:
        page, held = watched.page, page_waits(watched.page)
        for path, what, do in (
            ("/ui/access/applications", "Revoke dash", "Revoke it now"),
            ("/ui/access/tenants", "Suspend empty", "Suspend it"),
        ):
            watched.open(path)
            with standing_still(console.deployment):
                page.get_by_role("button", name=what).click()
                page.get_by_role("dialog").get_by_role("button", name=do).click()
                expect(page.get_by_role("heading", name="Recorded, and taking hold at the broker")).to_be_visible()
                expect(held).to_be_visible()
                assert not watched.faults()
            expect(page.get_by_role("heading", name="The broker enforces it")).to_be_visible(timeout=30_000)
            expect(page.locator(".step-pending")).to_have_count(0)
            watched.open(path)
            expect(held).to_have_count(0)
        page.get_by_role("button", name="Resume empty").click()
        page.get_by_role("dialog").get_by_role("button", name="Resume it").click()
        expect(page.get_by_role("button", name="Suspend empty")).to_be_visible()


def page_waits(page: Page) -> Locator:
    return page.locator(".badge", has_text="Waits for the broker")


def fetched(link: str, password: str, device_id: str, deployment: Deployment, folder: Path) -> Onboarded:
    """Fetch a bundle as the link's page is read on a machine that has curl and 7z."""
    bundle = folder / "bundle.zip"
    run(["curl", "-fsS", "--noproxy", "*", "--cacert", deployment.operator["PORTAL_CA"], "-o", str(bundle), link])
    run(["7z", "x", "-y", f"-p{password}", f"-o{folder}", str(bundle)])
    return Onboarded(device_id, folder, deployment.mqtt_port)


@contextlib.contextmanager
def standing_still(deployment: Deployment) -> Iterator[None]:
    """The broker does nothing for the body of a ``with``."""
    assert deployment.broker is not None
    os.kill(deployment.broker.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(deployment.broker.pid, signal.SIGCONT)


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
