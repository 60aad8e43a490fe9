"""What the scripts share: which Python they make the virtual environment with, how they install packages, and what
Ctrl-C leaves."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.deployment import wait_until

ROOT = Path(__file__).parents[2]
NEW = '#!/bin/sh\ncase "$2" in *venv*) exit {lacks_venv} ;; *) exit {too_old} ;; esac\n'


def python(folder: Path, name: str, *, lacks_venv: bool = False, too_old: bool = False) -> Path:
    """A program that answers as a Python of that kind would."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(NEW.format(lacks_venv=int(lacks_venv or too_old), too_old=int(too_old)))
    program.chmod(0o755)
    return program


def found(distribution: Path, path: Path, *modules: str) -> str:
    script = f'. {ROOT}/scripts/lib.sh; DISTRIBUTION_PYTHON={distribution}; PATH={path}; find_python "$@"'
    done = subprocess.run(
        ["/bin/bash", "-c", script, "bash", *modules], capture_output=True, text=True, check=False, timeout=30
    )
    return done.stdout.strip()


def test_the_python_of_the_distribution_comes_before_another_one_on_the_path(tmp_path: Path) -> None:
    distribution, _ = python(tmp_path / "usr", "python3"), python(tmp_path / "own", "python3")
    assert found(distribution, tmp_path / "own", "ensurepip", "venv") == str(distribution)


@pytest.mark.parametrize("fault", ["lacks_venv", "too_old", "missing"])
def test_another_one_is_used_where_that_of_the_distribution_will_not_do(tmp_path: Path, fault: str) -> None:
    distribution = tmp_path / "usr" / "python3"
    if fault != "missing":
        python(tmp_path / "usr", "python3", **{fault: True})
    other = python(tmp_path / "own", "python3.12")
    assert found(distribution, tmp_path / "own", "ensurepip", "venv") == str(other)


def test_one_without_venv_is_found_if_venv_is_not_asked_for(tmp_path: Path) -> None:
    distribution = python(tmp_path / "usr", "python3", lacks_venv=True)
    assert found(distribution, tmp_path / "none", "ensurepip", "venv") == ""
    assert found(distribution, tmp_path / "none") == str(distribution)


# --- Packages


def installing(folder: Path, apt_get: str) -> tuple[subprocess.Popen[str], Path]:
    """Install a package by a program in place of ``apt-get``; return also the file that keeps services away."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "apt-get").write_text(f"#!/bin/sh\n{apt_get}\n")
    (programs / "sudo").write_text('#!/bin/sh\nshift; exec "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    policy = folder / "policy-rc.d"
    script = f". {ROOT}/scripts/lib.sh; MAY_START={policy}; APT_UPDATED=yes; install_package some-broker"
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "SAID": str(folder / "said")}
    process = subprocess.Popen(
        ["/bin/bash", "-c", script],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    return process, policy


def ask_policy(folder: Path) -> str:
    """The line of a shell by which an installation asks, as Debian's does, whether it may start its service."""
    return f'status=0; {folder}/policy-rc.d some-broker start || status=$?; echo $status >"$SAID"'


@pytest.mark.parametrize("fails", [False, True], ids=["installed", "failed"])
def test_no_service_starts_that_a_package_brings_and_others_may_afterwards(tmp_path: Path, fails: bool) -> None:
    process, policy = installing(tmp_path, f"{ask_policy(tmp_path)}; exit {int(fails)}")
    process.communicate(timeout=30)
    assert process.returncode == int(fails)
    assert (tmp_path / "said").read_text() == "101\n"  # forbidden
    assert not policy.exists()


