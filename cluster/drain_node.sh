#!/bin/sh
# Before a node of the cluster ends: tell Ray, which starts this node's replicas elsewhere and takes its proxy out of
# service, and wait until what runs here has ended, for up to so many seconds.
#
#   drain-node SECONDS [/proc]
set -eu

seconds=$1
processes=${2:-/proc}

# A head that is gone as well, as when the whole cluster goes, is told nothing; answers may still end.
ray drain-node \
    --reason DRAIN_NODE_REASON_PREEMPTION \
    --reason-message "the machine is going" \
    --deadline-remaining-seconds "$seconds" || true

# Ray names the processes of actors after their classes: replicas, and the proxy with its streams.
while [ "$seconds" -gt 0 ] && cat "$processes"/[0-9]*/cmdline 2>/dev/null | grep -aqE 'ray::(ServeReplica|HAProxyManager)'; do
    sleep 1
    seconds=$((seconds - 1))
done
