#!/bin/bash
# One search over machines that ssh reaches without a password, and this one:  docs/cluster.sh study.yaml alpha beta
# Ray's head and the search run here. When the search ends, after Ctrl-C, too, Ray ends everywhere.
#   HEAD=host     by which name or address the others reach this machine (its first address)
#   HEAD_CPUS=0   this machine evaluates nothing
#   SSH='ssh -p 2222', RAY=/path/of/ray on the other machines (that of this one), RAY_PORT
set -u
study=${1:?the study file, then hosts}
shift
port=${RAY_PORT:-6379}
here=${HEAD:-$(hostname -I | cut -d ' ' -f 1)}
export RAY_USAGE_STATS_ENABLED=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
RAY_AUTH_TOKEN=$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n') # whoever reaches the ports cannot use them
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

(: < "/dev/tcp/$here/$port") 2> /dev/null && { echo "something listens on $here:$port; set RAY_PORT" >&2; exit 2; }
ray start --head --port="$port" ${HEAD_CPUS:+--num-cpus="$HEAD_CPUS"} --include-dashboard=false --block &
head=$!
trap 'kill $head 2> /dev/null; wait $head' EXIT
until (: < "/dev/tcp/$here/$port") 2> /dev/null; do
    kill -0 $head 2> /dev/null || { echo "Ray did not start here" >&2; exit 1; }
    sleep 1
done

# There: the token comes through the connection. Ray ends when the connection does, so when this script is gone.
there='
read -r RAY_AUTH_TOKEN
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
(
    trap "kill \$ray; wait \$ray; exit" TERM
    while true; do "$0" start --address="$1" --block & ray=$!; wait $ray; sleep 5 & ray=$!; wait $ray; done
) < /dev/null &
cat > /dev/null
kill $!
wait
'
for host in "$@"; do
    exec {open}> >(exec ${SSH:-ssh} "$host" bash -c "$(printf '%q ' "$there" "${RAY:-$(command -v ray)}" "$here:$port")")
    echo "$RAY_AUTH_TOKEN" >&"$open"
done
sleep "${RAY_SECONDS:-15}" # the other nodes join; later ones are used, too
lcsc run "$study" --ray "$here:$port" &
search=$!
trap 'trap "" INT TERM; kill -TERM $search; wait $search; exit $?' INT TERM HUP
wait $search
