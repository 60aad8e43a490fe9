"""Runs a program under the system call filter of a systemd unit: ``confinement.py UNIT PROGRAM [ARGUMENT ...]``.

Takes the place of systemd, which the machine that runs the tests may not have as its first process. What the names of
sets stand for is asked of ``systemd-analyze``; the filter itself is made by libseccomp, as systemd's is.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM  # SCMP_ACT_ALLOW, SCMP_ACT_ERRNO(EPERM) of seccomp.h


def calls_of(name: str) -> set[str]:
    """The system calls of a set such as ``@resources``, or the one with this name."""
    if not name.startswith("@"):
        return {name}
    shown = subprocess.run(["systemd-analyze", "syscall-filter", name], check=True, capture_output=True, text=True)
    members = [line.strip() for line in shown.stdout.splitlines()[1:] if line.strip()]
    return set().union(*(calls_of(member) for member in members if not member.startswith("#")))


def allowed_calls(unit: str) -> set[str]:
    """What the unit's ``SystemCallFilter`` lines allow together (systemd.exec(5))."""
    allowed = calls_of("@default")
    for line in re.findall(r"^SystemCallFilter=(.*)$", unit, re.MULTILINE):
        named = set().union(*map(calls_of, line.removeprefix("~").split()))
        allowed = allowed - named if line.startswith("~") else allowed | named
    return allowed


def confine(allowed: set[str]) -> None:
    """Have the kernel refuse every other call of this process, and of those that it starts, with EPERM."""
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(REFUSE)))
    for name in allowed:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:  # else it is one of other machines
            assert library.seccomp_rule_add(context, ctypes.c_uint32(ALLOW), number, 0) == 0
    assert library.seccomp_load(context) == 0


if __name__ == "__main__":
    confine(allowed_calls(Path(sys.argv[1]).read_text()))
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606 - what a test asks for
