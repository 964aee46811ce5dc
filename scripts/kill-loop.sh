#!/usr/bin/env bash
# Uploads and downloads are killed at random moments and given again, until they are done; what comes of them is
# compared. For as many rounds as are asked for.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

case ${1:-} in
    -h | --help | '')
        echo "Usage: scripts/kill-loop.sh ROUNDS"
        exit 0
        ;;
esac
need_rust
choose_target_dir
FSPFS_KILL_ROUNDS=$1 cargo test --locked --test resume kills_at_random_moments
