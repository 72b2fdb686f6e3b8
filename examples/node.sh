#!/usr/bin/env bash
# One host's part of a run on many hosts: torchrun, and what schedulers need of it. All arguments are torchrun's.
#
# * SIGUSR1 and SIGTERM reach its ranks as SIGUSR1: they save at the end of their step and end with 0, and so does
#   torchrun. torchrun itself ignores SIGUSR1, of which it would die.
# * torchrun whose ranks are all gone may wait for ever for the store on a host that is lost. After RANKS_GONE_SECONDS
#   (120) it is killed.
# * A host that was asked to stop and has saved ends with STOPPED_CODE (0).
set -uo pipefail

(trap '' USR1; exec "${TORCHRUN:-torchrun}" "$@") &
agent=$!

ranks() { # process ids of the agent's children that run
    local file line rest state parent
    for file in /proc/[0-9]*/stat; do
        read -r line 2>/dev/null <"$file" || continue
        rest=${line##*) } # behind the name, which may hold spaces: state, parent, ...
        read -r state parent _ <<<"$rest"
        [[ $parent == "$agent" && $state != Z ]] && echo "${line%% *}"
    done
}

asked=0 had_ranks=0 quiet=0
stop() {
    asked=1
    echo "node.sh: asked to stop; the ranks save at the end of their step" >&2
    for pid in $(ranks); do
        had_ranks=1 # they may be gone before the loop below looks at them
        kill -USR1 "$pid" 2>/dev/null
    done
}
trap stop USR1 TERM

while kill -0 "$agent" 2>/dev/null; do
    sleep 1 &
    wait $! # unlike sleep itself, it lets a trap run at once
    if [[ -n $(ranks) ]]; then had_ranks=1 quiet=0; else quiet=$((quiet + 1)); fi
    if ((had_ranks && quiet > ${RANKS_GONE_SECONDS:-120})); then
        echo "node.sh: the ranks are gone and torchrun does not end; killed" >&2
        kill -KILL "$agent" 2>/dev/null
    fi
done
wait "$agent"
code=$?
if ((asked && code == 0)); then exit "${STOPPED_CODE:-0}"; fi
exit "$code"
