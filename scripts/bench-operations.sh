# The part of bench.sh that measures operations with several ends. Sourced by it, not run.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # what bench.sh sets, and what it is given

gib=$((size / 1024))
[ "$gib" -ge 1 ] || gib=1
blocks=$((gib * 2048))
ram=$(mktemp -d /dev/shm/fspfs-bench.XXXXXX)
rams+=("$ram")
for_ebs
dense=snap-00000000000100001

# serve_at NAME STORE ARGUMENT...: starts a server, and sets the variable NAME to the URL by which it is an `ebs:` store.
serve_at() {
    local -n url=$1
    shift
    start_server "$@"
    url="ebs://us-east-1?endpoint=http://$address"
}

# serve_both: a service to read from, and one over an empty repository, each limited to pace blocks a second.
serve_both() {
    rm -rf "$ram/store" && "$fspfs" -q -s "$ram/store" init >/dev/null
    serve_at from "synth:?size=${gib}GiB" --memory "$((gib + 1))GiB" --inject "get.rate=$pace/s"
    serve_at to "$ram/store" --inject "put.rate=$pace/s"
}

# How fast a download is that nothing limits. What is read is in the memory of the server from the first one on.
serve_at from "synth:?size=${gib}GiB" --memory "$((gib + 1))GiB"
plain=()
for n in $(seq 0 "$runs"); do
    timed "$fspfs" -q -s "$from" download $dense "$ram/source"
    [ "$n" = 0 ] || plain+=("$elapsed")
done
stop_server
plain_time=$(list "${plain[@]}" | median)
pace=$(awk -v n="$blocks" -v s="$plain_time" 'BEGIN { printf "%.0f", n / s / 4 }')

down=() up=() copies=() clones=() fans=()
for _ in $(seq "$runs"); do
    serve_both
    timed "$fspfs" -q -s "$from" download $dense "$ram/image"
    down+=("$elapsed")
    timed "$fspfs" -q -s "$from" multiclone $dense "$ram"/image.{1,2,3,4}
    clones+=("$elapsed")
    rm "$ram"/image*
    timed "$fspfs" -q -s "$from" copy $dense --to "$to"
    copies+=("$elapsed")
    stop_server
    serve_both
    timed "$fspfs" -q -s "$to" upload "$ram/source"
    up+=("$elapsed")
    serve_at second "$ram/store" --inject "put.rate=$pace/s"
    serve_at third "$ram/store" --inject "put.rate=$pace/s"
    timed "$fspfs" -q fanout "$ram/source" "$to" "$second" "$third"
    fans+=("$elapsed")
    stop_server
done

# 16 GiB of which one block in a hundred differs; requests are counted, not timed.
answered_by() { curl -sf "${1#*endpoint=}/metrics" | awk '/^fspfs_serve_requests_total/ { n += $NF } END { print n + 0 }'; }
rm -rf "$ram/store" "$ram/source" && "$fspfs" -q -s "$ram/store" init >/dev/null
serve_at from "synth:?size=16GiB&changed=$((16 * 2048 / 100))"
serve_at to "$ram/store"
second_day=snap-00000000000100002
clone=$("$fspfs" -q -s "$from" copy $dense --to "$to")
copy_requests=$(($(answered_by "$from") + $(answered_by "$to")))
"$fspfs" -q -s "$from" sync $dense $second_day "$clone" --to "$to" >/dev/null
sync_requests=$(($(answered_by "$from") + $(answered_by "$to") - copy_requests))
stop_server
rm -rf "$ram"

# Two snapshots of 16 TiB that differ in each of their 33,554,432 blocks.
serve_at from "synth:?size=16TiB&changed=$((16 << 21))"
/usr/bin/env time -f %M -o "$work/diff-peak" "$fspfs" -s "$from" diff $dense snap-00000000000100002 >"$work/diff"
grep -q " contain $((16 << 21)) chunks " "$work/diff" || { cat "$work/diff" >&2 && exit 1; }
diff_peak=$(tail -n 1 "$work/diff-peak")
stop_server

down_time=$(list "${down[@]}" | median) up_time=$(list "${up[@]}" | median)
copy_time=$(list "${copies[@]}" | median) clone_time=$(list "${clones[@]}" | median)
fan_time=$(list "${fans[@]}" | median)
slower=$(list "$down_time" "$up_time" | sort -n | tail -n 1)
mib=$((gib * 1024))
echo
row "operations (medians of $runs, $gib GiB)" "measured" "bound"
row "download to memory, nothing limited" "$(rate $mib "$plain_time")" ""
row "from here on: blocks/s that each end is limited to" "$pace" ""
row "download" "$(rate $mib "$down_time")" ""
row "upload" "$(rate $mib "$up_time")" ""
row "copy" "$(rate $mib "$copy_time")" ""
row "copy / the slower of download and upload" "$(quotient "$slower" "$copy_time")" ">= 0.90"
row "multiclone to 4 files" "$(rate $mib "$clone_time")" ""
row "multiclone / download" "$(quotient "$down_time" "$clone_time")" ">= 0.90"
row "fanout to 3 stores / upload, time" "$(quotient "$fan_time" "$up_time")" "<= 1.15"
row "requests, sync of 1 % of 16 GiB / copy" "$(quotient "$sync_requests" "$copy_requests")" "<= 0.03"
row "peak memory, diff of two full snapshots of 16 TiB" "$((diff_peak / 1024)) MiB" "<= 150 MiB"
echo
