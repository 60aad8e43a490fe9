"""Compares what clients were told with database, broker files and the devices that the broker accepts."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import requests
from cryptography import x509

from tests.support.crash import (
    ANSWER_SECONDS,
    Known,
    Ledger,
    Victim,
    access_on_disk,
    every_device,
    read_crl,
    refusal_of,
)
from tests.support.deployment import wait_until

READY_SECONDS = 30.0


class Check:
    """Looks for broken promises; each goes into the ledger's ``losses``."""

    def __init__(self, victim: Victim, ledger: Ledger, style: str) -> None:
        self.victim = victim
        self.ledger = ledger
        self.style = style
        self.done: Counter[str] = Counter()
        self._links_seen: set[str] = set()

    def everything(self) -> None:
        """Wait until the portal is ready, then compare every answer and every device."""
        self.ready()
        listed = list(every_device(self.victim))
        self.done["full checks"] += 1
        names = Counter(device["name"] for device in listed)
        for name, times in names.items():
            if times > 1:
                self.ledger.lost("idempotency key with two devices", name)
        by_name = {device["name"]: device for device in listed}
        for known in self.ledger.devices:
            device = by_name.get(known.name)
            if device is not None:
                self.device(known, device)
            elif known.answer is not None:
                self.ledger.lost("answered device is missing", known.name)
        self.files(by_name)
        self.broker(8)
        for known in self.sample(lambda known: known.answer is None and known.name in by_name, 5):
            self.whole(known, by_name[known.name])

    def quick(self) -> None:
        """Wait until the portal is ready, then compare the newest devices, the files and a few connections."""
        self.ready()
        page = self.victim.call("GET", "/devices?limit=200").json()["devices"]
        by_name = {device["name"]: device for device in page}
        self.done["quick checks"] += 1
        for known in self.ledger.devices[-150:]:
            if known.name in by_name:
                self.device(known, by_name[known.name])
            elif known.answer is not None:
                self.ledger.lost("answered device is missing", known.name)
        self.files(by_name)
        self.broker(2)

    def ready(self) -> None:
        started = time.monotonic()
        try:
            wait_until(lambda: self.victim.call("GET", "/readyz").status_code == 200, READY_SECONDS)
        except AssertionError:
            self.ledger.lost("not ready again", self.victim.call("GET", "/readyz").text)
        except requests.ConnectionError as error:
            self.ledger.lost("ended after its start", f"{error} {self.victim.log.read_text()[-2000:]}")
            raise
        self.done["slowest to be ready, ms"] = max(
            self.done["slowest to be ready, ms"], round((time.monotonic() - started) * 1000)
        )

    def device(self, known: Known, device: dict[str, Any]) -> None:
        """What the database says of one device."""
        self.done["devices compared"] += 1
        if known.answer is not None and known.id != device["device_id"]:
            self.ledger.lost("idempotency key with two devices", known.name)
        if known.revoked and device["status"] != "revoked":
            self.ledger.lost("revocation lost", known.name)
        if not known.revoke_sent and device["status"] != "active":
            self.ledger.lost("revoked by nobody", known.name)
        places = known.places[known.placed - 1 :] if known.placed else ["hall 0", *known.places]
        if device["location"] not in places:
            self.ledger.lost("change lost", f"{known.name}: {device['location']}, not {places}")

    def files(self, by_name: dict[str, dict[str, Any]]) -> None:
        """What ACL, or the guard's journal, and CRL on the broker's disk say, against database and answers."""
        broker = self.victim.data / "broker"
        self.wait_for_crl(by_name)
        listed, problem = read_crl(broker, self.victim.data / "ca.pem")
        if problem:
            self.ledger.lost("bad CRL", problem)
        granted, denied = access_on_disk(broker)
        for known in self.ledger.answered():
            assert known.answer is not None
            device = by_name.get(known.name)
            revoked = known.revoked or (device is not None and device["status"] == "revoked")
            if revoked:
                if int(known.answer["serial_number"], 16) not in listed:
                    self.ledger.lost("revoked device not on the CRL", known.name)
                if known.id in granted or (self.style == "guard" and known.id not in denied):
                    self.ledger.lost("revoked device in the ACL", known.name)
            elif device is not None or not known.revoke_sent:
                if int(known.answer["serial_number"], 16) in listed:
                    self.ledger.lost("active device on the CRL", known.name)
                if known.id in denied or (self.style != "pattern" and known.id not in granted):
                    self.ledger.lost("active device not in the ACL", known.name)
        for device in by_name.values():
            if (device["status"] == "revoked") == (device["device_id"] in granted) and self.style != "pattern":
                self.ledger.lost("database and ACL disagree", device["name"])

    def wait_for_crl(self, by_name: dict[str, dict[str, Any]]) -> None:
        """Under the guard, which denies at once, the CRL follows the answer to a revocation by a moment."""
        if self.style != "guard":
            return
        revoked = {
            int(known.answer["serial_number"], 16)
            for known in self.ledger.answered()
            if known.answer is not None and by_name.get(known.name, {}).get("status") == "revoked"
        }
        with contextlib.suppress(AssertionError):  # files() says which is missing
            wait_until(lambda: revoked <= read_crl(self.victim.data / "broker", self.victim.data / "ca.pem")[0])

    def broker(self, number: int) -> None:
        """Which devices the broker accepts, of those whose keys are here."""
        self.refuses(number)
        for known in self.sample(lambda known: has_certificate(known) and not known.revoke_sent, number):
            if why := self.connect(known):
                self.ledger.lost("broker refuses an active device", f"{known.name}: {why}")
            self.done["active devices accepted"] += 1

    def refuses(self, number: int, answered: str = "") -> None:
        """That the broker refuses devices whose revocation was answered (as ``answered``)."""
        fits = [answered] if answered else ["enforced", "pending"]
        for known in self.sample(lambda known: has_certificate(known) and known.revoked in fits, number):
            why = self.connect(known)
            if not why:
                self.ledger.lost("broker admits a revoked device", known.name)
            self.done["revoked devices refused"] += 1

    def connect(self, known: Known) -> str:
        assert known.answer is not None
        ca = str(self.victim.data / "ca.pem")
        folder = self.victim.folder
        key, changes = self.ledger.key_of(known), len(known.places)
        return refusal_of(ca, known.answer["chain"], key, known.id, self.victim.mqtt_port, folder, topics=changes + 1)

    def whole(self, known: Known, device: dict[str, Any]) -> None:
        """A registration that nobody was told of is there with all that belongs to it."""
        path = f"/devices/{device['device_id']}"
        certificates = self.victim.call("GET", f"{path}/certificates").json()["certificates"]
        topics = self.victim.call("GET", path).json()["topics"]
        if len(certificates) != 1 or not topics:
            self.ledger.lost("registration in part", known.name)
        x509.load_pem_x509_certificate(certificates[0]["certificate"].encode())
        self.done["unanswered registrations found whole"] += 1

    # --- Links

    def links(self) -> None:
        """Look at the links that were fetched, or whose fetch was cut off."""
        for known in self.ledger.answered():
            if known.name not in self._links_seen and known.fetches and not known.busy:
                self._links_seen.add(known.name)
                self._link(known)

    def _was_killed_in(self, known: Known) -> bool:
        """Whether the portal was killed during the fetch."""
        began = known.fetches[-1][0]
        return any(0 <= kill - began < ANSWER_SECONDS for kill in self.ledger.kills)

    def _link(self, known: Known) -> None:
        assert known.answer is not None
        url = known.answer["download_url"]
        looked = self.victim.session.head(url, timeout=20).status_code
        self.done["links looked at"] += 1
        if known.fetched:
            if looked == 200:
                self.ledger.lost("bundle fetched, link open again", known.name)
        elif not known.revoke_sent:
            fetched = self.victim.session.get(url, timeout=20)
            if fetched.status_code == 410 and self._was_killed_in(known):
                # Killed after the link was recorded as used, and before the client had the bundle.
                self.done["links used up by a fetch that was cut off"] += 1
                return
            if fetched.status_code != 200 or fetched.content[:2] != b"PK":
                self.ledger.lost("bundle lost", f"{known.name} {urlsplit(url).path[:20]}: {fetched.status_code}")
            self.done["bundles fetched after a broken fetch"] += 1

    def sample(self, fits: Any, number: int) -> list[Known]:
        """Some that fit, the newest more likely."""
        found = [known for known in self.ledger.devices if fits(known)]
        chosen = found[-max(1, number // 2) :]
        rest = found[: -len(chosen)] if chosen else []
        return chosen + self.ledger.random.sample(rest, min(len(rest), number - len(chosen)))


def has_certificate(known: Known) -> bool:
    return known.answer is not None and "chain" in known.answer