def test_an_answer_that_somebody_else_has_put_there_counts_and_stays(tmp_path: Path) -> None:
    own = "#!/bin/sh\nexit 104\n"
    (tmp_path / "policy-rc.d").write_text(own)
    (tmp_path / "policy-rc.d").chmod(0o755)
    process, policy = installing(tmp_path, ask_policy(tmp_path))
    process.communicate(timeout=30)
    assert (tmp_path / "said").read_text() == "104\n"
    assert policy.read_text() == own


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_an_installation_that_is_broken_off_leaves_nothing_that_keeps_services_from_starting(
    tmp_path: Path, sent: signal.Signals
) -> None:
    os.mkfifo(tmp_path / "begun")
    process, policy = installing(tmp_path, f"echo begun >{tmp_path}/begun; exec sleep 60")
    assert (tmp_path / "begun").read_text() == "begun\n"
    assert policy.exists()
    os.killpg(process.pid, sent)
    process.communicate(timeout=30)
    assert process.returncode != 0
    wait_until(lambda: not policy.exists())  # by a process that the script has started


def test_what_a_killed_installation_has_left_goes_with_the_next_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "begun")
    process, policy = installing(tmp_path, f"echo begun >{tmp_path}/begun; exec sleep 60")
    assert (tmp_path / "begun").read_text() == "begun\n"
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert policy.exists()
    process, _ = installing(tmp_path, ask_policy(tmp_path))
    process.communicate(timeout=30)
    assert (tmp_path / "said").read_text() == "101\n"
    assert not policy.exists()


# --- The virtual environment

MAKES_A_VENV = """#!/bin/sh
[ "$1" = -m ] || exit 0
venv=$4
rm -rf "$venv"
mkdir -p "$venv/bin"
: >"$venv/pyvenv.cfg"
ln -s /bin/true "$venv/bin/python"
touch "$TMPDIR/left"
{at_venv}
printf '#!/bin/sh\\ntouch "$TMPDIR/left"\\n{at_pip}\\n' >"$venv/bin/pip"
chmod 755 "$venv/bin/pip"
"""


def setting_up(folder: Path, *, at_venv: str = "", at_pip: str = "") -> subprocess.Popen[str]:
    """Make a virtual environment by a program in place of Python, which stops at a step to be interrupted."""
    program = folder / "python"
    program.write_text(MAKES_A_VENV.format(at_venv=at_venv, at_pip=at_pip))
    program.chmod(0o755)
    (folder / "tmp").mkdir(exist_ok=True)
    return subprocess.Popen(
        ["/bin/bash", "-euc", f". {ROOT}/scripts/lib.sh; DISTRIBUTION_PYTHON={program}; make_venv requirements.txt"],
        env=os.environ | {"PORTAL_VENV": str(folder / "venv"), "TMPDIR": str(folder / "tmp")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("step", ["at_venv", "at_pip"])
def test_a_set_up_that_was_interrupted_says_so_in_a_sentence_and_the_next_one_goes_on(
    tmp_path: Path, step: str
) -> None:
    os.mkfifo(tmp_path / "begun")
    process = setting_up(tmp_path, **{step: f"echo begun >{tmp_path}/begun; exec sleep 60"})
    assert (tmp_path / "begun").read_text() == "begun\n"
    os.killpg(process.pid, signal.SIGINT)
    printed, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "")
    assert printed.endswith("\n\nInterrupted while setting up. The next start goes on from here.\n")
    assert [*(tmp_path / "tmp").iterdir()] == []
    if step == "at_pip":
        (tmp_path / "venv" / "bin" / "pip").write_text("#!/bin/sh\n")

    _, errors = (process := setting_up(tmp_path)).communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert (tmp_path / "venv" / ".installed-requirements.txt").exists()


def test_an_environment_without_pip_that_holds_something_is_not_made_again(tmp_path: Path) -> None:
    kept = tmp_path / "venv" / "lib" / "mine-1.0.dist-info"
    kept.mkdir(parents=True)
    (tmp_path / "venv" / "bin").mkdir()
    (tmp_path / "venv" / "bin" / "python").symlink_to("/bin/true")
    (tmp_path / "venv" / "pyvenv.cfg").touch()
    process = setting_up(tmp_path)
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert kept.exists()
