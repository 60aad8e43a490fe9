"""nginx in front of a portal, as an ordinary process in a folder of its own, from the configuration in deploy/."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from types import TracebackType
from typing import Self

from tests.support.deployment import ROOT, Deployment, wait_until
from tests.support.ports import free_port

CONFIGURATION = ROOT / "deploy" / "nginx.conf"
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
AROUND = """\
daemon off;
worker_processes 2;
pid {folder}/nginx.pid;
error_log {folder}/error.log notice;
{user}
events {{ worker_connections 1024; }}
http {{
    access_log off;
    {temporary}
    include {folder}/onboarding-portal.conf;
}}
"""


def nginx_program() -> str:
    """Debian installs it where an ordinary user's PATH does not look."""
    return shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin") or "nginx"


class Fronted(Deployment):
    """A portal on a Unix socket, with nginx in front of it; ``url`` and ``pki_url`` are nginx's."""

    def __init__(self, **environment: str) -> None:
        super().__init__(**environment)
        self.socket = self.folder / "http.sock"
        self.behind = self.environment["PORTAL_PKI_BIND"]
        self.pki_url = f"http://127.0.0.1:{free_port()}"
        self.environment |= {
            "PORTAL_BIND": f"unix:{self.socket}",
            "PORTAL_PUBLIC_URL": self.url,
            "PORTAL_PKI_URL": self.pki_url,
        }
        self.front = self.folder / "nginx"
        self._nginx: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self._start_nginx()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._nginx is not None:
            self._nginx.terminate()
            self._nginx.wait()
        super().__exit__(kind, error, trace)

    def _start_nginx(self) -> None:
        self.front.mkdir()
        (self.front / "onboarding-portal.conf").write_text(self._rendered(CONFIGURATION.read_text()))
        temporary = "\n    ".join(f"{name}_temp_path {self.front}/{name};" for name in TEMPORARY)
        user = "user root;" if os.geteuid() == 0 else ""
        main = self.front / "nginx.conf"
        main.write_text(AROUND.format(folder=self.front, temporary=temporary, user=user))
        command = [nginx_program(), "-p", str(self.front), "-e", str(self.front / "error.log"), "-c", str(main)]
        subprocess.run([*command, "-t"], check=True, capture_output=True)
        self._nginx = subprocess.Popen(command)
        wait_until(lambda: (self.front / "nginx.pid").exists() and (self.front / "nginx.pid").read_text())

    def _rendered(self, text: str) -> str:
        """Put this deployment's paths and ports in place of those of an installation."""
        text = re.sub(r"    listen \[::\].*\n", "", text)
        for installed, here in (
            ("/run/onboarding-portal/http.sock", str(self.socket)),
            ("127.0.0.1:8080", self.behind),
            ("listen 443", f"listen {self.url.removeprefix('https://')}"),
            ("listen 80;", f"listen {self.pki_url.removeprefix('http://')};"),
            ("/var/lib/onboarding-portal", str(self.data)),
            ("/var/log/nginx", str(self.front)),
            ("/var/cache/nginx/onboarding-portal", str(self.front / "cache")),
        ):
            assert installed in text, installed
            text = text.replace(installed, here)
        return text
