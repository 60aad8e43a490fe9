# shellcheck shell=bash
# What the scripts share: finding Python, making the virtual environment, installing what is missing.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${PORTAL_VENV:-$ROOT/.venv}
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin # Debian keeps servers where an ordinary user's PATH does not look
APT_UPDATED=
MAY_START=/usr/sbin/policy-rc.d # what Debian asks before it starts a service
DISTRIBUTION_PYTHON=/usr/bin/python3

say() { printf '%s\n' "$*"; }

fail() {
    printf '%s\n' "$*" >&2
    exit 1
}

# Where a script is asked for its help, print the comment at its head, before anything else happens.
show_help() {
    case ${1:-} in
        -h | --help)
            sed -n -e 1d -e '/^#/!q' -e 's/^# \{0,1\}//p' "$0"
            exit 0
            ;;
    esac
}

takes_no_arguments() {
    show_help "$@"
    [ $# = 0 ] || fail "$(basename "$0") takes no arguments; with --help it says what it does."
}

# Run a command as root, without ever asking for a password; fails where that is not possible.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then
        sudo -n "$@"
    else
        return 1
    fi
}

# Run a command while no service may start, as root and one at a time; $0 is MAY_START. An answer that somebody else has
# put there counts in place of ours, and stays.
# shellcheck disable=SC2016 # expanded by the shell that runs it
WITHOUT_SERVICES='
set -eu
mark="The scripts of the onboarding portal are installing a package."
exec 9<"$(dirname "$0")"
flock 9
if { [ ! -e "$0" ] && [ ! -L "$0" ]; } || grep -q "$mark" "$0" 2>/dev/null; then
    trap "rm -f \"$0\"" EXIT
    trap "exit 130" INT
    trap "exit 143" TERM HUP
    printf "#!/bin/sh\n# %s\nexit 101\n" "$mark" >"$0"
    chmod 755 "$0"
fi
"$@" 9<&-
'

# install_package PACKAGE: from the distribution, without starting a service of it: else a broker, say, would listen on
# every address. Fails where it may not be installed or is not there.
install_package() {
    command -v apt-get >/dev/null && as_root true || return 1
    if [ -z "$APT_UPDATED" ]; then
        as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 update </dev/null >/dev/null 2>&1 || true
        APT_UPDATED=yes
    fi
    say "Installing the package $1."
    as_root env DEBIAN_FRONTEND=noninteractive sh -c "$WITHOUT_SERVICES" "$MAY_START" \
        apt-get -qq -y --no-install-recommends -o DPkg::Lock::Timeout=300 install "$1" </dev/null >/dev/null 2>&1
}

# ensure_package PROGRAM PACKAGE...: the program is there, or one of the packages that bring it can be installed.
ensure_package() {
    local program=$1 package
    shift
    command -v "$program" >/dev/null && return
    for package in "$@"; do
        install_package "$package" && command -v "$program" >/dev/null && return
    done
    say "$program is missing and could not be installed. Install it with: apt-get install $1" >&2
    return 1
}

# ensure_header FILE PACKAGE: a C header is there, or the package that brings it can be installed.
ensure_header() {
    [ -e "/usr/include/$1" ] || { install_package "$2" && [ -e "/usr/include/$1" ]; } && return
    say "The header $1 is missing and could not be installed. Install it with: apt-get install $2" >&2
    return 1
}

# find_python [MODULE...]: print the first Python that is new enough and has these modules. The distribution's comes
# first: it is built with all optimisations, which those that people build for themselves often are not.
find_python() {
    local candidate modules=sys module
    for module in "$@"; do modules+=", $module"; done
    for candidate in "$DISTRIBUTION_PYTHON" python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c "import $modules; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# The part of Ctrl-C that one_step leaves to be done: end the step with all that it has started, and remove its files.
break_off() {
    trap '' INT TERM HUP
    { [ -z "$step" ] || { kill -KILL "$step" "-$step" || true; wait "$step" || true; }; } 2>/dev/null
    rm -rf "$temporary"
    say ""
    say "Interrupted while setting up. The next start goes on from here."
    exit "$1"
}

# one_step COMMAND...: run a step of the set-up that takes long, with a TMPDIR of its own. It has a session of its own, so
# that Ctrl-C reaches the script alone: else each of its processes would say in its own way that it was interrupted.
one_step() {
    local step='' temporary status=0
    temporary=$(mktemp -d)
    trap 'break_off 130' INT
    trap 'break_off 143' TERM HUP
    TMPDIR=$temporary setsid "$@" </dev/null &
    step=$!
    wait "$step" || status=$?
    trap - INT TERM HUP
    rm -rf "$temporary"
    return "$status"
}

# Whether the environment can be used. One without pip, in which nothing else is either, was broken off while it was made.
venv_is_usable() {
    "$VENV/bin/python" -c '' 2>/dev/null || return 1
    [ -e "$VENV/bin/pip" ] ||
        [ -n "$(find "$VENV" -name '*.dist-info' ! -name 'pip-*' ! -name 'setuptools-*' -print -quit)" ]
}

# make_venv FILE: a virtual environment that holds what this requirements file lists.
make_venv() {
    local python stamp wanted
    if ! venv_is_usable; then
        if ! python=$(find_python ensurepip venv); then
            find_python >/dev/null || install_package python3 || true
            find_python >/dev/null || fail "Python 3.11 or newer is needed. Install it with: apt-get install python3"
            install_package python3-venv || true
            python=$(find_python ensurepip venv) ||
                fail "Python's venv module is needed. Install it with: apt-get install python3-venv"
        fi
        # A broken one is made again, but nothing else is ever removed. Python makes empty folders first.
        if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ] &&
            [ -n "$(find "$VENV" ! -type d ! -name lib64 -print -quit)" ]; then
            fail "$VENV is no virtual environment; set PORTAL_VENV to another folder."
        fi
        say "Making a virtual environment in $VENV."
        one_step "$python" -m venv --clear "$VENV" || fail "The virtual environment could not be made; Python says why above."
    fi
    stamp=$VENV/.installed-$(basename "$1")
    wanted=$(cat "$ROOT/requirements.txt" "$ROOT/$1" | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        say "Installing the Python packages of $1."
        one_step "$VENV/bin/pip" install --quiet --disable-pip-version-check --no-input -r "$ROOT/$1" ||
            fail "The Python packages could not be installed; pip says why above."
        printf '%s\n' "$wanted" >"$stamp"
    fi
}
