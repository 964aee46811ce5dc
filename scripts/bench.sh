#!/usr/bin/env bash
# Measures speed and memory side by side, and prints ratios.
#
# Each ratio compares two things that were done one after the other on the same machine, so that it
# says something about fspfs and not about the machine. Times are medians.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

usage() {
    cat <<'END'
Usage: scripts/bench.sh [--yes] [--runs N] [--size MIB] [--dir DIR] [--only PART] [--before FILE]

  --yes        do not ask before packages are installed
  --runs N     how often each thing is measured (default 5)
  --size MIB   size of the large image (default 2048)
  --dir DIR    where to work: a disk with three times that much free (default: a
               temporary directory)
  --only PART  `mount`, `serve`, `ebs`, `operations` or `s3`; all otherwise
  --before FILE  an fspfs of before, to be measured beside this one (`ebs`)

Needs root (mounts, loop devices, dropping the page cache), fio, jq, openssl,
python3, e2fsprogs, zstd, nginx and wrk, for `s3` also what scripts/test.sh
installs; the cores should have nothing else to do.
END
}

ask=yes runs=5 size=2048 base=${TMPDIR:-/tmp} only='' before=''
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage && exit 0 ;;
        -y | --yes) ask=no && shift ;;
        --runs) runs=$2 && shift 2 ;;
        --size) size=$2 && shift 2 ;;
        --dir) base=$2 && shift 2 ;;
        --only) only=$2 && shift 2 ;;
        --before) before=$(realpath -e "$2") && shift 2 ;;
        *) usage >&2 && exit 2 ;;
    esac
done
[ "$(id -u)" = 0 ] || { echo "bench.sh: this needs root" >&2 && exit 1; }
mapfile -t packages < <(missing_packages fio=fio jq=jq openssl=openssl mkfs.ext4=e2fsprogs losetup=mount \
    python3=python3 nginx=nginx wrk=wrk curl=curl zstd=zstd)
