# The part of bench.sh that measures `ebs:` stores. Sourced by it, not run.
# shellcheck shell=bash
# shellcheck disable=SC2154 # what bench.sh sets

gib=$((size / 1024))
[ "$gib" -ge 1 ] || gib=1
ram=$(mktemp -d /dev/shm/fspfs-bench.XXXXXX)
rams+=("$ram")
for_ebs

# serve_for_ebs STORE ARGUMENT...: starts a server, and points fspfs and coldsnap at it.
serve_for_ebs() {
    start_server "$@"
    endpoint=http://$address
    export AWS_ENDPOINT_URL_EBS=$endpoint AWS_ENDPOINT_URL_EC2=$endpoint
}

# The requests that the server has answered, and those that it has refused.
answered() { curl -sf "$endpoint/metrics" | awk '/^fspfs_serve_requests_total/ { n += $NF } END { print n + 0 }'; }
refused() { curl -sf "$endpoint/metrics" | awk '/^fspfs_serve_requests_total.*Throttled/ { n += $NF } END { print n + 0 }'; }

of_ebs() { "$fspfs" -q -s ebs: "$@"; }
of_ebs_before() { "$before" -q -s ebs: "$@"; }

# read_cold SNAPSHOT: mounts, reads once from front to back, unmounts; sets elapsed.
read_cold() {
    mkdir -p "$work/ebs"
    FSPFS_STORE=ebs: "$fspfs" -q mount "$work/ebs" >/dev/null
    mounts+=("$work/ebs")
    timed dd if="$work/ebs/$1.img" of=/dev/null bs=1M
    "$fspfs" -q umount "$work/ebs"
    mounts=()
}

coldsnap=$(command -v coldsnap || true)
[ -n "$coldsnap" ] || echo "There is no coldsnap: it is left out. cargo install coldsnap --version 0.12.0 --locked" >&2
dense=snap-00000000000100001

down=() down_cpu=() cold_down=() cold_down_cpu=() up=() up_cpu=() cold_up=() cold_up_cpu=() reads=() down_before=() up_before=()
head -c "${gib}G" "$large" >"$ram/source" 2>/dev/null || true
truncate -s "${gib}G" "$ram/source"
for n in $(seq 0 "$runs"); do
    # Everything that is read is in the memory of the server, once it was read.
    if [ "$n" = 0 ]; then
        serve_for_ebs "synth:?size=${gib}GiB" --memory "$((gib + 1))GiB"
        of_ebs download $dense "$ram/image" >/dev/null
        [ -z "$coldsnap" ] || { rm -f "$ram/image" && "$coldsnap" download --no-progress $dense "$ram/image"; }
        rm -f "$ram/image"
        read_cold $dense
        continue
    fi
    timed of_ebs download $dense "$ram/image"
    down+=("$elapsed") down_cpu+=("$cpu")
    rm -f "$ram/image"
    if [ -n "$before" ]; then
        timed of_ebs_before download $dense "$ram/image"
        down_before+=("$elapsed")
        rm -f "$ram/image"
    fi
    if [ -n "$coldsnap" ]; then
        timed "$coldsnap" download --no-progress $dense "$ram/image"
        cold_down+=("$elapsed") cold_down_cpu+=("$cpu")
        rm -f "$ram/image"
    fi
    read_cold $dense
    reads+=("$elapsed")
done
stop_server

# 25 ms for each answer, and a rate.
slow_down=() slow_reads=() limited=() by_chance=()
serve_for_ebs "synth:?size=${gib}GiB" --memory "$((gib + 1))GiB" --inject latency=25ms
of_ebs download $dense "$ram/image" >/dev/null
rm -f "$ram/image"
for _ in $(seq "$runs"); do
    timed of_ebs download $dense "$ram/image"
    slow_down+=("$elapsed")
    rm -f "$ram/image"
    read_cold $dense
    slow_reads+=("$elapsed")
    timed of_ebs --max-requests-per-second 1000 download $dense "$ram/image"
    limited+=("$elapsed")
    rm -f "$ram/image"
