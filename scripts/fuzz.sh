#!/usr/bin/env bash
# Feeds what reads the bytes of others with arbitrary bytes for a while.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

usage() {
    cat <<'END'
Usage: scripts/fuzz.sh [SECONDS] [TARGET...]

Builds fuzz/ with the coverage instrumentation of libFuzzer, which a stable Rust
can do, and runs each TARGET (all of fuzz/fuzz_targets/) for SECONDS (60) from its
seeds in fuzz/seeds/. What it learns is kept beside the build; an input that fails
is written to fuzz/artifacts/ and shown.
END
}

case ${1:-} in
    -h | --help) usage && exit 0 ;;
esac
seconds=${1:-60}
[ $# -eq 0 ] || shift
targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
    mapfile -t targets < <(basename -s .rs fuzz/fuzz_targets/*.rs)
fi

need_rust
choose_target_dir
target=${CARGO_TARGET_DIR:-target}/fuzz
mapfile -t packages < <(missing_packages c++=g++)
[ ${#packages[@]} -eq 0 ] || install_packages "$([ -z "${CI:-}" ] && echo yes || echo no)" "${packages[@]}"

# What cargo-fuzz gives to rustc, without a sanitizer: those need a nightly Rust.
flags=(
    --cfg fuzzing
    -Cpasses=sancov-module
    -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters
    -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares
)
triple=$(rustc -vV | sed -n 's/^host: //p')
RUSTFLAGS="${flags[*]}" cargo build --locked --release --manifest-path fuzz/Cargo.toml \
    --target "$triple" --target-dir "$target"

for name in "${targets[@]}"; do
    echo "--> $name"
    mkdir -p "$target/corpus/$name" fuzz/artifacts
    # The superblock of btrfs begins at 64 KiB.
    "$target/$triple/release/$name" -max_total_time="$seconds" -timeout=10 \
        -max_len="$([ "$name" = images ] && echo 81920 || echo 4096)" \
        -rss_limit_mb=2048 -print_final_stats=1 -artifact_prefix=fuzz/artifacts/ \
        "$target/corpus/$name" "fuzz/seeds/$name"
done
