#!/usr/bin/env bash
# Runs all tests, after installing what they need.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

usage() {
    cat <<'END'
Usage: scripts/test.sh [--yes] [ARGUMENT...]

Installs the programs that the tests use, if they are missing, and runs the
tests with cargo-nextest where that is installed, else with `cargo test`. What
was skipped, and why, is listed at the end. The arguments go to the runner:

  scripts/test.sh                        everything
  scripts/test.sh --test mount           one file of tests
  scripts/test.sh -E 'test(cp_gives)'    what nextest's filter selects

  --yes    do not ask before something is installed

As root every test runs. Where CI is set nothing may be skipped, nothing is
asked, and the build is kept outside the clone.
END
}

ask=yes
[ -z "${CI:-}" ] || ask=no
case ${1:-} in
    -h | --help) usage && exit 0 ;;
    -y | --yes) ask=no && shift ;;
esac

need_rust
choose_target_dir

# --- What the tests use ---------------------------------------------------------------------------

mapfile -t packages < <(
    missing_packages cc=gcc fusermount3=fuse3 mkfs.ext4=e2fsprogs mkfs.xfs=xfsprogs \
        mkfs.btrfs=btrfs-progs qemu-img=qemu-utils fls=sleuthkit rsync=rsync getfattr=attr \
        strace=strace tar=tar python3=python3 zstd=zstd mandoc=mandoc sfdisk=fdisk \
        faketime=faketime node=nodejs npm=npm sgdisk=gdisk losetup=mount partx=util-linux setpriv=util-linux \
        mkfs.fat=dosfstools mkfs.ntfs=ntfs-3g genisoimage=genisoimage pv=pv zip=zip bzip2=bzip2 xz=xz-utils
    [ -e /usr/include/stdio.h ] || echo libc6-dev
    # Debian keeps what makes a venv apart.
    ! have python3 || python3 -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
)
if [ ${#packages[@]} -gt 0 ]; then
    # Without these some tests are skipped, which CI does not allow.
    (install_packages "$ask" "${packages[@]}") || [ -z "${CI:-}" ]
fi

# What others wrote is kept beside the build: the one module that scripts/restore.py takes, the
# clients of `fspfs serve`, moto, a service for `ebs:` stores and for buckets, and SeaweedFS and s3rver,
# others for buckets.
venv=$(realpath -m "${CARGO_TARGET_DIR:-target}")/venv
install_modules() {
    if [ "$ask" = yes ]; then
        confirm "Install the modules of scripts/requirements.in and scripts/s3rver/ into $venv?" "Nothing was installed."
    fi
    python3 -m venv --clear "$venv" &&
        "$venv/bin/python3" -m pip -q --disable-pip-version-check install --require-hashes \
            -r scripts/requirements.txt &&
        cp -r scripts/s3rver "$venv/" &&
        npm --prefix "$venv/s3rver" ci --ignore-scripts --no-audit --no-fund &&
        cp scripts/requirements.txt "$venv/"
}
if ! cmp -s scripts/requirements.txt "$venv/requirements.txt" ||
    ! cmp -s scripts/s3rver/package-lock.json "$venv/s3rver/package-lock.json"; then
    (install_modules) || [ -z "${CI:-}" ]
fi
export FSPFS_PYTHON=$venv/bin/python3

if is_root; then
    # Where they are modules nobody may have loaded them yet.
    for module in fuse loop ext4 xfs btrfs; do
        modprobe -q "$module" 2>/dev/null || true
    done
fi

# --- The tests ------------------------------------------------------------------------------------

scratch=$(mktemp -d "${TMPDIR:-/tmp}/fspfs-test-sh.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
export FSPFS_SKIPPED=$scratch/skipped
output=$scratch/output

# There are no documentation tests: they would take a build of their own.
runner=(cargo test --locked)
! have cargo-nextest || runner=(cargo nextest run --locked)

colour=()
[ ! -t 1 ] || colour=(--color always)
status=0
"${runner[@]}" "${colour[@]}" "$@" 2>&1 | tee "$output" || status=$?

if [ -s "$FSPFS_SKIPPED" ]; then
    printf '\n%s tests were skipped, or a part of them:\n' "$(sort -u "$FSPFS_SKIPPED" | wc -l)"
    sort -u "$FSPFS_SKIPPED" | sed 's/^/  /'
else
    printf '\nNo test was skipped for want of a program or a permission.\n'
fi
# The runner's own summary is the last word.
grep -aE 'Summary.* run: |^test result:' "$output" | tail -n 1 || true
exit "$status"
