"""How commands are called where this process runs, for those that messages suggest."""

from __future__ import annotations

import os

VARIABLE = "PORTAL_SERVER_COMMAND"  # set by each program that runs them under another name than Flask's
OF_FLASK = "flask --app app"


def server_command(words: str) -> str:
    """Return a command to paste, such as ``portal-server ca rollover`` for the words ``ca rollover``."""
    return f"{os.environ.get(VARIABLE) or OF_FLASK} {words}"


def client_command(words: str) -> str:
    """Return a command of the operator's to paste: ``./portal`` in the folder of the sources, else ``portal``."""
    program = (os.environ.get(VARIABLE) or OF_FLASK).partition(" --config ")[0]
    in_sources = program in (OF_FLASK, "./portal-server")
    return f"{'./' if in_sources else ''}portal {words}"
