#!/usr/bin/env bash
# Goes the whole way on a real account: upload, download, mount, write, delete.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

usage() {
    cat <<'END'
Usage: scripts/aws-smoke.sh [--yes] [--store STORE] [--endpoint URL] [--program FILE]

Makes a small image, puts it into EBS as a snapshot, gets it back, mounts,
writes a snapshot and a child of it through the mount, compares all of them, and
deletes what it has made. It costs money: it says before how much at most, and
asks.

  --yes            do not ask
  --store STORE    as ebs://profile@us-west-2; by default ebs:, as AWS is configured
  --endpoint URL   instead of AWS, as http://127.0.0.1:4560 of `fspfs serve`
  --program FILE   use this fspfs instead of building one
  --help           print this

Its snapshots have the tag fspfs-smoke. They are deleted at the end, also after a
failure and Ctrl-C; if that fails, their ids are printed.
END
}

ask=yes
store=ebs:
endpoint=
fspfs=
while [ $# -gt 0 ]; do
    case $1 in
        -y | --yes) ask=no ;;
        -h | --help) usage && exit 0 ;;
        -s | --store) store=${2:?$1 needs a store} && shift ;;
        --endpoint) endpoint=${2:?$1 needs a URL} && shift ;;
        --program) fspfs=$(realpath -e "${2:?$1 needs a file}") && shift ;;
        *) usage >&2 && exit 2 ;;
    esac
    shift
done
case $store in
    ebs:*\?*) echo "Give the endpoint with --endpoint, not in the store." >&2 && exit 2 ;;
    ebs:*) ;;
    *) echo "The store has to be one of EBS, as ebs: or ebs://us-west-2." >&2 && exit 2 ;;
esac
[ -z "$endpoint" ] || store="$store?endpoint=$endpoint"

# Of the environment, only what is for AWS.
unset FSPFS_STORE FSPFS_MEMORY FSPFS_REFRESH FSPFS_LOG FSPFS_STAGING FSPFS_STAGING_LIMIT \
    FSPFS_COMMIT FSPFS_READ_ONLY FSPFS_FULL_COPY FSPFS_ENCRYPTED_HOLES FSPFS_DESCRIPTION \
    FSPFS_ENCRYPTED FSPFS_KMS_KEY_ID

# --- What it does, and what that costs ------------------------------------------------------------

# The image has this many blocks of 512 KiB, and data in so many of them.
blocks=16
data=6
# The prices of the EBS documentation's example region, in dollars for one request.
price_get=0.000003
price_put=0.000006
price_list=0.0000006
# Every attempt is billed, and a request may be tried again.
attempts=3

# The most that is put: the upload, the image under new/, and one block of its child.
max_puts=$(((data + data + 1) * attempts))
# The most that is read: the download, three comparisons, a block copied up, and the doctor's.
max_gets=$(((data + 3 * data + 1 + 1) * attempts))
# The most that is listed: a few pages for each of these.
max_lists=$((20 * attempts))

# cost PUTS GETS LISTS: in dollars.
cost() {
    awk -v p="$1" -v g="$2" -v l="$3" -v pp=$price_put -v pg=$price_get -v pl=$price_list \
        'BEGIN { printf "$%.6f", p * pp + g * pg + l * pl }'
}

cat <<END
This works on the store $store. It
  1. runs fspfs doctor,
  2. uploads an image of $((blocks / 2)) MiB, $data blocks of which hold data, as a snapshot,
  3. downloads it, mounts the store, and compares both with the image,
  4. writes the image under new/, which makes a second snapshot,
  5. changes one block of that, which makes a third, a child of it,
  6. deletes the three snapshots.
It puts at most $max_puts blocks, reads at most $max_gets, and lists at most $max_lists pages: at most
$(cost $max_puts $max_gets $max_lists) at the prices of the EBS documentation's example region, and the storage of
$(((data + data + 1) / 2)) MiB of snapshots until they are deleted.
END
if [ "$ask" = yes ]; then
    confirm "Go on?" "Nothing was done."
fi

# --- Cleaning up ----------------------------------------------------------------------------------

run=$(date -u +%Y%m%d%H%M%S)-$$
work=
mnt=
# What was put and read outside the mount, and through it.
puts=0
gets=0
lists=0

step() {
    now=$1
    printf '\n== %s\n' "$now"
}

on_store() { "$fspfs" -s "$store" "$@"; }

