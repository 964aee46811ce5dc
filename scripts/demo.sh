#!/usr/bin/env bash
# Shows fspfs at work on a disk image that it makes for the occasion.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

usage() {
    cat <<'END'
Usage: scripts/demo.sh [--yes] [--keep]

Builds fspfs, makes a disk image with two file systems, uploads it to a
repository, mounts that, compares what comes back with what went in, and writes
snapshots through the mount.

  --yes    do not ask before packages are installed
  --keep   leave the mount in place, and say what to try next
  --help   print this

Everything but the build is in a temporary directory, and is removed at the end.
As root it also mounts the file systems from the image; without root, or without
loop devices, it does the rest and says what it skipped.
END
}

ask=yes
keep=
for argument; do
    case $argument in
        -y | --yes) ask=no ;;
        -k | --keep) keep=1 ;;
        -h | --help) usage && exit 0 ;;
        *) usage >&2 && exit 2 ;;
    esac
done

# The environment of the user is not part of the demo.
unset FSPFS_STORE FSPFS_MEMORY FSPFS_REFRESH FSPFS_LOG

work=
mnt=
mounts=()
declare -A loops=()
skipped=()

step() {
    now=$1
    printf '\n== %s\n' "$now"
}

skip() {
    skipped+=("$1")
    echo "skipped: $1"
}

