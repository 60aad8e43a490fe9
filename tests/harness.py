"""What tests of several rooms share: a clock to set, settings on free ports, a client that speaks JSON."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from flask.testing import FlaskClient

from config import Settings
from installation import utc_now
from tests.mosquitto import free_port


class Clock:
    """The time that a test says it is."""

    def __init__(self) -> None:
        self._ahead = timedelta(0)

    def __call__(self) -> datetime:
        return utc_now() + self._ahead

    def advance(self, **amount: float) -> None:
        """Move on, by ``timedelta``'s words."""
        self._ahead += timedelta(**amount)


def settings_for(folder: Path, **environment: str) -> Settings:
    """Settings of a portal in ``folder`` on free ports, with no broker running there yet."""
    ports = {"PORTAL_BIND": f"127.0.0.1:{free_port()}", "PORTAL_PKI_BIND": f"127.0.0.1:{free_port()}"}
    quick = {"PORTAL_ENFORCE_TIMEOUT": "5", "PORTAL_MQTT_PORT": str(free_port())}
    return Settings.from_env({"PORTAL_DATA_DIR": str(folder), **ports, **quick, **environment})


class Api:
    """Speaks JSON to an application in this process, as the operator with ``token``."""

    def __init__(self, client: FlaskClient, token: str | None) -> None:
        self.client = client
        self.token = token

    def call(self, method: str, path: str, json: Any = None, **options: Any) -> Any:
        """Make a request; returns Werkzeug's test response."""
        headers = dict(options.pop("headers", {}))
        if self.token is not None:
            headers.setdefault("Authorization", f"Bearer {self.token}")
        if json is not None:
            options["json"] = json
        return self.client.open(path, method=method, headers=headers, **options)

    def get(self, path: str, **options: Any) -> Any:
        return self.call("GET", path, **options)

    def post(self, path: str, json: Any = None, **options: Any) -> Any:
        return self.call("POST", path, json, **options)

    def patch(self, path: str, json: Any = None, **options: Any) -> Any:
        return self.call("PATCH", path, json, **options)

    def delete(self, path: str, **options: Any) -> Any:
        return self.call("DELETE", path, **options)

    def register(self, **fields: Any) -> dict[str, Any]:
        """Register a device that is as plain as can be, but for ``fields``; returns the answer."""
        answer = self.post(
            "/register", {"name": "pump-1", "type": "pump", "location": "hall 1", "firmware": "1.0"} | fields
        )
        assert answer.status_code == 201, answer.text
        registered: dict[str, Any] = answer.json
        return registered
