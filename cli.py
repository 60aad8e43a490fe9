"""The operator's command line: the command groups, error handling and exit statuses."""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take time
    from onboarding_portal import exit_when_interrupted

    exit_when_interrupted()

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click

from commands.connection import ConnectionOptions
from commands.context import CONNECTION, connection_options
from commands.lazy import Lazy, LazyCommands
from onboarding_portal import VERSION, streams
from onboarding_portal.interrupts import INTERRUPTED, raised

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

SECTIONS = {
    "Devices": {
        "register": Lazy("registration:register", "Register a device: certificate, topics, credential bundle."),
        "import": Lazy("imports:import_devices", "Register a device for each row of a file."),
        "list": Lazy("devices:list_devices", "List devices, newest first."),
        "export": Lazy("export:export", "Write all devices as CSV, NDJSON or JSON."),
        "expiring": Lazy("devices:expiring", "List devices whose certificates expire soon, soonest first."),
        "show": Lazy("devices:show", "Show a device: certificate, broker state, topics."),
        "update": Lazy("updates:update", "Change descriptions or topics of devices, or their groups."),
        "renew": Lazy("renewal:renew", "Issue new certificates for devices."),
        "suspend": Lazy("lifecycle:suspend", "Suspend devices until they are resumed."),
        "resume": Lazy("lifecycle:resume", "Resume suspended devices with their existing certificates."),
        "revoke": Lazy("lifecycle:revoke", "Revoke devices permanently."),
        "certificates": Lazy("devices:certificates", "List a device's certificates, newest first."),
        "group": Lazy("groups:group", "Groups: list, show, add, update, remove, and their members."),
    },
    "Credentials": {
        "download": Lazy("delivery:download", "Download a device's bundle, check it and unpack it."),
        "unpack": Lazy("delivery:unpack_command", "Check and unpack a bundle that was downloaded before."),
        "profile": Lazy("profiles:profile", "Certificate profiles: list, show, add, update, remove."),
    },
    "Applications": {
        "application": Lazy("applications:application", "Clients that are not devices: add, list, update, revoke."),
    },
    "Enrolment": {
        "enrolment": Lazy("enrolment:enrolment", "Enrolment tokens for devices: list, create, update, revoke."),
        "manufacturer": Lazy("manufacturers:manufacturer", "Manufacturer CAs: list, show, add, update, prove, remove."),
        "expect": Lazy("enrolment:expect", "Add a device that will enrol by itself later."),
        "waiting": Lazy("enrolment:waiting", "List devices that wait for approval, longest first."),
        "approve": Lazy("enrolment:approve", "Approve a waiting device and its key."),
        "reject": Lazy("enrolment:reject", "Reject a waiting device, or its new key, permanently."),
    },
    "Access": {
        "login": Lazy("access:login", "Save the portal's URL, CA file and your token."),
        "logout": Lazy("access:logout", "Delete the saved login."),
        "token": Lazy("access:token", "Operator tokens: list, create, revoke."),
        "tenant": Lazy("tenants:tenant", "Tenants: list, show, add, update, suspend, resume, remove."),
        "broker": Lazy("brokers:broker", "Brokers: list, show, add, update, away, back, remove."),
    },
    "Operation": {
        "status": Lazy("operation:status", "Check whether the portal is ready, and if not, why."),
        "ca": Lazy("operation:ca", "Print or save the portal's CA certificates."),
        "audit": Lazy("audit:audit", "Read the audit record, export it, verify it."),
        "webhook": Lazy("webhooks:webhook", "Webhooks: send events to other systems."),
        "completion": Lazy("operation:completion", "Print a shell completion script."),
    },
}
COMMANDS = {name: command for section in SECTIONS.values() for name, command in section.items()}


class PortalGroup(click.Group):
    """Shows the commands in sections; turns every failure into a sentence and an exit status."""

    def __init__(self, name: str | None = None, **attributes: Any) -> None:
        super().__init__(name, LazyCommands(COMMANDS), **attributes)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands section by section."""
        width = max(map(len, self.commands))
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(f"{name:<{width}}", command.summary) for name, command in commands.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Return the commands and options that begin so, without importing the commands."""
        from click.shell_completion import CompletionItem

        named = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        items = [CompletionItem(name, help=COMMANDS[name].summary) for name in named]
        return [*items, *click.Command.shell_complete(self, ctx, incomplete)]

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = "portal",
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run the command, then exit: 0 success, 1 failure, 2 usage error, 3 portal not reached, 130 interrupted."""
        try:
            with raised():
                streams.prepare()
                code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
                sys.stdout.flush()
        except click.ClickException as error:
            if isinstance(error, click.NoSuchOption) and error.option_name == "--profile":
                said = f"{error.message} A login profile stands before the command: portal --profile NAME …"
                error = click.NoSuchOption(error.option_name, said, ctx=error.ctx)
            error.show()
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt) as error:
            if not isinstance(error.__cause__, KeyboardInterrupt):  # after which click has ended the line
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


if __name__ == "__main__":
    cli()
