"""How the server's own commands are called where this process runs, for the commands that messages suggest."""

from __future__ import annotations

import os

VARIABLE = "PORTAL_SERVER_COMMAND"  # set by each program that runs them under another name than Flask's
OF_FLASK = "flask --app app"


def server_command(words: str) -> str:
    """Return a command to paste, such as ``portal-server ca rollover`` for the words ``ca rollover``."""
    return f"{os.environ.get(VARIABLE) or OF_FLASK} {words}"
