#!/usr/bin/env bash
# down.sh [--purge] - stop the cluster of up.sh, by pid file only; --purge also deletes its folder.
set -u
D=$(readlink -m "${SLURM_TEST_DIR:-${TMPDIR:-/tmp}/slurm-test}")
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$D/slurm.conf
[ -d "$D" ] || exit 0
stop() { # stop SECONDS PIDFILE... : TERM to all of them, wait together, KILL what is left
  local end=$(( $(date +%s) + $1 )) f p pids=(); shift
  for f in "$@"; do
    mine "$f" && p=$(cat "$f") && kill -TERM "$p" 2>/dev/null && pids+=("$p")
    rm -f "$f"
  done
  [ ${#pids[@]} -gt 0 ] || return 0
  while alive_any "${pids[@]}"; do
    [ "$(date +%s)" -lt $end ] || { kill -KILL "${pids[@]}" 2>/dev/null; break; }
    sleep 0.05
  done
}
# is the pid in FILE still the program that FILE is named for? (pids are used again)
mine() {
  local b=${1##*/} p; [ -s "$1" ] && p=$(cat "$1") && [[ $p =~ ^[0-9]+$ ]] || return 1
  b=${b%.pid}; b=${b%%-*}; [ "$b" = node ] && b=unshare
  [ "$(cat "/proc/$p/comm" 2>/dev/null)" = "$b" ]
}
# a zombie is gone: where pid 1 is slow to reap (or never does), kill -0 alone would wait for nothing
alive_any() { local p; for p in "$@"; do grep -qs '^State:[[:space:]]*[^ZX[:space:]]' "/proc/$p/status" && return 0; done; return 1; }
# 1. jobs first, so that the steps end by themselves
if [ -s "$D/run/slurmctld.pid" ] && alive_any "$(cat "$D/run/slurmctld.pid")"; then
  timeout 5 squeue -h -o %A 2>/dev/null | sort -u | timeout 5 xargs -r scancel -f 2>/dev/null
  for _ in $(seq 30); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.1; done
fi
# 2. controller (first: else it waits for nodes that are gone), nodes, accounting, authentication
stop 10 "$D/run/slurmctld.pid"
if [ -e "$D/run/ns" ]; then                  # pid files of slurmd hold pids of their own namespace: not ours to use
  for f in "$D"/run/node-*.pid; do mine "$f" && kill -KILL "$(cat "$f")" 2>/dev/null; done
  rm -f "$D"/run/node-*.pid "$D"/run/slurmd-*.pid "$D/run/ns"
else
  stop 5 "$D"/run/slurmd-*.pid
fi
stop 2 "$D/run/slurmdbd.pid"                 # it dawdles on TERM; every record is already in the database
stop 20 "$D/run/mariadbd.pid"
stop 5 "$D/run/munged.pid"
# 3. step daemons and tasks that outlived their node: recognised by the log they hold open or by their environment
{ find /proc/[0-9]*/fd -maxdepth 1 -lname "$D/log/slurmd-*.log" 2>/dev/null
  for e in $(grep -lzx "SLURM_CONF=$D/slurm.conf" /proc/[0-9]*/environ 2>/dev/null); do
    grep -qz '^SLURMD_NODENAME=' "$e" 2>/dev/null && echo "$e"
  done; } | cut -d/ -f3 | grep -vx $$ | sort -u | xargs -r kill -KILL 2>/dev/null
[ "${1:-}" = --purge ] && rm -rf "$D"
exit 0