# The ids of the snapshots of this run, a line each. In the list an id comes before its tags.
ours() {
    on_store list --json | awk -v run="\"$run\"" '
        $1 == "\"id\":" { id = $2; gsub(/[",]/, "", id) }
        $1 == "\"fspfs-smoke\":" { tag = $2; sub(/,$/, "", tag); if (tag == run) print id }'
}

is_mounted() { [ -n "$mnt" ] && grep -q " $mnt fuse.fspfs " /proc/mounts; }

# Deletes the snapshots of this run, which the list may not have yet, and fails if one is left.
delete_ours() {
    local ids try
    for try in 1 2 3 4 5; do
        ids=$(ours) || return 1
        if [ -z "$ids" ]; then
            return 0
        fi
        # shellcheck disable=SC2086  # One argument for each.
        on_store delete --yes $ids >/dev/null || true
        sleep $((try - 1))
    done
    echo "These snapshots are left, delete them: $ids" >&2
    return 1
}

clean_up() {
    local failed=0
    if is_mounted; then
        "$fspfs" umount "$mnt" || "$fspfs" umount --lazy "$mnt" || failed=1
    fi
    if [ -n "$fspfs" ] && [ -n "$work" ]; then
        if ! delete_ours; then
            echo "Look for snapshots with the tag fspfs-smoke=$run." >&2
            failed=1
        fi
    fi
    if [ -n "$work" ] && ! is_mounted; then
        rm -rf --one-file-system "$work"
    fi
    return $failed
}

ended() {
    local status=$?
    trap - EXIT
    trap '' INT TERM
    note_mount || true
    echo
    clean_up || [ "$status" -ne 0 ] || status=1
    printf 'Put %s blocks, read %s, listed %s pages: about %s, without the list of the doctor and attempts that failed.\n' \
        "$puts" "$gets" "$lists" "$(cost "$puts" "$gets" "$lists")"
    if [ "$status" -ne 0 ]; then
        printf 'The smoke test FAILED (exit status %s) at: %s\n' "$status" "$now" >&2
        exit "$status"
    fi
    echo "The smoke test passed; everything it has made is deleted."
}

# metric OPERATION: requests of the mount to the store.
metric() {
    awk -v name="fspfs_store_requests_total{operation=\"$1\"}" \
        '$1 == name { n = $2 } END { print n + 0 }' "$mnt/control/metrics"
}

# Adds what the mount has asked for. Once: its counters end with it.
noted=
note_mount() {
    [ -z "$noted" ] && is_mounted && [ -e "$mnt/control/metrics" ] || return 0
    noted=1
    puts=$((puts + $(metric put_block)))
    gets=$((gets + $(metric get_block)))
    lists=$((lists + $(metric list_blocks) + $(metric list_changed_blocks)))
}

# --- The way --------------------------------------------------------------------------------------

now="looking for the program"
trap ended EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
if [ -z "$fspfs" ]; then
    need_rust
    step "Building fspfs: cargo build --release --locked"
    cargo build --release --locked
    fspfs=$(realpath -e "${CARGO_TARGET_DIR:-target}/release/fspfs")
fi
work=$(realpath "$(mktemp -d "${TMPDIR:-/tmp}/fspfs-smoke.XXXXXX")")
export XDG_STATE_HOME=$work/state
mkdir "$work/mnt"

step "Asking the doctor"
on_store doctor "$work/mnt"

step "Making an image: $data of $blocks blocks hold data, the rest are holes"
disk=$work/disk.img
truncate -s $((blocks * 512))K "$disk"
for at in 0 1 5 6 11 15; do
    dd if=/dev/urandom of="$disk" bs=512K seek=$at count=1 conv=notrunc status=none
done
size=$(stat -c %s "$disk")
du -h --apparent-size "$disk"

# same FILE: ends the script unless it holds the image, and behind it nothing but zeros.
same() {
    local length
    length=$(stat -Lc %s "$1")
    cmp -n "$size" "$disk" "$1"
    if [ "$length" -gt "$size" ]; then
        cmp -n $((length - size)) -i "$size:0" "$1" /dev/zero
    fi
    echo "$1 is the same as the image"
}

# wait_for ID: until the snapshot is completed, ten minutes at most.
wait_for() {
    local try state
    for try in $(seq 120); do
        state=$(on_store list | awk -v id="$1" '$1 == id { print $2 }')
        case $state in
            completed) return 0 ;;
            error) break ;;
        esac
        [ "$try" -gt 1 ] || echo "waiting for $1, which is ${state:-not listed}"
        sleep 5
    done
    echo "$1 is ${state:-not listed}, not completed" >&2
    return 1
}

step "Uploading it"
puts=$data
said=$(on_store upload --name "smoke-$run" --tag "fspfs-smoke=$run" "$disk")
echo "$said"
id=${said##*$'\n'}
puts=$(awk '/^Total chunks uploaded/ { print $NF }' <<<"$said")
wait_for "$id"
on_store list | awk -v id="$id" 'NR == 1 || $1 == id'

step "Downloading it"
gets=$data
lists=1
on_store download "$id" "$work/copy.img"
same "$work/copy.img"

step "Mounting the store"
mnt=$work/mnt
on_store mount --tag "fspfs-smoke=$run" "$mnt"
same "$mnt/$id.img"

# The snapshot that the written file is by now.
newest() {
    local target
    target=$(readlink "$mnt/by-name/written-$run.img") || return
    basename "$target" .img
}

step "Writing the image under new/"
before=$(metric put_block)
cp --sparse=always "$disk" "$mnt/new/written-$run.img"
written=$(newest)
echo "it is $written, and $(($(metric put_block) - before)) blocks were put"
wait_for "$written"
same "$mnt/$written.img"

step "Changing one block of it"
before=$(metric put_block)
for file in "$disk" "$mnt/new/written-$run.img"; do
    echo "a change" | dd of="$file" bs=512K seek=5 conv=notrunc status=none
done
for _ in $(seq 120); do
    child=$(newest)
    [ "$child" = "$written" ] || break
    sleep 5
done
if [ "$child" = "$written" ]; then
    "$fspfs" staged "$mnt" >&2
    echo "There is no second snapshot of written-$run.img" >&2
    exit 1
fi
put=$(($(metric put_block) - before))
echo "its child is $child, and $put blocks were put"
[ "$put" -eq 1 ]
wait_for "$child"
same "$mnt/$child.img"

step "Unmounting"
note_mount
"$fspfs" umount "$mnt"

step "Deleting what was made"
delete_ours
now="cleaning up"
