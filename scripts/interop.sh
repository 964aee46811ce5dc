#!/usr/bin/env bash
# Snapshots written by coldsnap, read by fspfs, and the other way round, through `fspfs serve`.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

usage() {
    cat <<'END'
Usage: scripts/interop.sh [--dir DIR]

Installs coldsnap (https://crates.io/crates/coldsnap) beside the build, if it is
not on the path, which takes ten minutes and more on two cores, then lets it
upload, download, wait and make a child against a server over a repository, and
compares every image byte by byte. Too slow for CI.

  --dir DIR    where to work: a disk with 5 GiB free (default: a temporary directory)
END
}

base=${TMPDIR:-/tmp}
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage && exit 0 ;;
        --dir) base=$2 && shift 2 ;;
        *) usage >&2 && exit 2 ;;
    esac
done

need_rust
choose_target_dir
cargo build --release --locked
target=$(realpath "${CARGO_TARGET_DIR:-target}")
fspfs=$target/release/fspfs
PATH=$target/tools/bin:$PATH
have coldsnap || cargo install coldsnap --locked --root "$target/tools"

work=$(mktemp -d "$base/fspfs-interop.XXXXXX")
export XDG_STATE_HOME=$work/state FSPFS_STORE=$work/snaps
server=
stop_server() {
    [ -n "$server" ] || return 0
    kill "$server" 2>/dev/null || true
    wait "$server" || true
    server=
}
trap 'stop_server; rm -rf "$work"' EXIT

# start_server ARGUMENT...: starts a server, and points the environment at it.
start_server() {
    stop_server
    "$fspfs" serve -q --listen 127.0.0.1:0 "$@" >"$work/ready" 2>"$work/log" &
    server=$!
    until grep -q served "$work/ready"; do
        kill -0 "$server" 2>/dev/null || { cat "$work/log" >&2 && exit 1; }
        sleep 0.05
    done
    eval "$("$fspfs" serve --print-env --listen "$(sed 's|.* http://||' "$work/ready")")"
}

# cold ARGUMENT...: runs coldsnap, and shows what it says of blocks only if it fails.
cold() {
    coldsnap "$@" 2>"$work/coldsnap.log" || { cat "$work/coldsnap.log" >&2 && exit 1; }
}

step() { printf '\n==> %s\n' "$*"; }

# same ONE TWO: whether two images are equal, the shorter one with zeros behind it.
same() {
    local bytes
    bytes=$(($(stat -c %s "$1") > $(stat -c %s "$2") ? $(stat -c %s "$1") : $(stat -c %s "$2")))
    truncate -s "$bytes" "$1" "$2"
    cmp "$1" "$2" && echo "equal: $((bytes >> 20)) MiB"
}

"$fspfs" init >/dev/null
image=$work/disk.img
truncate -s 1G "$image"
# Data at the start, across the middle and at the end; zeros that are written; holes.
dd if=/dev/urandom of="$image" bs=1M count=150 conv=notrunc status=none
dd if=/dev/urandom of="$image" bs=4K count=20001 seek=100003 conv=notrunc status=none
dd if=/dev/zero of="$image" bs=1M count=40 seek=200 conv=notrunc status=none
dd if=/dev/urandom of="$image" bs=1M count=3 seek=1021 conv=notrunc status=none

start_server
step "coldsnap upload --wait, fspfs download"
one=$(cold upload --no-progress --wait --description "by coldsnap" --tag Key=Name,Value=cold "$image" | tail -n 1)
"$fspfs" -q download "$one" "$work/one.img"
same "$image" "$work/one.img"
"$fspfs" list | grep -w cold

step "fspfs upload, coldsnap download"
two=$("$fspfs" -q upload "$image" | tail -n 1)
cold download --no-progress "$two" "$work/two.img"
same "$image" "$work/two.img"

step "a child by coldsnap, with changes and zeros over data"
dd if=/dev/urandom of="$image" bs=1M count=5 seek=30 conv=notrunc status=none
dd if=/dev/zero of="$image" bs=1M count=7 seek=60 conv=notrunc status=none
three=$(cold upload --no-progress --wait --parent-snapshot-id "$one" "$image" | tail -n 1)
"$fspfs" -q download "$three" "$work/three.img"
same "$image" "$work/three.img"
rm "$work/three.img" && cold download --no-progress "$three" "$work/three.img"
same "$image" "$work/three.img"

step "coldsnap wait, for a snapshot that stays pending for 6 s"
start_server --pending 6
began=$SECONDS
four=$(cold upload --no-progress "$image" | tail -n 1)
cold wait "$four"
[ $((SECONDS - began)) -ge 6 ] || { echo "it did not wait" >&2 && exit 1; }
"$fspfs" -q download "$four" "$work/four.img"
same "$image" "$work/four.img"

step "coldsnap upload and download, with faults"
start_server --inject latency=1ms..5ms,get.throttle=5%,put.throttle=5%,get.error=2%,put.cut=1%,get.corrupt=1%,get.cut-body=1%,seed=3
five=$(cold upload --no-progress --wait "$image" | tail -n 1)
cold download --no-progress "$five" "$work/five.img"
same "$image" "$work/five.img"

step "everything in the repository is sound"
stop_server
"$fspfs" verify
echo "All images are equal."
