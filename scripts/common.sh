# What the scripts share. Sourced, not run.
# shellcheck shell=bash

# Where Debian keeps mkfs, losetup and sfdisk, which is not in an ordinary user's path.
PATH=$PATH:/usr/sbin:/sbin

have() { command -v "$1" >/dev/null 2>&1; }

is_root() { [ "$(id -u)" -eq 0 ]; }

# Ends the script unless cargo is there, and new enough for Cargo.toml.
need_rust() {
    local wanted found
    wanted=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)
    if ! have cargo && [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
        PATH=${CARGO_HOME:-$HOME/.cargo}/bin:$PATH
    fi
    found=$(cargo --version 2>/dev/null | awk '{ print $2 }') || true
    if [ -z "$found" ]; then
        echo "There is no Rust toolchain; fspfs needs Rust $wanted or newer. Install it with"
    elif [ "$(printf '%s\n' "$wanted" "${found%%-*}" | sort -V | head -n 1)" = "$wanted" ]; then
        return 0
    else
        echo "Rust $found is too old; fspfs needs Rust $wanted or newer. Install it with"
    fi >&2
    cat >&2 <<'END'

  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y && . "$HOME/.cargo/env"

(where rustup is installed already: `rustup update stable`), and run this again.
END
    exit 1
}

# missing_packages COMMAND=PACKAGE...: the packages of the commands that are not there, a line each.
missing_packages() {
    local pair
    for pair; do
        have "${pair%%=*}" || echo "${pair#*=}"
    done | sort -u
}

# confirm QUESTION OTHERWISE: asks on the terminal, and ends the script, with what it says then, unless
# the answer is yes.
confirm() {
    local answer
    if ! { : </dev/tty; } 2>/dev/null; then
        echo "There is no terminal to ask on: $1 Give --yes to go on without." >&2
        exit 1
    fi
    read -r -p "$1 [y/N] " answer </dev/tty
    case $answer in
        y | Y | yes) ;;
        *) echo "$2" >&2 && exit 1 ;;
    esac
}

# install_packages ASK PACKAGE...: installs them with apt-get. ASK is `yes` to ask before.
install_packages() {
    local ask=$1
    local as=()
    shift
    [ $# -gt 0 ] || return 0
    if ! have apt-get; then
        echo "These packages are missing, and there is no apt-get to install them with: $*" >&2
        exit 1
    fi
    if ! is_root; then
        if ! have sudo; then
            echo "These packages are missing; install them as root: apt-get install $*" >&2
            exit 1
        fi
        as=(sudo)
    fi
    if [ "$ask" = yes ]; then
        confirm "Install $* with ${as[*]+sudo }apt-get?" "Nothing was installed."
    fi
    # A list of packages that is a little old, or a mirror that is down, is no reason to give up.
    "${as[@]}" apt-get -q update || true
    "${as[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends "$@"
}

# In CI the build is kept outside the clone, which is fresh each time.
choose_target_dir() {
    if [ -n "${CI:-}" ] && [ -z "${CARGO_TARGET_DIR:-}" ]; then
        export CARGO_TARGET_DIR="${XDG_CACHE_HOME:-$HOME/.cache}/fspfs/target"
    fi
}
