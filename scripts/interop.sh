#!/usr/bin/env bash
# Snapshots written by coldsnap, read by fspfs, and the other way round, through `fspfs serve`: fspfs
# on the repository itself, and as a client of the server, an ebs: store.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

usage() {
    cat <<'END'
Usage: scripts/interop.sh [--yes] [--dir DIR] [--program FILE]

Installs coldsnap (https://crates.io/crates/coldsnap) beside the build, if it is
not on the path, which takes ten minutes and more on two cores, then lets it
upload, download, wait and make a child against a server over a repository, and
compares every image byte by byte. fspfs reads and writes the repository itself,
and over the server, as ebs:, where it mounts too. Too slow for CI.

  --yes           do not ask before coldsnap is installed
  --dir DIR       where to work: a disk with 5 GiB free (default: a temporary directory)
  --program FILE  use this fspfs instead of building one
END
}

base=${TMPDIR:-/tmp}
fspfs='' ask=yes
[ -z "${CI:-}" ] || ask=no
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage && exit 0 ;;
        -y | --yes) ask=no && shift ;;
        --dir) base=${2:?$1 needs a directory} && shift 2 ;;
        --program) fspfs=$(realpath -e "${2:?$1 needs a file}") && shift 2 ;;
        *) usage >&2 && exit 2 ;;
    esac
done

need_rust
choose_target_dir
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
if [ -z "$fspfs" ]; then
    cargo build --release --locked
    fspfs=$target/release/fspfs
fi
PATH=$target/tools/bin:$PATH
if ! have coldsnap; then
    [ "$ask" = no ] || confirm "Install coldsnap into $target/tools?" "Nothing was installed."
    cargo install coldsnap --version 0.12.0 --locked --root "$target/tools"
fi

work=$(mktemp -d "$base/fspfs-interop.XXXXXX")
export XDG_STATE_HOME=$work/state FSPFS_STORE=$work/snaps
# Of the environment, nothing of AWS but what the server prints.
unset "${!AWS_@}"
export AWS_EC2_METADATA_DISABLED=true
mnt=$work/mnt
mkdir "$mnt"
server=
stop_server() {
    [ -n "$server" ] || return 0
    kill "$server" 2>/dev/null || true
    wait "$server" || true
    server=
}
clean_up() {
    if grep -q " $mnt fuse.fspfs " /proc/mounts; then
        "$fspfs" umount "$mnt" || "$fspfs" umount --lazy "$mnt" || true
    fi
    stop_server
    rm -rf --one-file-system "$work"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# start_server ARGUMENT...: starts a server, and points the environment at it.
start_server() {
    stop_server
    : >"$work/ready"
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

# over_ebs ARGUMENT...: runs fspfs as a client of the server, which the environment names.
over_ebs() { "$fspfs" -q -s ebs: "$@"; }

step() { printf '\n==> %s\n' "$*"; }

# same ONE TWO: whether two images are equal, the shorter one with zeros behind it.
same() {
    local bytes
    bytes=$(($(stat -c %s "$1") > $(stat -c %s "$2") ? $(stat -c %s "$1") : $(stat -c %s "$2")))
    truncate -s "$bytes" "$1" "$2"
    cmp "$1" "$2" && echo "equal: $((bytes >> 20)) MiB"
}

# read_by_coldsnap ID...: compares snapshots with the image.
read_by_coldsnap() {
    local id
    for id; do
        cold download --no-progress "$id" "$work/$id.img"
        same "$image" "$work/$id.img"
        rm "$work/$id.img"
    done
}

# snapshot_of FILE: the snapshot that a file under new/ is.
snapshot_of() { getfattr --absolute-names --only-values -n user.fspfs.snapshot "$1"; }

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

step "the same, read over ebs: by download, and mounted"
over_ebs download "$one" "$work/ebs.img"
same "$image" "$work/ebs.img"
over_ebs mount "$mnt"
cmp "$image" "$mnt/$one.img"
cmp "$image" "$mnt/by-name/cold.img"
cp --sparse=always "$mnt/$one.img" "$work/ebs.img"
same "$image" "$work/ebs.img"

step "written over ebs: by upload, and under new/ of the mount, coldsnap download"
uploaded=$(over_ebs upload "$image" | tail -n 1)
cp --sparse=always "$image" "$mnt/new/web.img"
written=$(snapshot_of "$mnt/new/web.img")
read_by_coldsnap "$uploaded" "$written"

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

step "the same child over ebs:, and children that are written over ebs:"
cmp "$image" "$mnt/$three.img"
over_ebs download "$three" "$work/ebs.img"
same "$image" "$work/ebs.img"
uploaded=$(over_ebs upload --parent-snapshot-id "$one" "$image" | tail -n 1)
# Each of the two makes a child of what was there.
dd if="$image" of="$mnt/new/web.img" bs=1M skip=30 seek=30 count=5 conv=notrunc status=none
dd if="$image" of="$mnt/new/web.img" bs=1M skip=60 seek=60 count=7 conv=notrunc status=none
written=$(snapshot_of "$mnt/new/web.img")
read_by_coldsnap "$uploaded" "$written"
"$fspfs" umount "$mnt"

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

step "fspfs over ebs:, with the same faults"
over_ebs download "$five" "$work/ebs.img"
same "$image" "$work/ebs.img"
six=$(over_ebs upload "$image" | tail -n 1)
read_by_coldsnap "$six"

step "everything in the repository is sound"
stop_server
"$fspfs" verify
echo "All images are equal."
