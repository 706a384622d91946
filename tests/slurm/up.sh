#!/usr/bin/env bash
# up.sh - bring up a real, private Slurm cluster on this one machine. Idempotent.
#   out=$(./up.sh) && eval "$out"     # stdout: export lines only; progress goes to stderr
# Knobs (environment):
#   SLURM_TEST_DIR  (default ${TMPDIR:-/tmp}/slurm-test)   everything lives here
#   SLURM_TEST_NODES=8  SLURM_TEST_CPUS=8  SLURM_TEST_MEM=16000  SLURM_TEST_GPUS=4   per node, all fictive
#   SLURM_TEST_PREFIX=sn     node names sn1..snN
#   SLURM_TEST_PORT=16800    first of the ports used (+0 ctld, +1 dbd, +2 mariadb, +11.. slurmd)
#   SLURM_TEST_ACCT=dbd|none slurmdbd+MariaDB (sacct works) or nothing
#   SLURM_TEST_ARRAY=8       most elements of a job array
#   SLURM_TEST_JOBS=10000    most jobs that slurmctld keeps
#   SLURM_TEST_CLOUD=0       nodes without slurmd in a partition "cloud": a job gets some, and never begins
#   SLURM_TEST_NS=auto|yes|no  each node in its own pid+uts+mount namespace (real hostnames, atomic crash)
set -euo pipefail
D=$(readlink -m "${SLURM_TEST_DIR:-${TMPDIR:-/tmp}/slurm-test}")
N=${SLURM_TEST_NODES:-8} CPUS=${SLURM_TEST_CPUS:-8} MEM=${SLURM_TEST_MEM:-16000} GPUS=${SLURM_TEST_GPUS:-4}
P=${SLURM_TEST_PREFIX:-sn} PORT=${SLURM_TEST_PORT:-16800} ACCT=${SLURM_TEST_ACCT:-dbd}
NS=${SLURM_TEST_NS:-auto} ARRAY=${SLURM_TEST_ARRAY:-8} JOBS=${SLURM_TEST_JOBS:-10000} CLOUD=${SLURM_TEST_CLOUD:-0}
HERE=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
export PATH=$PATH:/usr/sbin:/sbin DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
say() { printf '[slurm-up %5.1fs] %s\n' "$(echo "$(date +%s.%N) $T0" | awk '{print $1-$2}')" "$*" >&2; }
T0=$(date +%s.%N)
die() { say "FAILED: $*"; tail -n 15 "$D"/log/*.log >&2 2>/dev/null || true; exit 1; }
alive() { [ -s "$1" ] && grep -qs '^State:[[:space:]]*[^ZX[:space:]]' "/proc/$(cat "$1")/status"; }   # not a zombie
waitfor() { # waitfor SECONDS WHAT CMD...
  local end=$(( $(date +%s) + $1 )) what=$2; shift 2
  until "$@" >"$D/log/wait.out" 2>&1; do
    [ "$(date +%s)" -lt $end ] || die "timeout waiting for $what: $(tail -n 3 "$D/log/wait.out")"; sleep 0.1
  done
}
exports() {
  echo "export SLURM_CONF=$D/slurm.conf"
  echo "export SLURM_TEST_DIR=$D"
}
[ ${#D} -le 60 ] || { echo "$D: too long for the unix sockets in it" >&2; exit 1; }
mkdir -p "$D"; chmod 755 "$D"
exec 9>"$D/.lock"; flock 9                       # two callers: the second waits, then finds it up

# ---- 1. packages --------------------------------------------------------------------------------
exec 8<"$HERE"; flock 8                          # of several clusters that come up at once, one installs
need=()
command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v sbatch >/dev/null || need+=(slurm-wlm)
command -v munged >/dev/null || need+=(munge)
if [ "$ACCT" = dbd ]; then
  command -v slurmdbd >/dev/null || need+=(slurmdbd)
  command -v mariadbd >/dev/null && command -v mariadb-install-db >/dev/null || need+=(mariadb-server-core)
  command -v my_print_defaults >/dev/null || need+=(mariadb-client-core)
fi
if [ ${#need[@]} -gt 0 ]; then
  say "installing ${need[*]}"
  tmp_policy=
  if [ ! -e /usr/sbin/policy-rc.d ]; then        # keep the packages from starting their own daemons
    printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d; tmp_policy=1
  fi
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${need[@]}"; } > "$D/apt.log" 2>&1 9>&- \
    || { cat "$D/apt.log" >&2; die apt-get; }
  [ -z "$tmp_policy" ] || rm -f /usr/sbin/policy-rc.d
  say "installed"
fi
exec 8<&-

# ---- 2. already up? -----------------------------------------------------------------------------
export SLURM_CONF=$D/slurm.conf
unset ${!SLURM_JOB@} ${!SLURM_STEP@} 2>/dev/null || true
all_idle() { [ "$(sinfo -h -N -o '%N %T' 2>/dev/null | sort -u | grep -cE ' (idle|mixed|allocated|completing)$')" = "$N" ]; }
up=1
alive "$D/run/munged.pid" && alive "$D/run/slurmctld.pid" || up=0
[ "$ACCT" != dbd ] || { alive "$D/run/mariadbd.pid" && alive "$D/run/slurmdbd.pid"; } || up=0
for i in $(seq "$N"); do
  if [ -e "$D/run/ns" ]; then alive "$D/run/node-$P$i.pid" || up=0; else alive "$D/run/slurmd-$P$i.pid" || up=0; fi
done
if [ $up = 1 ] && all_idle; then say "already up"; exports; exit 0; fi
[ ! -e "$D/slurm.conf" ] || SLURM_TEST_DIR=$D bash "$HERE/down.sh" 9>&- >&2   # half up: start over

# ---- 3. files -----------------------------------------------------------------------------------
rm -rf "$D"/{state,spool,log,run,gpu}
mkdir -p "$D"/{state,spool,log,run,gpu,munge}; chmod 755 "$D"/*/
HOST=$(hostname -s)
if [ "$NS" = auto ]; then
  unshare --pid --fork --uts --mount --mount-proc true 2>/dev/null && NS=yes || NS=no
fi
for i in $(seq "$N"); do                       # node names must resolve: MASTER_ADDR is the first one
  grep -qE "^[0-9.]+[[:space:]]+$P$i\$" /etc/hosts || echo "127.0.20.$i $P$i" >> /etc/hosts || say "cannot write /etc/hosts: $P$i will not resolve"
done
# without this file slurmd 22.05 wants /sys/fs/cgroup mounted even when no plugin uses it
printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' > "$D/cgroup.conf"
gres_node="" gres_types=""
: > "$D/gres.conf"
if [ "$GPUS" -gt 0 ]; then
  for g in $(seq 0 $((GPUS-1))); do ln -sfn /dev/null "$D/gpu/nvidia$g"; done
  echo "NodeName=$P[1-$N] Name=gpu Type=fake File=$D/gpu/nvidia[0-$((GPUS-1))]" > "$D/gres.conf"
  gres_types="GresTypes=gpu" gres_node="Gres=gpu:fake:$GPUS"
fi
if [ "$ACCT" = dbd ]; then
  acct="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageEnforce=limits
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT+1))
AccountingStoragePass=$D/run/munge.socket
AccountingStorageTRES=gres/gpu
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill"
  [ "$GPUS" -gt 0 ] || acct=${acct/AccountingStorageTRES=gres\/gpu/}
