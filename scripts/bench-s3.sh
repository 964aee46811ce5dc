# The part of bench.sh that measures archives in a bucket. Sourced by it, not run.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # what bench.sh sets, and what it is given

venv=$built/venv
[ -x "$venv/bin/weed" ] || { echo "bench.sh: there is no $venv/bin/weed; run scripts/test.sh first" >&2 && exit 1; }
export AWS_ACCESS_KEY_ID=bench AWS_SECRET_ACCESS_KEY=benchbench AWS_REGION=us-east-1 AWS_DEFAULT_REGION=us-east-1
export AWS_EC2_METADATA_DISABLED=true HOME=$work
ram=$(mktemp -d /dev/shm/fspfs-bench.XXXXXX)
rams+=("$ram")
mib=1024
[ "$size" -ge 1024 ] || mib=$size
head -c "${mib}M" "$large" >"$ram/image"

# SeaweedFS, in memory.
cat >"$work/keys.json" <<'END'
{"identities": [{"name": "bench", "credentials": [{"accessKey": "bench", "secretKey": "benchbench"}],
                 "actions": ["Admin", "Read", "Write", "List"]}]}
END
mkdir "$ram/weed"
port=$((RANDOM % 10000 + 15000))
"$venv/bin/weed" server -ip=127.0.0.1 -ip.bind=127.0.0.1 -dir="$ram/weed" -filer -s3 -s3.config="$work/keys.json" \
    -master.volumeSizeLimitMB=1024 -volume.max=16 -s3.port.iceberg=0 -s3.port.lance=0 \
    -master.port=$port -master.port.grpc=$((port + 1)) -volume.port=$((port + 2)) -volume.port.grpc=$((port + 3)) \
    -filer.port=$((port + 4)) -filer.port.grpc=$((port + 5)) -s3.port=$((port + 6)) -s3.port.grpc=$((port + 7)) \
    >/dev/null 2>"$work/weed.log" &
servers+=("$!")
direct=http://127.0.0.1:$((port + 6))
aws_s3() { "$venv/bin/aws" --endpoint-url "$1" s3 "${@:2}"; }
for _ in $(seq 120); do
    ! aws_s3 "$direct" mb s3://bench >/dev/null 2>&1 || break
    sleep 0.5
done
aws_s3 "$direct" ls s3://bench

# slow_way NAME MIB/S MILLISECONDS: starts a way to it, and sets the variable NAME to its URL.
slow_way() {
    local -n url=$1
    : >"$work/ready"
    "$built/release/examples/slow_way" "${direct#http://}" "$2" "$3" >"$work/ready" &
    servers+=("$!")
    until grep -q http "$work/ready"; do sleep 0.02; done
    url=$(cat "$work/ready")
}

# As fast as the AWS CLI is, up and down; what was written once is in the server's files from then on.
ups=() downs=() cli_cpu=() cli_down_cpu=()
for n in $(seq 0 "$runs"); do
    timed aws_s3 "$direct" cp --no-progress "$ram/image" s3://bench/plain
    [ "$n" = 0 ] || { ups+=("$elapsed") && cli_cpu+=("$cpu"); }
    timed aws_s3 "$direct" cp --no-progress s3://bench/plain "$ram/copy"
    [ "$n" = 0 ] || { downs+=("$elapsed") && cli_down_cpu+=("$cpu"); }
    rm "$ram/copy"
done
pack_cpu=() unpack_cpu=()
for _ in $(seq "$runs"); do
    timed zstd -q -1 -T1 -f "$ram/image" -o "$ram/packed"
    pack_cpu+=("$cpu")
    timed zstd -q -d -f "$ram/packed" -o "$ram/copy"
    unpack_cpu+=("$cpu")
done
rm "$ram/packed" "$ram/copy"
up=$(list "${ups[@]}" | median) down=$(list "${downs[@]}" | median)
pace=$(list "$up" "$down" | sort -n | tail -n 1 | awk -v mib="$mib" '{ printf "%.0f", mib / $1 / 4 }')