done
stop_server
# And a few that are refused by chance.
serve_for_ebs "synth:?size=${gib}GiB" --memory "$((gib + 1))GiB" --inject latency=25ms,throttle=5%
of_ebs download $dense "$ram/image" >/dev/null
rm -f "$ram/image"
for _ in $(seq "$runs"); do
    timed of_ebs download $dense "$ram/image"
    by_chance+=("$elapsed")
    rm -f "$ram/image"
done
stop_server
serve_for_ebs "synth:?size=1GiB" --memory 2GiB --inject rate=100/s
timed of_ebs download $dense "$ram/image"
throttled=$elapsed
throttled_refused=$(refused) throttled_answered=$(answered)
rm -f "$ram/image"
stop_server

# Uploads, to a repository in memory.
for _ in $(seq "$runs"); do
    for program in fspfs before coldsnap; do
        [ "$program" != coldsnap ] || [ -n "$coldsnap" ] || continue
        [ "$program" != before ] || [ -n "$before" ] || continue
        rm -rf "$ram/store" && "$fspfs" -q -s "$ram/store" init >/dev/null
        serve_for_ebs "$ram/store"
        if [ "$program" = fspfs ]; then
            timed of_ebs upload "$ram/source"
            up+=("$elapsed") up_cpu+=("$cpu")
        elif [ "$program" = before ]; then
            timed of_ebs_before upload "$ram/source"
            up_before+=("$elapsed")
        else
            timed "$coldsnap" upload --no-progress "$ram/source"
            cold_up+=("$elapsed") cold_up_cpu+=("$cpu")
        fi
        stop_server
    done
done

# Answers that take 200 ms, without the faults that must not show, and with them.
faults=throttle=5%,error=2%,cut-body=2%,cut=1%,corrupt=1%,tokens=2s,empty-pages=20%
far_down=() far_reads=() far_up=() ill_down=() ill_reads=() ill_up=()
truncate -s 256M "$ram/source"
for _ in $(seq "$runs"); do
    for inject in latency=200ms "latency=200ms,$faults"; do
        serve_for_ebs "synth:?size=1GiB" --inject "$inject"
        timed of_ebs download $dense "$ram/image"
        far_download=$elapsed
        rm -f "$ram/image"
        read_cold $dense
        far_read=$elapsed
        stop_server
        rm -rf "$ram/store" && "$fspfs" -q -s "$ram/store" init >/dev/null
        serve_for_ebs "$ram/store" --inject "$inject"
        timed of_ebs upload "$ram/source"
        stop_server
        if [ "$inject" = latency=200ms ]; then
            far_down+=("$far_download") far_reads+=("$far_read") far_up+=("$elapsed")
        else
            ill_down+=("$far_download") ill_reads+=("$far_read") ill_up+=("$elapsed")
        fi
    done
done
rm -f "$ram/source"
rm -rf "$ram/store"

# A full volume of 16 TiB: read here and there, listed whole, and downloaded for a while.
serve_for_ebs 'synth:?size=16TiB&density=1'
mkdir -p "$work/ebs"
FSPFS_STORE=ebs: "$fspfs" -q mount --memory 64MiB "$work/ebs" >/dev/null
mounts+=("$work/ebs")
python3 - "$work/ebs/$dense.img" <<'END'
import os, random, sys
image = os.open(sys.argv[1], os.O_RDONLY)
size = os.fstat(image).st_size
random.seed(1)
for _ in range(3000):
    os.pread(image, 4096, random.randrange(size >> 12) << 12)
END
huge_peak=$(awk '/VmHWM/ { print $2 }' "/proc/$(cat "$work/ebs/control/pid")/status")
"$fspfs" -q umount "$work/ebs"
mounts=()
FSPFS_STORE=ebs: /usr/bin/env time -f %M -o "$work/list-peak" "$fspfs" list $dense >/dev/null
list_peak=$(tail -n 1 "$work/list-peak")
# Interrupted by timeout, which says so with 124.
FSPFS_STORE=ebs: /usr/bin/env time -f %M -o "$work/part-peak" timeout -s INT 5 \
    "$fspfs" -q download $dense "$ram/image" >/dev/null 2>&1 || true