else
  acct="AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none"
fi
cloud=""
if [ "$CLOUD" -gt 0 ]; then
  cloud="SuspendProgram=/bin/true
ResumeProgram=/bin/true
ResumeTimeout=3600
ResumeRate=0
SuspendTime=86400
TreeWidth=65533
NodeName=cloud[1-$CLOUD] CPUs=$CPUS RealMemory=$MEM State=CLOUD
PartitionName=cloud Nodes=cloud[1-$CLOUD] MaxTime=INFINITE State=UP"
fi
cat > "$D/slurm.conf" <<CONF
ClusterName=testcluster
SlurmctldHost=$HOST(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
# cred_expire: a requeued job waits this long before it may start again (default 120 s)
AuthInfo=socket=$D/run/munge.socket,cred_expire=5
StateSaveLocation=$D/state
MailProg=/bin/true
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/run/slurmctld.pid
SlurmdPidFile=$D/run/slurmd-%n.pid
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/slurmd-%n.log
# no cgroups, no MPI, no topology
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1500
MaxArraySize=$ARRAY
MaxJobCount=$JOBS
# quick reactions
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,bf_resolution=1
SlurmctldTimeout=10
SlurmdTimeout=6
# MessageTimeout: longer than KillWait, for which a node may answer nothing while it kills a step. slurmctld would send that
# kill again a minute later, and hit the requeued job's next step (elsewhere cred_expire, 120 s, keeps that from starting)
MessageTimeout=10
KillWait=5
UnkillableStepTimeout=20
CompleteWait=0
MinJobAge=600
ReturnToService=2
JobRequeue=1
# job ids never start at 1 again: a rebuilt cluster must not reuse ids whose results lie in some folder
# and clusters side by side must have others, too: the port at which a job's processes meet is made of its id
FirstJobId=$(( $(date +%s) / 10 % 60000000 + 1000 + PORT / 20 % 4 * 199 ))
# partition "high" preempts "low" (requeue) and "lowcancel" (cancel); the user's --signal is sent at preemption
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
$acct
$gres_types
NodeName=$P[1-$N] NodeHostname=$HOST NodeAddr=127.0.20.[1-$N] Port=$((PORT+11))-$((PORT+10+N)) CPUs=$CPUS Boards=1 SocketsPerBoard=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEM $gres_node State=UNKNOWN
PartitionName=main Nodes=$P[1-$N] Default=YES MaxTime=INFINITE PriorityTier=5 PreemptMode=OFF State=UP
PartitionName=low  Nodes=$P[1-$N] MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=5 State=UP
PartitionName=lowcancel Nodes=$P[1-$N] MaxTime=INFINITE PriorityTier=1 PreemptMode=CANCEL GraceTime=5 State=UP
PartitionName=high Nodes=$P[1-$N] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
$cloud
CONF
sed 's/^MessageTimeout=.*/MessageTimeout=2/' "$D/slurm.conf" > "$D/hasty.conf"   # for commands while slurmctld is away

# ---- 4. daemons (fd 9 closed, so that the lock is not inherited) ----------------------------------
if [ ! -s "$D/munge/munge.key" ]; then (umask 077; head -c 1024 /dev/urandom > "$D/munge/munge.key"); fi
munged --key-file="$D/munge/munge.key" --socket="$D/run/munge.socket" --pid-file="$D/run/munged.pid" \
  --log-file="$D/log/munged.log" --seed-file="$D/munge/munge.seed" --num-threads=4 9>&- >&2 || die munged

if [ "$ACCT" = dbd ]; then
  if [ ! -d "$D/mysql/mysql" ]; then
    rm -rf "$D/mysql"
    mariadb-install-db --no-defaults --datadir="$D/mysql" --user=$(id -un) --auth-root-authentication-method=normal \
      --skip-test-db --skip-name-resolve > "$D/log/mariadb-install.log" 2>&1 9>&- || die mariadb-install-db
    say "database directory made"
  fi
  cat > "$D/mysql-init.sql" <<SQL
DROP DATABASE IF EXISTS slurm_acct_db;
CREATE DATABASE slurm_acct_db;
CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';
SQL
  setsid mariadbd --no-defaults --user=$(id -un) --datadir="$D/mysql" --bind-address=127.0.0.1 --port=$((PORT+2)) \
    --socket="$D/run/mariadb.sock" --pid-file="$D/run/mariadbd.pid" --log-error="$D/log/mariadbd.log" \
    --init-file="$D/mysql-init.sql" --skip-name-resolve --innodb-buffer-pool-size=64M \
    --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=0 --skip-log-bin \
    </dev/null >/dev/null 2>&1 9>&- &
  waitfor 60 mariadbd bash -c "exec 3<>/dev/tcp/127.0.0.1/$((PORT+2))"
  (umask 077; cat > "$D/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$D/run/munge.socket
DbdHost=$HOST
DbdAddr=127.0.0.1
DbdPort=$((PORT+1))
SlurmUser=$(id -un)
LogFile=$D/log/slurmdbd.log
PidFile=$D/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((PORT+2))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CommitDelay=0
CONF
  )
  # slurmdbd looks for slurmdbd.conf beside $SLURM_CONF
  slurmdbd 9>&- >&2 || die slurmdbd
  waitfor 20 slurmdbd sacctmgr -n -i list cluster
  say "accounting up"
fi

slurmctld -c 9>&- >&2 || die slurmctld
waitfor 30 slurmctld scontrol ping
# limits are enforced: whoever calls this with sudo has an account, too
[ "$ACCT" != dbd ] || [ -z "${SUDO_USER:-}" ] || sacctmgr -Q -i add user "$SUDO_USER" account=root >&2 || die sacctmgr
[ "$NS" != yes ] || : > "$D/run/ns"
SLURM_TEST_DIR=$D bash "$HERE/node.sh" start $(seq -f "$P%g" "$N") 9>&- >&2 || die slurmd
waitfor 60 "$N idle nodes" all_idle
say "ready: $N nodes, accounting=$ACCT, namespaces=$NS"
exports
