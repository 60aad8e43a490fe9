"""Tells the portal's whole story with the real server, broker and clients."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from scripts.demo_site import StepFailed, expect, running

HALL = "devices/hall-2"  # a topic that no device owns: some are given it to write, some to read


def main() -> int:
    """Run the demo; 0 where every step happened as it should, else 1 with the reason, 130 after Ctrl-C."""
    for terminated in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(terminated, _stop)
    story = Story()
    try:
        with contextlib.ExitStack() as at_the_end:
            tell(story, at_the_end)
    except (StepFailed, OSError, subprocess.SubprocessError) as error:
        print(f"\nThe demo failed: {_sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; nothing is left running, nothing is left on the disk.", file=sys.stderr)
        return 130
    print(f"\nAll {story.steps} steps happened as they should, in {time.monotonic() - story.began:.1f} s.")
    return 0


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _sentence(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{Path(error.cmd[0]).name} did not end within {error.timeout:g} s."
    return str(error)


LINE = 105  # columns, if the terminal has as many


class Story:
    """Prints each step with the time that it took."""

    def __init__(self) -> None:
        self.steps = 0
        self.began = time.monotonic()

    @contextlib.contextmanager
    def step(self, sentence: str) -> Iterator[None]:
        """Time the body, print the sentence once it is through."""
        began = time.monotonic()
        try:
            yield
        except StepFailed as error:
            raise StepFailed(f"{error}\nIt should have been: {sentence}") from None
        self.happened(sentence, time.monotonic() - began)

    def happened(self, sentence: str, seconds: float) -> None:
        """Print a step that was timed elsewhere."""
        self.steps += 1
        took = f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
        width = min(shutil.get_terminal_size((LINE, 24)).columns, LINE)
        *lines, last = textwrap.wrap(f"{self.steps:2}. {sentence}", width - 8, subsequent_indent="    ")
        print("\n".join([*lines, f"{last:<{width - 7}}{took:>7}"]), flush=True)

    def detail(self, text: str) -> None:
        """Print what was seen at the step above."""
        for line in text.splitlines():
            print(f"      {line}", flush=True)


def tell(story: Story, at_the_end: contextlib.ExitStack) -> None:
    """The steps, in their order; raises ``StepFailed``."""
    print("A device from its box to the broker and out again. Times include the start of each program.\n")
    with story.step("The portal makes its CA and answers over HTTPS, with a Mosquitto beside it"):
        site = at_the_end.enter_context(running())

    with story.step("An operator registers pump-1; the answer is a one-time link and a password"):
        pump = site.register("pump-1", f"{HALL}/pressure:write", "--password-out", "password.txt")
    with story.step("The link gives an encrypted bundle; key, certificate and chain in it belong together"):
        site.portal("download", pump["download_url"], "--out", "pump-1", "--password-file", "password.txt")
    story.detail(site.files("pump-1"))
    with story.step("The same link a second time is refused"):
        refused = site.refused("download", pump["download_url"], "--out", "again", "--password-file", "password.txt")
        expect(refused["status"] == 410, f"the answer was {refused}")
    story.detail(f"{refused['status']}: {refused['detail']}")

    with story.step("display-1 is registered and unpacked in one go; it may read what is sent in the hall"):
        display = site.register("display-1", f"{HALL}/#:read", "--out", "display-1")
    with story.step("display-1 connects over mutual TLS and subscribes"):
        own = f"devices/{display['device_id']}/#"
        watching = at_the_end.enter_context(site.subscribed("display-1", f"{HALL}/#", own))
    with story.step("pump-1 publishes over mutual TLS, and display-1 sees it"):
        site.publish("pump-1", f"{HALL}/pressure", "2.4 bar")
        seen = watching.wait_for("MESSAGE")
        expect(seen == f"MESSAGE {HALL}/pressure 2.4 bar", f"display-1 saw {seen!r}")
    story.detail(seen.removeprefix("MESSAGE "))
    with story.step("pump-1 tries a topic of display-1: refused by the broker, and nothing arrives"):
        answer = site.publish("pump-1", f"devices/{display['device_id']}/command", "open the valve")
        expect("not authorized" in answer.lower(), f"the broker's answer was {answer!r}")
        # What comes after it has arrived: so would the other have.
        site.publish("pump-1", f"{HALL}/pressure", "2.5 bar")
        after = watching.wait_for("MESSAGE")
        expect(after == f"MESSAGE {HALL}/pressure 2.5 bar", f"display-1 saw {after!r}")
    story.detail(answer)

    with story.step("pump-1 connects and stays, waiting for commands"):
        pump_topic = f"devices/{pump['device_id']}/#"
        staying = at_the_end.enter_context(site.subscribed("pump-1", pump_topic))
        expect(staying.is_connected(), "pump-1 is not connected")
    cut, answered = site.revoke(pump["device_id"], staying)
    story.happened("The operator revokes pump-1, and the broker cuts its session", cut)
    story.happened("… and the operator sees: revoked, and the broker was seen to enforce it", answered)
    with story.step("pump-1 comes back by itself, with the same certificate: refused"):
        refusal = staying.wait_refused()
    story.detail(refusal)
    with story.step("Another TLS client with pump-1's key learns why, once the broker has the CRL"):
        alert = site.wait_alert("pump-1")
        expect("certificate revoked" in alert, f"the TLS handshake ended with {alert!r}")
    story.detail(alert)
    with story.step("display-1 is still connected, and may connect again"):
        expect(watching.is_connected(), "display-1 was cut off, too")
        answer = site.publish("display-1", f"devices/{display['device_id']}/status", "well")
        expect(answer == "", f"display-1 got the answer {answer!r}")
    began = time.monotonic()
    at_the_end.close()
    expect(not site.folder.exists() and not site.answers(), "something was left behind")
    story.happened("Portal and broker are stopped, and the temporary folder is removed", time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
