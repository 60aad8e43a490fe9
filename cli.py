"""The operator's command line: the command groups, error handling and exit statuses."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from commands import streams
from commands.access import login, logout, token
from commands.applications import application
from commands.audit import audit
from commands.connection import ConnectionOptions
from commands.context import CONNECTION, connection_options
from commands.delivery import download, unpack_command
from commands.devices import certificates, expiring, list_devices, show, update
from commands.enrolment import approve, enrolment, expect, reject, waiting
from commands.export import export
from commands.imports import import_devices
from commands.lifecycle import resume, revoke, suspend
from commands.manufacturers import manufacturer
from commands.operation import ca, completion, status
from commands.profiles import profile
from commands.registration import register, renew
from commands.tenants import tenant
from commands.webhooks import webhook
from onboarding_portal import VERSION

INTERRUPTED = 130  # 128 + SIGINT, as shells say it

SECTIONS = {
    "Devices": (
        register,
        import_devices,
        list_devices,
        export,
        expiring,
        show,
        update,
        renew,
        suspend,
        resume,
        revoke,
        certificates,
    ),
    "Credentials": (download, unpack_command, profile),
    "Applications": (application,),
    "Enrolment": (enrolment, manufacturer, expect, waiting, approve, reject),
    "Access": (login, logout, token, tenant),
    "Operation": (status, ca, audit, webhook, completion),
}


class PortalGroup(click.Group):
    """Shows the commands in sections; turns every failure into a sentence and an exit status."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands section by section."""
        width = max(len(name) for name in self.commands)
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(f"{command.name:<{width}}", command.get_short_help_str(60)) for command in commands]
                )

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = "portal",
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run the command, then exit: 0 success, 1 failure, 2 usage error, 3 portal not reached, 130 interrupted."""
        streams.prepare()
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
            sys.stdout.flush()
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            sys.stderr.write("\n")
            sys.exit(INTERRUPTED)
        except BrokenPipeError:  # the reader, such as head, has ended
            streams.drop_output()
            sys.exit(1)
        except streams.OutputFailed as error:
            sys.stderr.write(f"Error: {error}\n")
            streams.drop_output()
            sys.exit(1)
        except Exception as error:
            if os.environ.get("PORTAL_DEBUG"):
                raise
            # Only the type: the message could contain a secret.
            sys.stderr.write(f"Error: Unexpected error ({type(error).__name__}). ")
            sys.stderr.write("Set PORTAL_DEBUG=1 to see where it occurred.\n")
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)


@click.group(
    "portal",
    cls=PortalGroup,
    params=list(connection_options()),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(VERSION, prog_name="portal")
@click.pass_context
def cli(ctx: click.Context, /, **given: str | None) -> None:
    """Register IoT devices, deliver their credentials, revoke them.

    Settings are taken from options, the environment, or the saved login, in this order.

    To use a portal on this machine:  . data/operator.env
    """
    ctx.meta["given"] = ConnectionOptions(**{name: given[name] for name in CONNECTION})


for _commands in SECTIONS.values():
    for _command in _commands:
        cli.add_command(_command)


if __name__ == "__main__":
    cli()