part_peak=$(tail -n 1 "$work/part-peak")
rm -rf "$ram"
stop_server
# Listed with 40 ms for an answer, and 50 requests a second.
serve_for_ebs 'synth:?size=4TiB&density=1' --inject latency=40ms
timed of_ebs --max-requests-per-second 50 list $dense
far_list=$elapsed
if [ -n "$before" ]; then
    timed of_ebs_before --max-requests-per-second 50 list $dense
    far_list_before=$elapsed
fi
stop_server

median_of() { list "$@" | median; }
d=$(median_of "${down[@]}") u=$(median_of "${up[@]}") r=$(median_of "${reads[@]}")
sd=$(median_of "${slow_down[@]}") sr=$(median_of "${slow_reads[@]}") l=$(median_of "${limited[@]}")
per_gib() { awk -v s="$1" -v n="$gib" 'BEGIN { printf "%.2f s", s / n }'; }
mib=$((gib * 1024))
named() { case $1 in down) echo download ;; reads) echo "cold read" ;; up) echo upload ;; esac; }
echo
row "ebs: (medians of $runs, $gib GiB)" "measured" "bound"
row "download to memory" "$(rate $mib "$d")" ""
row "upload from memory" "$(rate $mib "$u")" ""
if [ -n "$before" ]; then
    row "download / before" "$(quotient "$(median_of "${down_before[@]}")" "$d")" ">= 0.95"
    row "upload / before" "$(quotient "$(median_of "${up_before[@]}")" "$u")" ">= 0.95"
    row "list of 4 TiB with 40 ms, 50 requests/s, / before" "$(quotient "$far_list_before" "$far_list")" ">= 1.50"
fi
if [ -n "$coldsnap" ]; then
    cd=$(median_of "${cold_down[@]}") cu=$(median_of "${cold_up[@]}")
    dc=$(median_of "${down_cpu[@]}") cdc=$(median_of "${cold_down_cpu[@]}")
    uc=$(median_of "${up_cpu[@]}") cuc=$(median_of "${cold_up_cpu[@]}")
    row "coldsnap download" "$(rate $mib "$cd")" ""
    row "download / coldsnap" "$(quotient "$cd" "$d")" ">= 1.50"
    row "coldsnap upload" "$(rate $mib "$cu")" ""
    row "upload / coldsnap" "$(quotient "$cu" "$u")" ""
    row "processor per GiB, download" "$(per_gib "$dc")" ""
    row "processor per GiB, download / coldsnap" "$(quotient "$dc" "$cdc")" "<= 0.70"
    row "processor per GiB, upload" "$(per_gib "$uc")" ""
    row "processor per GiB, upload / coldsnap" "$(quotient "$uc" "$cuc")" "<= 0.60"
fi
row "cold read, dd bs=1M" "$(rate $mib "$r")" ""
row "cold read / download" "$(quotient "$d" "$r")" ">= 0.80"
row "download with 25 ms / without" "$(quotient "$d" "$sd")" ">= 0.80"
row "cold read with 25 ms / without" "$(quotient "$r" "$sr")" ">= 0.80"
row "download with 25 ms, 5 % refused by chance / none" "$(quotient "$sd" "$(median_of "${by_chance[@]}")")" ">= 0.80"
for of in down reads up; do
    declare -n without="far_$of" with="ill_$of"
    row "$(named $of) at 200 ms with faults / without" \
        "$(quotient "$(median_of "${without[@]}")" "$(median_of "${with[@]}")")" ""
done
row "requests/s of 1000 allowed" "$(awk -v n=$((gib * 2048)) -v s="$l" 'BEGIN { printf "%.0f", n / s }')" ">= 900"
row "requests/s of 100 that the account has" "$(awk -v s="$throttled" 'BEGIN { printf "%.0f", 2048 / s }')" ">= 90"
row "part of them refused" "$(quotient "$throttled_refused" "$throttled_answered")" "< 0.10"
row "peak memory, 16 TiB read here and there, of which cache 64 MiB" "$((huge_peak / 1024)) MiB" "<= 214 MiB"
row "list of 4 TiB with 40 ms, 50 requests/s" "$far_list s" ""
row "peak memory, 16 TiB listed" "$((list_peak / 1024)) MiB" "<= 150 MiB"
row "peak memory, 16 TiB downloaded for 5 s" "$((part_peak / 1024)) MiB" "<= 150 MiB"
echo
