# The part of bench.sh that measures `fspfs serve`. Sourced by it, not run.
# shellcheck shell=bash
# shellcheck disable=SC2154,SC2034 # what bench.sh sets and uses

connections=16 clients=64 load_seconds=4

# requests SNAPSHOT COUNT: writes a script for wrk that reads so many blocks, again and again.
requests() {
    curl -sf "http://$address/snapshots/$1/blocks?maxResults=10000" |
        jq -r --arg id "$1" --argjson count "$2" '
            "local paths = {", (.Blocks[:$count][] |
            "\"/snapshots/\($id)/blocks/\(.BlockIndex)?blockToken=\(.BlockToken | @uri)\","), "}"'
    cat <<'END'
local next = 0
request = function()
  next = next % #paths + 1
  return wrk.format("GET", paths[next])
end
END
}

# load CONNECTIONS URL ARGUMENT...: requests a second.
load() {
    local count=$1 url=$2
    shift 2
    wrk -t2 -c"$count" -d"${load_seconds}s" "$@" "$url" >"$work/wrk" 2>&1
    ! grep -E 'Non-2xx|Socket errors' "$work/wrk" >&2 || exit 1
    awk '/^Requests\/sec/ { print $2 }' "$work/wrk"
}

high_water() { awk '/VmHWM/ { print $2 }' "/proc/$1/status"; }

# hash_on_all_cores: SHA-256 of the large image, a part of it on each core.
hash_on_all_cores() {
    local cores part n
    cores=$(nproc)
    part=$((size / cores))
    for n in $(seq 0 $((cores - 1))); do
        dd if="$large" bs=1M skip=$((n * part)) count="$part" status=none | openssl dgst -sha256 &
        hashes+=("$!")
    done
    wait "${hashes[@]}"
    hashes=()
}
hashes=()

mkdir "$work/www"
chmod 755 "$work" "$work/www"
head -c 524288 "$large" >"$work/www/block"
cat >"$work/nginx.conf" <<END
worker_processes auto;
daemon off;
pid $work/nginx.pid;
error_log $work/nginx.log;
user root;
events { worker_connections 1024; }
http {
    access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000000;
    server { listen 127.0.0.1:4599; root $work/www; }
}
END
served=$("$fspfs" -q upload "$large" | tail -n 1)

nginx_rates=() memory_rates=() disk_rates=()
for _ in $(seq "$runs"); do
    nginx -c "$work/nginx.conf" 2>/dev/null &
    server=$! servers=("$!")
    until curl -sf http://127.0.0.1:4599/block >/dev/null; do sleep 0.05; done
    nginx_rates+=("$(load $connections http://127.0.0.1:4599/block)")
    stop_server
    start_server "$FSPFS_STORE" --no-auth
    requests "$served" 32 >"$work/memory.lua"
    memory_rates+=("$(load $connections "http://$address" -s "$work/memory.lua")")
    stop_server
    # More than the memory holds, so that each is read, decoded and checked.
    start_server "$FSPFS_STORE" --no-auth --memory 16MiB
    requests "$served" 10000 >"$work/disk.lua"
    drop_caches
    disk_rates+=("$(load $connections "http://$address" -s "$work/disk.lua")")
    stop_server
done

put_load=$(dirname "$fspfs")/examples/put_load
sha_times=() write_times=() put_times=()
for _ in $(seq "$runs"); do
    cat "$large" >/dev/null
    sha_times+=("$(seconds hash_on_all_cores)")
    drop_caches
    cat "$large" >/dev/null
    write_times+=("$(seconds dd if="$large" of="$work/copy" bs=512K conv=fsync)")
    rm "$work/copy"
    rm -rf "$work/puts" && "$fspfs" -q -s "$work/puts" init >/dev/null
    start_server "$work/puts" --no-auth
    drop_caches
    put_times+=("$("$put_load" "$address" "$large" $connections)")
    stop_server
done

# Memory: all clients read, then all write, then all read again.
start_server "$FSPFS_STORE" --no-auth
requests "$served" 10000 >"$work/disk.lua"
load $clients "http://$address" -s "$work/disk.lua" >/dev/null
"$put_load" "$address" "$large" $clients >/dev/null
load $clients "http://$address" -s "$work/disk.lua" >/dev/null
serve_peak=$(high_water "$server")
stop_server
rm -rf "$work/puts"

# One page at the start and one at the end of 16 TiB.
start_server 'synth:?size=16TiB&density=1' --no-auth
page() { curl -sf "http://$address/snapshots/snap-00000000000100001/blocks?maxResults=10000&startingBlockIndex=$1"; }
start_times=() end_times=()
for _ in $(seq $((runs * 5))); do
    start_times+=("$(seconds page 0)")
    end_times+=("$(seconds page $(((16 << 21) - 10000)))")
done
stop_server

nginx_rate=$(list "${nginx_rates[@]}" | median)
sha_time=$(list "${sha_times[@]}" | median) write_time=$(list "${write_times[@]}" | median)
put_time=$(list "${put_times[@]}" | median)
memory_rate=$(list "${memory_rates[@]}" | median) disk_rate=$(list "${disk_rates[@]}" | median)
slower=$(printf '%s\n' "$sha_time" "$write_time" | sort -n | tail -n 1)
start_time=$(list "${start_times[@]}" | median) end_time=$(list "${end_times[@]}" | median)
per_second() { awk -v r="$1" 'BEGIN { printf "%.0f/s", r }'; }
milliseconds() { awk -v s="$1" 'BEGIN { printf "%.1f ms", s * 1000 }'; }

echo
row "serve (medians of $runs)" "measured" "bound"
row "nginx, a static file of 512 KiB, $connections connections" "$(per_second "$nginx_rate")" ""
row "GetSnapshotBlock from memory" "$(per_second "$memory_rate")" ""
row "from memory / nginx" "$(quotient "$memory_rate" "$nginx_rate")" ">= 0.70"
row "GetSnapshotBlock from the disk" "$(per_second "$disk_rate")" ""
row "from the disk / nginx" "$(quotient "$disk_rate" "$nginx_rate")" ">= 0.35"
row "openssl dgst -sha256 of $size MiB, on all cores" "$(rate "$size" "$sha_time")" ""
row "dd conv=fsync of it" "$(rate "$size" "$write_time")" ""
row "PutSnapshotBlock of it, $connections connections" "$(rate "$size" "$put_time")" ""
row "PutSnapshotBlock / the slower of both" "$(quotient "$slower" "$put_time")" ">= 0.70"
row "peak memory with $clients clients that read, write and read" "$((serve_peak / 1024)) MiB" "<= 200 MiB"
row "a page of 10,000 blocks at the start of 16 TiB" "$(milliseconds "$start_time")" ""
row "a page at its end" "$(milliseconds "$end_time")" ""
row "end / start" "$(quotient "$end_time" "$start_time")" "<= 1.10"
echo
