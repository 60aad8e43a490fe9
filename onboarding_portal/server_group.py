"""The group of commands that ``portal-server`` is, with all of them or with those of an agent alone."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import click

from onboarding_portal import streams
from onboarding_portal.interrupts import INTERRUPTED, raised


class ServerGroup(click.Group):
    """Ends with a sentence if standard output cannot be written to, be it with a help text, and quietly at Ctrl-C."""

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        """Run the command, then exit; with 130 if it was interrupted, as ``portal`` does."""
        with streams.guarded():
            super().main(*args, **extra)
        raise SystemExit(0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            with raised():
                return super().invoke(ctx)
        except (KeyboardInterrupt, click.Abort):
            sys.stderr.write("\n")
            ctx.exit(INTERRUPTED)
