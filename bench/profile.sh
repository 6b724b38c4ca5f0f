#!/usr/bin/env bash
# Renews cmd/router/default.pgo, the profile the compiler optimises the binary
# by: a cluster of three nodes of bin/router on this machine takes each kind of
# load in turn while all nodes are profiled. Run it when a hot path has changed a
# good deal; an old profile is no error, it only helps less.
set -euo pipefail
cd "$(dirname "$0")/.."
base=${BASE_PORT:-27180}
seconds=${SECONDS_EACH:-8}
data=$(mktemp -d)
# A profile names the file of the program; it should say nothing of this checkout.
bin=$data/router
cp bin/router "$bin"
pids=()
stop() {
	kill "${pids[@]}" 2>/dev/null || true
	wait "${pids[@]}" 2>/dev/null || true
	rm -rf "$data"
}
trap stop EXIT

endpoints=() peers=()
for i in 1 2 3; do
	peers+=(--peers "$i:127.0.0.1:$((base + 10 + i))")
	endpoints+=("127.0.0.1:$((base + i))")
done
for i in 1 2 3; do
	"$bin" serve --cluster-name profile --node-id "$i" --data-dir "$data/$i" --log-level error \
		--listen-addr "127.0.0.1:$((base + i))" --raft-addr "127.0.0.1:$((base + 10 + i))" \
		--debug-addr "127.0.0.1:$((base + 20 + i))" "${peers[@]}" &
	pids+=($!)
done
servers=$(IFS=,; echo "${endpoints[*]}")
for attempt in {1..100}; do # a linearizable read answers once somebody leads
	if "$bin" pipeline list --server "$servers" >/dev/null 2>&1; then break; fi
	[ "$attempt" -lt 100 ] || { echo "the cluster did not start" >&2; exit 1; }
	sleep 0.1
done
"$bin" bench --server "$servers" --to leader --fill --mix stale --warmup 0s --duration 1s >/dev/null

n=0
while read -r load; do
	n=$((n + 1))
	echo "load $n: $load"
	# shellcheck disable=SC2086 # the words of a load are flags of their own
	"$bin" bench --server "$servers" $load --warmup 1s --duration "$((seconds + 2))s" >"$data/load" &
	generator=$!
	profiles=()
	for i in 1 2 3; do
		go tool pprof -proto -output "$data/$n.$i.pgo" -seconds "$seconds" \
			"http://127.0.0.1:$((base + 20 + i))/debug/pprof/profile" >/dev/null 2>&1 &
		profiles+=($!)
	done
	wait "${profiles[@]}" "$generator"
	grep throughput "$data/load"
done <<'LOADS'
--to leader --clients 64 --conns 8
--to leader --clients 256 --conns 16
--to all --clients 64 --conns 8
--to leader --clients 64 --conns 8 --mix read
--to all --clients 64 --conns 8 --mix read
--to leader --clients 64 --conns 8 --mix stale
--to leader --streams 8 --conns 8 --in-flight 64
--to leader --streams 8 --conns 8 --in-flight 64 --batch 16
LOADS
go tool pprof -proto -output cmd/router/default.pgo "$data"/*.pgo
echo "wrote cmd/router/default.pgo; build and compare before you commit it"