slow_way near "$pace" 0
slow_way far "$pace" 25
timed_peak() {
    timed /usr/bin/env time -f %M -o "$work/peak" "$@"
    local high
    high=$(tail -n 1 "$work/peak")
    [ "$high" -le "$s3_peak" ] || s3_peak=$high
}
# read_in_place ENDPOINT: reads the image of the archive in order, through a mount; sets elapsed.
read_in_place() {
    "$fspfs" -q mount --memory 128MiB "s3://bench/snaps?endpoint=$1" "$work/mnt" >/dev/null
    mounts+=("$work/mnt")
    timed dd if="$work/mnt/$id.img" of=/dev/null bs=1M count="$mib"
    local high
    high=$(awk '/VmHWM/ { print $2 }' "/proc/$(cat "$work/mnt/control/pid")/status")
    [ "$high" -le "$s3_mount_peak" ] || s3_mount_peak=$high
    "$fspfs" -q umount "$work/mnt"
    mounts=()
}
s3_peak=0 s3_mount_peak=0
archive=() archive_cpu=() restore=() restore_cpu=() far_restore=() in_place=() far_in_place=()
for _ in $(seq "$runs"); do
    aws_s3 "$direct" rm --quiet --recursive s3://bench/snaps
    rm -rf "$XDG_STATE_HOME"
    timed_peak "$fspfs" -q movetos3 "$ram/image" "s3://bench/snaps?endpoint=$near"
    id=$(cat "$work/out")
    archive+=("$elapsed") archive_cpu+=("$cpu")
    for of in near far; do
        timed_peak "$fspfs" -q getfroms3 "$id" "s3://bench/snaps?endpoint=${!of}" --output "$ram/copy"
        if [ $of = near ]; then restore+=("$elapsed") restore_cpu+=("$cpu"); else far_restore+=("$elapsed"); fi
        cmp -s -n $((mib << 20)) "$ram/image" "$ram/copy" || { echo "wrong bytes" >&2 && exit 1; }
        rm "$ram/copy"
    done
    read_in_place "$near"
    in_place+=("$elapsed")
    read_in_place "$far"
    far_in_place+=("$elapsed")
done
kill "${servers[@]}"
sleep 2
# SeaweedFS does not always end when it is told to.
kill -KILL "${servers[@]}" 2>/dev/null || true
servers=()
rm -rf "$ram"

median_of() { list "$@" | median; }
# of_limit SECONDS...: the part of what the limit lets through that their median makes.
of_limit() { awk -v mib="$mib" -v s="$(median_of "$@")" -v pace="$pace" 'BEGIN { printf "%.2f", mib / s / pace }'; }
per_gib() { awk -v s="$(median_of "$@")" -v mib="$mib" 'BEGIN { printf "%.2f s", s * 1024 / mib }'; }
sum() { awk -v a="$(median_of "${cli_cpu[@]}")" -v b="$(median_of "${pack_cpu[@]}")" 'BEGIN { print a + b }'; }
down_sum() { awk -v a="$(median_of "${cli_down_cpu[@]}")" -v b="$(median_of "${unpack_cpu[@]}")" 'BEGIN { print a + b }'; }
echo
row "s3: (medians of $runs, $mib MiB)" "measured" "bound"
row "aws s3 cp, up" "$(rate "$mib" "$up")" ""
row "aws s3 cp, down" "$(rate "$mib" "$down")" ""
row "from here on: each way is limited to" "$pace MiB/s" ""
row "movetos3 / the limit" "$(of_limit "${archive[@]}")" ">= 0.90"
row "getfroms3 / the limit" "$(of_limit "${restore[@]}")" ">= 0.90"
row "getfroms3 with 25 ms / the limit" "$(of_limit "${far_restore[@]}")" ">= 0.90"
row "read in place, dd bs=1M / the limit" "$(of_limit "${in_place[@]}")" ">= 0.90"
row "read in place with 25 ms / the limit" "$(of_limit "${far_in_place[@]}")" ">= 0.90"
row "processor per GiB, movetos3" "$(per_gib "${archive_cpu[@]}")" ""
row "processor, movetos3 / (aws s3 cp and zstd -1)" "$(quotient "$(median_of "${archive_cpu[@]}")" "$(sum)")" ""
row "processor per GiB, getfroms3" "$(per_gib "${restore_cpu[@]}")" ""
row "processor, getfroms3 / (aws s3 cp and zstd -d)" "$(quotient "$(median_of "${restore_cpu[@]}")" "$(down_sum)")" ""
row "peak memory of movetos3 and getfroms3" "$((s3_peak / 1024)) MiB" "<= 300 MiB"
row "peak memory of a mount with --memory 128MiB" "$((s3_mount_peak / 1024)) MiB" "<= 300 MiB"
echo