if [ ${#packages[@]} -gt 0 ]; then
    install_packages "$ask" "${packages[@]}"
    # Debian starts what it installs; we run one of our own for a while.
    [[ " ${packages[*]} " != *" nginx "* ]] || systemctl disable --now nginx 2>/dev/null || service nginx stop || true
fi

cargo build --release --locked --bins
# With what only tests and examples need, which builds much of it once more.
if [ -z "$only" ] || [ "$only" = serve ] || [ "$only" = s3 ]; then
    cargo build --release --locked --examples
fi
built=$(cargo metadata --format-version 1 --no-deps | jq -r .target_directory)
fspfs=$built/release/fspfs

work=$(mktemp -d "$base/fspfs-bench.XXXXXX")
export XDG_STATE_HOME=$work/state FSPFS_STORE=$work/snaps
loops=() servers=() mounts=() rams=() daemon=''
clean_up() {
    for mount in "${mounts[@]}"; do umount -l "$mount" || true; done
    for server in "${servers[@]}"; do kill "$server" 2>/dev/null || true; done
    for ram in "${rams[@]}"; do rm -rf "$ram"; done
    for device in "${loops[@]}"; do losetup -d "$device" || true; done
    mountpoint -q "$work/files" && umount "$work/files"
    mountpoint -q "$work/mnt" && umount -l "$work/mnt"
    [ -z "$daemon" ] || kill "$daemon" 2>/dev/null || true
    rm -rf "$work"
}
trap clean_up EXIT
mkdir "$work/mnt" "$work/files"

# --- How it is measured ---------------------------------------------------------------------------

# seconds COMMAND...: prints how long it takes.
seconds() {
    local began=$EPOCHREALTIME
    "$@" >/dev/null 2>"$work/stderr" || { cat "$work/stderr" >&2 && exit 1; }
    echo "$began $EPOCHREALTIME" | awk '{ printf "%.6f\n", $2 - $1 }'
}

# timed COMMAND...: runs it; sets elapsed and cpu, in seconds.
timed() {
    local TIMEFORMAT='%R %U %S' said
    said=$({ time "$@" >"$work/out" 2>"$work/err"; } 2>&1) || { cat "$work/err" >&2 && exit 1; }
    elapsed=${said%% *}
    cpu=$(awk '{ print $2 + $3 }' <<<"$said")
}

# start_server STORE ARGUMENT...: starts a server; sets server, address.
start_server() {
    local store=$1
    shift
    : >"$work/ready"
    "$fspfs" serve -q -s "$store" --listen 127.0.0.1:0 "$@" >"$work/ready" 2>"$work/log" &
    server=$!
    servers+=("$server")
    until grep -q served "$work/ready"; do
        kill -0 "$server" 2>/dev/null || { cat "$work/log" >&2 && exit 1; }
        sleep 0.02
    done
    address=$(sed 's|.* http://||' "$work/ready")
}

# stop_server: stops all of them.
stop_server() {
    kill "${servers[@]}" && wait "${servers[@]}"
    servers=()
}

# What fspfs needs of AWS for an `ebs:` store.
for_ebs() {
    export AWS_ACCESS_KEY_ID=bench AWS_SECRET_ACCESS_KEY=bench AWS_REGION=us-east-1 AWS_EC2_METADATA_DISABLED=true
}

median() { sort -n | awk '{ v[NR] = $1 } END { print v[int((NR + 1) / 2)] }'; }

# row WHAT VALUE BOUND: prints one line of the result.
row() { printf '%-66s %10s   %s\n' "$1" "$2" "$3"; }

quotient() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.2f", a / b }'; }

drop_caches() { sync && echo 3 >/proc/sys/vm/drop_caches; }

mount_store() {
    : >"$work/ready"
    "$fspfs" mount --foreground --memory 256MiB "$work/mnt" >"$work/ready" 2>"$work/log" &
    daemon=$!
    until grep -q mounted "$work/ready"; do
        kill -0 "$daemon" 2>/dev/null || { cat "$work/log" >&2 && exit 1; }
        sleep 0.02
    done
}

peak=0
unmount_store() {
    local high
    high=$(awk '/VmHWM/ { print $2 }' "/proc/$daemon/status")
    [ "$high" -le "$peak" ] || peak=$high
    "$fspfs" umount "$work/mnt"
    wait "$daemon"
    daemon=
}

metric() { awk -v name="$1" 'index($0, name) == 1 { sum += $NF } END { print sum + 0 }' "$work/mnt/control/metrics"; }

list() { printf '%s\n' "$@"; }

rate() { awk -v mib="$1" -v s="$2" 'BEGIN { printf "%.0f MiB/s", mib / s }'; }

# --- What is measured -----------------------------------------------------------------------------

echo "Making images in $work"
large=$work/large.img warm_mib=160
openssl enc -aes-128-ctr -K 00112233445566778899aabbccddeeff -iv 00 -in /dev/zero 2>/dev/null |
    head -c "${size}M" >"$large" || true
[ "$(stat -c %s "$large")" = $((size << 20)) ] || { echo "cannot make $large" >&2 && exit 1; }
"$fspfs" init >/dev/null
if [ -z "$only" ] || [ "$only" = serve ]; then
    # shellcheck source=scripts/bench-serve.sh
    . scripts/bench-serve.sh
fi
if [ -z "$only" ] || [ "$only" = ebs ]; then
    # shellcheck source=scripts/bench-ebs.sh
    . scripts/bench-ebs.sh
fi
if [ -z "$only" ] || [ "$only" = operations ]; then
    # shellcheck source=scripts/bench-operations.sh
    . scripts/bench-operations.sh
fi
if [ -z "$only" ] || [ "$only" = s3 ]; then
    # shellcheck source=scripts/bench-s3.sh
    . scripts/bench-s3.sh
fi
[ -z "$only" ] || [ "$only" = mount ] || exit 0

head -c "${warm_mib}M" "$large" >"$work/warm.img"
truncate -s "${warm_mib}M" "$work/hole.img"
truncate -s 512M "$work/files.img"
mkfs.ext4 -q "$work/files.img"
mount -o loop "$work/files.img" "$work/files"
for n in $(seq 400); do head -c 200000 "$large" >"$work/files/$n"; done
umount "$work/files"

dd_times=() hash_times=() upload_times=() download_times=() id=
for _ in $(seq "$runs"); do
    rm -f "$work/copy" && drop_caches
    dd_times+=("$(seconds dd if="$large" of="$work/copy" bs=1M conv=fsync)")
    hash_times+=("$(seconds openssl dgst -sha256 "$work/copy")")
    rm -f "$work/copy" && drop_caches
    began=$EPOCHREALTIME
    id=$("$fspfs" -q upload "$large" | tail -n 1)
    upload_times+=("$(echo "$began $EPOCHREALTIME" | awk '{ print $2 - $1 }')")
    drop_caches
    download_times+=("$(seconds "$fspfs" -q download "$id" "$work/copy")")
    [ "$runs" = 1 ] || cmp -s "$large" "$work/copy" || { echo "wrong bytes" >&2 && exit 1; }
    rm -f "$work/copy"
    keep=$id
    # The store does not grow with the number of runs.
    for old in $("$fspfs" list --json | jq -r '.[].id'); do
        [ "$old" = "$keep" ] || "$fspfs" -q delete --yes "$old"
    done
done
dd_time=$(list "${dd_times[@]}" | median) hash_time=$(list "${hash_times[@]}" | median)
upload_time=$(list "${upload_times[@]}" | median) download_time=$(list "${download_times[@]}" | median)
warm=$("$fspfs" -q upload "$work/warm.img" | tail -n 1)
hole=$("$fspfs" -q upload "$work/hole.img" | tail -n 1)
files=$("$fspfs" -q upload "$work/files.img" | tail -n 1)

verify_times=() cold_times=()
for _ in $(seq "$runs"); do
    drop_caches
    verify_times+=("$(seconds "$fspfs" verify "$id")")
    mount_store
    drop_caches
    cold_times+=("$(seconds dd if="$work/mnt/$id.img" of=/dev/null bs=1M)")
    unmount_store
done

mount_store
warm_img=$work/mnt/$warm.img hole_img=$work/mnt/$hole.img
dd if="$warm_img" of=/dev/null bs=1M iflag=direct status=none
# Ten passes: one alone is mostly the start of dd.
pass() { for _ in 1 2 3 4 5 6 7 8 9 10; do dd if="$1" of=/dev/null bs=1M iflag=direct status=none; done; }
device=$(losetup -r --direct-io=on -f --show "$warm_img")
loops+=("$device")
random() {
    fio --name=r --filename="$1" --readonly --rw=randread --bs=4k --direct=1 --ioengine=psync \
        --numjobs=2 --group_reporting --time_based --runtime=3 --output-format=json |
        jq '.jobs[0].read.iops'
}
warm_times=() hole_times=() loop_times=() warm_iops=() hole_iops=()
for _ in $(seq "$runs"); do
    warm_times+=("$(seconds pass "$warm_img")")
    hole_times+=("$(seconds pass "$hole_img")")
    loop_times+=("$(seconds pass "$device")")
    warm_iops+=("$(random "$warm_img")")
    hole_iops+=("$(random "$hole_img")")
done
losetup -d "$device" && loops=()

echo 3 >/proc/sys/vm/drop_caches
readers=()
for n in $(seq 8); do
    dd if="$work/mnt/$id.img" of=/dev/null bs=1M skip=$((n * size / 10)) count=$((size / 8)) status=none &
    readers+=($!)
done
wait "${readers[@]}"
unmount_store

# The first byte of a snapshot of 16 TiB that holds nothing but data, from open to read, and what was
# asked of the store for it. The blocks are computed, so this is what fspfs itself takes.
first_byte() {
    python3 - "$1" <<'END'
import os, sys, time
began = time.monotonic()
image = os.open(sys.argv[1], os.O_RDONLY)
os.pread(image, 1, 0)
print(time.monotonic() - began)
END
}
byte_times=() byte_requests=()
for _ in $(seq "$runs"); do
    FSPFS_STORE='synth:?size=16TiB' mount_store
    byte_times+=("$(first_byte "$work/mnt/by-name/synth-1.img")")
    pages=$(metric 'fspfs_store_requests_total{operation="list_blocks"}')
    byte_requests+=($((pages + $(metric 'fspfs_store_requests_total{operation="get_block"}'))))
    unmount_store
done

# What a small file costs: blocks fetched, over the blocks that the kernel asks for, of which some
# are empty and cost nothing. tests/filesystems.rs counts what is touched from outside.
mount_store
device=$(losetup -r --direct-io=on -f --show "$work/mnt/$files.img")
loops+=("$device")
mount -o ro,noload "$device" "$work/files"
cat "$work/files/200" >/dev/null
fetched=$(metric 'fspfs_store_requests_total{operation="get_block"}')
umount "$work/files"
losetup -d "$device" && loops=()
unmount_store
touched=$(
    : >"$work/ready"
    FSPFS_LOG=fuser=debug "$fspfs" mount --foreground "$work/mnt" >"$work/ready" 2>"$work/requests" &
    echo $! >"$work/pid"
    until grep -q mounted "$work/ready"; do sleep 0.02; done
    device=$(losetup -r --direct-io=on -f --show "$work/mnt/$files.img")
    mount -o ro,noload "$device" "$work/files"
    cat "$work/files/200" >/dev/null
    umount "$work/files"
    losetup -d "$device"
    "$fspfs" umount "$work/mnt"
    wait "$(cat "$work/pid")" || true
    sed -n 's/.* READ fh .*offset Ok(\([0-9]*\)), size \([0-9]*\).*/\1 \2/p' "$work/requests" |
        awk '{ for (b = int($1 / 524288); b * 524288 < $1 + $2; b++) if (!seen[b]++) n++ } END { print n + 0 }'
)

# Writing under new/. The staging disk is the disk of the store.
new_times=() two_times=()
for _ in $(seq "$runs"); do
    mount_store
    drop_caches
    new_times+=("$(seconds cp "$large" "$work/mnt/new/large.img")")
    rm "$work/mnt/new/large.img"
    unmount_store
    rm -f "$work/copy" && drop_caches
    began=$EPOCHREALTIME
    cp "$large" "$work/copy"
    "$fspfs" -q upload "$work/copy" >/dev/null
    two_times+=("$(echo "$began $EPOCHREALTIME" | awk '{ print $2 - $1 }')")
    rm -f "$work/copy"
    for old in $("$fspfs" list --json | jq -r --arg id "$id" '.[].id | select(. != $id)'); do
        "$fspfs" -q delete --yes "$old"
    done
done

mount_store
cp "$large" "$work/mnt/new/large.img"
# Changes one block in a hundred, all over the image, and closes it, which waits for the commit. Prints
# how long that takes, without the start of python.
change() {
    python3 - "$work/mnt/new/large.img" "$size" <<'END'
import os, sys, time
began = time.monotonic()
image = os.open(sys.argv[1], os.O_RDWR)
for block in range(0, int(sys.argv[2]) * 2, 100):
    os.pwrite(image, os.urandom(4096), block * 524288)
os.close(image)
print(time.monotonic() - began)
END
}
before=$(metric 'fspfs_store_requests_total{operation="put_block"}')
first=$(list "${new_times[@]}" | median)
second=$(change)
second_puts=$(($(metric 'fspfs_store_requests_total{operation="put_block"}') - before))
rm "$work/mnt/new/large.img"

writes() {
    local device
    truncate -s 1G "$1"
    device=$(losetup --direct-io=on -f --show "$1")
    loops+=("$device")
    fio --name=w --filename="$device" --rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=16 \
        --time_based --runtime=5 --output-format=json | jq '.jobs[0].write.iops'
    losetup -d "$device" && loops=()
}
new_iops=() plain_iops=()
for _ in $(seq "$runs"); do
    # A name that is not committed: only the writing is measured.
    new_iops+=("$(writes "$work/mnt/new/.loop")")
    rm "$work/mnt/new/.loop"
    plain_iops+=("$(writes "$work/plain")")
    rm "$work/plain"
done
# For the memory: 20 images are committed while another one is read.
copies=()
for n in $(seq 20); do
    head -c 64M "$large" >"$work/mnt/new/many-$n.img" &
    copies+=($!)
done
dd if="$work/mnt/$id.img" of=/dev/null bs=1M status=none
wait "${copies[@]}"
unmount_store

# --- The result -----------------------------------------------------------------------------------

warm_time=$(list "${warm_times[@]}" | median) hole_time=$(list "${hole_times[@]}" | median)
loop_time=$(list "${loop_times[@]}" | median)
verify_time=$(list "${verify_times[@]}" | median) cold_time=$(list "${cold_times[@]}" | median)
warm_rate=$(list "${warm_iops[@]}" | median) hole_rate=$(list "${hole_iops[@]}" | median)
passes=$((warm_mib * 10))

echo
row "what (medians of $runs)" "measured" "bound"
row "dd conv=fsync of $size MiB" "$(rate "$size" "$dd_time")" ""
row "openssl dgst -sha256 of it" "$(rate "$size" "$hash_time")" ""
row "upload of it" "$(rate "$size" "$upload_time")" ""
row "upload / (dd, then openssl)" \
    "$(quotient "$(awk -v a="$dd_time" -v b="$hash_time" 'BEGIN { print a + b }')" "$upload_time")" ">= 0.80"
row "download of it" "$(rate "$size" "$download_time")" ""
row "download / dd" "$(quotient "$dd_time" "$download_time")" ">= 0.60"
row "verify of it, page cache dropped" "$(rate "$size" "$verify_time")" ""
row "cold sequential read, dd bs=1M" "$(rate "$size" "$cold_time")" ""
row "cold read / verify" "$(quotient "$verify_time" "$cold_time")" ">= 0.60"
row "warm sequential read, dd bs=1M iflag=direct" "$(rate "$passes" "$warm_time")" ""
row "the same of a hole" "$(rate "$passes" "$hole_time")" ""
row "warm read / hole" "$(quotient "$hole_time" "$warm_time")" ">= 0.80"
row "loop device with direct I/O over it" "$(rate "$passes" "$loop_time")" ""
row "loop device / warm read" "$(quotient "$warm_time" "$loop_time")" ">= 0.60"
row "random 4 KiB reads, warm" "$(awk -v r="$warm_rate" 'BEGIN { printf "%.0f/s", r }')" ""
row "the same of a hole" "$(awk -v r="$hole_rate" 'BEGIN { printf "%.0f/s", r }')" ""
row "warm / hole, random" "$(quotient "$warm_rate" "$hole_rate")" ">= 0.80"
byte_time=$(list "${byte_times[@]}" | median)
row "first byte of a 16 TiB snapshot" "$(awk -v s="$byte_time" 'BEGIN { printf "%.1f ms", s * 1000 }')" ""
row "pages listed and blocks fetched for it" "$(list "${byte_requests[@]}" | median)" "<= 4"
row "mounting ext4 and reading a small file: blocks fetched" "$fetched" ""
row "blocks that the kernel asks for, empty ones included" "$touched" ""
row "fetched / asked for" "$(quotient "$fetched" "$touched")" "<= 3.00"
new_time=$(list "${new_times[@]}" | median) two_time=$(list "${two_times[@]}" | median)
row "cp to new/, until it is a snapshot" "$(rate "$size" "$new_time")" ""
row "cp to the staging disk, then upload" "$(rate "$size" "$two_time")" ""
row "cp to new/ / (cp, then upload)" "$(quotient "$two_time" "$new_time")" ">= 0.90"
row "a second commit, 1 % changed: blocks put" "$second_puts" "$(((size * 2 + 99) / 100))"
row "second commit, with its writes / first" "$(quotient "$second" "$first")" "<= 0.10"
new_rate=$(list "${new_iops[@]}" | median) plain_rate=$(list "${plain_iops[@]}" | median)
row "random 4 KiB writes, loop device over new/" "$(awk -v r="$new_rate" 'BEGIN { printf "%.0f/s", r }')" ""
row "the same over a plain file" "$(awk -v r="$plain_rate" 'BEGIN { printf "%.0f/s", r }')" ""
row "new/ / plain file" "$(quotient "$new_rate" "$plain_rate")" ">= 0.30"
row "peak memory of the daemon, --memory 256MiB" "$((peak / 1024)) MiB" "<= 320 MiB"
