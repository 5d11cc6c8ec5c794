#!/bin/sh
# Drains this node before it shuts down: notifies Ray, which starts the node's replicas elsewhere and takes its proxy
# out of service, and waits up to SECONDS for the running work to finish.
#
#   drain-node SECONDS [/proc]
set -eu

seconds=$1
processes=${2:-/proc}

command -v ray > /dev/null || { echo "drain-node: there is no command ray; add its folder to PATH" >&2; exit 127; }
# Fails if the head is gone too, as when the whole cluster shuts down; running answers may still finish.
ray drain-node \
    --reason DRAIN_NODE_REASON_PREEMPTION \
    --reason-message "the machine is shutting down" \
    --deadline-remaining-seconds "$seconds" \
    || echo "drain-node: Ray does not drain this node, for the reason above; waiting for its running answers" >&2

# Ray names the processes of actors after their classes: replicas, and the proxy with its streams.
while [ "$seconds" -gt 0 ] && cat "$processes"/[0-9]*/cmdline 2>/dev/null | grep -aqE 'ray::(ServeReplica|HAProxyManager)'; do
    sleep 1
    seconds=$((seconds - 1))
done
