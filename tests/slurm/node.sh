#!/usr/bin/env bash
# node.sh kill|crash|stop|start|freeze|thaw|pids NODE...  - break and mend nodes of the cluster of up.sh
#   kill   the machine is gone: slurmd, step daemons and tasks, SIGKILLed with nobody left to report it
#   crash  kill, and tell the controller at once (state=down) instead of letting it find out in 15-20 s
#   stop   only slurmd dies, step daemons and tasks go on        start  slurmd again (after kill or stop)
#   freeze/thaw  SIGSTOP/SIGCONT of everything on the node (a hung machine)
set -u
D=$(readlink -m "${SLURM_TEST_DIR:-${TMPDIR:-/tmp}/slurm-test}"); export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$D/slurm.conf
[ -s "$SLURM_CONF" ] || { echo "no cluster in $D" >&2; exit 1; }
act=${1:-}; shift
pids_of() { # every process of node $1
  local p c q=() e
  if [ -e "$D/run/ns" ]; then [ -s "$D/run/node-$1.pid" ] && q=("$(cat "$D/run/node-$1.pid")")
  else           # slurmd and slurmstepd hold the node's log open (their environ is overwritten: of no use)
    q=($(find /proc/[0-9]*/fd -maxdepth 1 -lname "$D/log/slurmd-$1.log" 2>/dev/null | cut -d/ -f3 | sort -u))
    for e in $(grep -lzx "SLURM_CONF=$D/slurm.conf" /proc/[0-9]*/environ 2>/dev/null); do   # tasks that left the tree
      grep -qzx "SLURMD_NODENAME=$1" "$e" 2>/dev/null && { p=${e#/proc/}; q+=("${p%/environ}"); }
    done
  fi
  while [ ${#q[@]} -gt 0 ]; do
    p=${q[0]}; q=("${q[@]:1}"); echo "$p"
    for c in $(cat /proc/"$p"/task/*/children 2>/dev/null); do q+=("$c"); done
  done | sort -u
}
for n in "$@"; do
  case $act in
    pids) pids_of "$n" ;;
    kill|crash) if [ -e "$D/run/ns" ]; then kill -KILL "$(cat "$D/run/node-$n.pid")" 2>/dev/null   # takes the whole pid namespace
          else pids_of "$n" | xargs -r kill -STOP 2>/dev/null; pids_of "$n" | xargs -r kill -KILL 2>/dev/null; fi
          rm -f "$D/run/slurmd-$n.pid" "$D/run/node-$n.pid"
          [ "$act" = kill ] || scontrol update nodename="$n" state=down reason=crash ;;
    stop) for p in $(pids_of "$n"); do [ "$(cat "/proc/$p/comm" 2>/dev/null)" = slurmd ] && kill -KILL "$p"; done; rm -f "$D/run/slurmd-$n.pid" ;;
    freeze) pids_of "$n" | xargs -r kill -STOP ;;
    thaw) pids_of "$n" | xargs -r kill -CONT ;;
    start) mkdir -p "$D/spool/$n"
      if [ ! -e "$D/run/ns" ]; then slurmd -N "$n"
      elif [ -s "$D/run/node-$n.pid" ] && [ -e "/proc/$(cat "$D/run/node-$n.pid")" ]; then   # the node is up, its slurmd is not
        nsenter --target "$(pids_of "$n" | sort -n | sed -n 2p)" --pid --uts --mount slurmd -N "$n" </dev/null >/dev/null 2>&1
      else # pid 1 of the node is a shell, which reaps; when it or its parent dies, everything on the node dies
        setsid unshare --pid --fork --kill-child --uts --mount --mount-proc bash -c "
          hostname $n; slurmd -N $n; while :; do sleep 1000000 & wait \$!; done" </dev/null >/dev/null 2>&1 &
        echo $! > "$D/run/node-$n.pid"
      fi ;;
    *) sed -n 2,6p "$0" >&2; exit 2 ;;
  esac
done