# Unmounts, detaches and removes what this script has made, and nothing else.
clean_up() {
    local i device
    for ((i = ${#mounts[@]} - 1; i >= 0; i--)); do
        umount "${mounts[i]}" 2>/dev/null || umount -l "${mounts[i]}" || true
    done
    for device in "${!loops[@]}"; do
        losetup -d "$device" || true
    done
    if [ -n "$mnt" ] && findmnt "$mnt" >/dev/null; then
        "$fspfs" umount "$mnt" || "$fspfs" umount --lazy "$mnt" || true
    fi
    if [ -n "$work" ]; then
        rm -rf --one-file-system "$work"
    fi
}

ended() {
    local status=$? kept="everything but the build is removed again"
    trap - EXIT INT TERM
    if [ "$status" -ne 0 ]; then
        clean_up
        printf '\nThe demo FAILED (exit status %s) at: %s\n' "$status" "$now" >&2
        exit "$status"
    fi
    if [ -n "$keep" ]; then
        kept="everything is left in place, as --keep says"
    else
        clean_up
    fi
    printf '\n'
    [ ${#skipped[@]} -eq 0 ] || printf 'Skipped: %s\n' "${skipped[@]}"
    printf 'The demo passed; %s.\n' "$kept"
}

# attach FILE OPTION...: a loop device for the file, in $device.
attach() {
    device=$(losetup -f --show "${@:2}" "$1")
    loops[$device]=1
}

detach() {
    losetup -d "$1"
    unset "loops[$1]"
}

# mount_at DIRECTORY ARGUMENT...
mount_at() {
    mkdir -p "$1"
    mount "${@:2}" "$1"
    mounts+=("$1")
}

unmount_last() {
    umount "${mounts[-1]}"
    unset 'mounts[-1]'
}

# same DIRECTORY: ends the demo unless it holds the files that were made.
same() {
    diff -r --no-dereference "$files" "$1"
    echo "all $(find "$files" -type f | wc -l) files in $1 are what they were"
}

before=0
# Says how many bytes were fetched from the store since this was called last.
fetched() {
    local total
    total=$(awk '$1 == "fspfs_store_read_bytes_total" { print $2 }' "$mnt/control/metrics")
    echo "fetched from the store for that: $(human $((total - before)))"
    before=$total
}

metric() {
    awk -v name="fspfs_store_requests_total{operation=\"$1\"}" '$1 == name { print $2 }' \
        "$mnt/control/metrics"
}

human() { numfmt --to=iec-i --suffix=B "$1"; }

# --- What is needed ---------------------------------------------------------------------------

now="checking the Rust toolchain"
trap ended EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
need_rust

now="looking for packages"
mapfile -t packages < <(
    missing_packages cc=gcc fusermount3=fuse3 mkfs.ext4=e2fsprogs mkfs.xfs=xfsprogs \
        losetup=mount partx=util-linux sfdisk=fdisk
    # The headers of the C library, which gcc only recommends.
    [ -e /usr/include/stdio.h ] || echo libc6-dev
)
binary=${CARGO_TARGET_DIR:-target}/release/fspfs
if [ -x "$binary" ]; then
    time="about a minute, if fspfs is built already"
else
    time="a few minutes for the first build on two cores, and half a minute for the rest"
fi
echo "This takes $time,"
echo "and about 1 GB of disk for the build and 1 GB in ${TMPDIR:-/tmp}."
now="installing packages"
[ ${#packages[@]} -eq 0 ] || install_packages "$ask" "${packages[@]}"

step "Building fspfs: cargo build --release --locked"
cargo build --release --locked
fspfs=$(realpath -e "$binary")

work=$(realpath "$(mktemp -d "${TMPDIR:-/tmp}/fspfs-demo.XXXXXX")")
export XDG_STATE_HOME=$work/state

step "Looking what this machine allows"
loops_allowed=
if ! is_root; then
    skip "mounting the file systems in the image, which takes root"
elif ! unshare --mount true 2>/dev/null; then
    skip "mounting the file systems in the image, which takes CAP_SYS_ADMIN"
elif ! losetup -f >/dev/null 2>&1; then
    skip "mounting the file systems in the image, which takes loop devices"
else
    loops_allowed=1
    echo "loop devices and mounts: yes"
fi
fuse_allowed=
if ! { : <>/dev/fuse; } 2>/dev/null; then
    skip "mounting the repository: /dev/fuse cannot be opened"
elif is_root && ! unshare --mount true 2>/dev/null; then
    skip "mounting the repository, which takes CAP_SYS_ADMIN"
else
    fuse_allowed=1
    echo "FUSE: yes"
fi
systems=(ext4)
if [ -n "$loops_allowed" ]; then
    modprobe -q xfs 2>/dev/null || true
    if grep -qw xfs /proc/filesystems; then
        systems+=(xfs)
    else
        skip "files in the xfs partition: this kernel has no xfs"
    fi
fi

# --- A disk -----------------------------------------------------------------------------------

step "Making files"
files=$work/tree/files
mkdir -p "$files"
cp -r src "$files/source"
for n in $(seq 500); do
    seq "$n" $((n * 20)) >"$files/numbers-$n.txt"
done
head -c 64M /dev/urandom >"$files/random.bin"
truncate -s 200M "$files/sparse.bin"
echo "the end" >>"$files/sparse.bin"
echo "$(find "$files" -type f | wc -l) files, $(du -sh "$files" | cut -f 1) on disk"

step "Making a disk image: a partition table, an ext4 and an xfs partition, full of the files"
# In MiB. xfs wants at least 300.
size=400
declare -A start=([ext4]=1 [xfs]=401)
disk=$work/disk.img
part=$work/part.img
truncate -s 1G "$disk"
sfdisk -q "$disk" <<END
label: gpt
start=${start[ext4]}MiB, size=${size}MiB, type=L, name=demo-ext4
start=${start[xfs]}MiB, size=${size}MiB, type=L, name=demo-xfs
END
for system in ext4 xfs; do
    truncate -s "${size}M" "$part"
    if [ -n "$loops_allowed" ]; then
        "mkfs.$system" -q "$part"
        if [[ " ${systems[*]} " == *" $system "* ]]; then
            attach "$part"
            mount_at "$work/fill" -t "$system" "$device"
            cp -r --sparse=always "$files" "$work/fill/"
            unmount_last
            detach "$device"
        fi
    elif [ "$system" = ext4 ]; then
        mkfs.ext4 -q -d "$work/tree" "$part"
    else
        mkfs.xfs -q "$part"
    fi
    dd if="$part" of="$disk" bs=1M seek="${start[$system]}" conv=notrunc,sparse status=none
    rm "$part"
done
sfdisk -l "$disk" | sed -n '/^Device/,$p'
echo "$(du -h "$disk" | cut -f 1) of its 1.0G are data, the rest is a hole"

# --- Into a repository and out again ----------------------------------------------------------

step "Uploading it to a new repository"
store=$work/snaps
"$fspfs" init "$store"
said=$("$fspfs" -s "$store" upload --name demo "$disk")
echo "$said"
id=${said##*$'\n'}
"$fspfs" -s "$store" list
echo "the repository takes $(du -sh "$store" | cut -f 1)"

step "Downloading it, and comparing byte for byte"
"$fspfs" -s "$store" download "$id" "$work/copy.img"
cmp "$disk" "$work/copy.img"
rm "$work/copy.img"
echo "the copy is the same"

if [ -z "$fuse_allowed" ]; then
    exit 0
fi

step "Mounting the repository"
mnt=$work/mnt
mkdir "$mnt"
"$fspfs" -s "$store" mount "$mnt"
image=$mnt/by-name/demo.img
ls -l "$mnt" "$mnt/by-name"
fetched

step "Reading 4 KiB at the start of the image"
cmp -n 4096 "$disk" "$image"
fetched

if [ -n "$loops_allowed" ]; then
    step "Mounting the file systems from the image: losetup -r -P --direct-io=on"
    attach "$image" -r -P --direct-io=on
    udevadm settle 2>/dev/null || true
    # A kernel that does not read partition tables itself is told of the partitions.
    [ -b "${device}p1" ] || partx -a "$device"
    lsblk -o NAME,SIZE,RO,FSTYPE "$device" 2>/dev/null || true
    number=0
    for system in ext4 xfs; do
        number=$((number + 1))
        if [[ " ${systems[*]} " == *" $system "* ]]; then
            mount_at "$work/$system" -t "$system" -o ro "${device}p$number"
        fi
    done
    fetched

    step "Comparing the files in them"
    for system in "${systems[@]}"; do
        same "$work/$system/files"
    done
    fetched
fi

step "Comparing the whole image byte for byte"
cmp "$disk" "$image"
echo "$image is the same as $disk, 1 GiB"
fetched
echo "fetched in all: $(human "$before") of $(human "$(stat -Lc %s "$image")"); read errors: $(
    awk -F '[ {]' '$1 == "fspfs_store_errors_total" { n += $NF } END { print n + 0 }' \
        "$mnt/control/metrics"
)"

step "Writing a snapshot: cp to new/"
cp --sparse=always "$disk" "$mnt/new/copy.img"
"$fspfs" staged "$mnt"
cmp "$disk" "$mnt/by-name/copy.img"
echo "by-name/copy.img is a snapshot of it, and the same"

step "Changing it: the next snapshot is a child that holds the change only"
before_puts=$(metric put_block)
echo "a change" | dd of="$mnt/new/copy.img" bs=1M seek=1 conv=notrunc status=none
"$fspfs" -s "$store" list
echo "blocks stored for that: $(($(metric put_block) - before_puts))"

if [ -n "$keep" ]; then
    step "What to try next"
    cat <<END
  ls -l $mnt $mnt/by-name
  getfattr -d -m user.fspfs $image
  cat $mnt/control/metrics
  cp $disk $mnt/new/again.img; getfattr -d $mnt/new/again.img
  qemu-img convert -f raw -O qcow2 $image disk.qcow2
  fls -r -o 2048 $image
  $fspfs -s $store verify

To clean up:

END
    for mounted in "${mounts[@]}"; do
        echo "  umount $mounted"
    done
    for device in "${!loops[@]}"; do
        echo "  losetup -d $device"
    done
    echo "  $fspfs umount $mnt"
    echo "  rm -r $work"
fi
now="cleaning up"
