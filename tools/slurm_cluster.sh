#!/usr/bin/env bash
# A real SLURM cluster of virtual nodes on one Debian machine, for tests. Root, loopback only, no systemd,
# no cgroups. Each node is a slurmd in its own UTS namespace: own host name (node1, node2, ...), own loopback
# address, own port, and GPUs that are null devices. First start with apt: ten seconds.
#
#   tools/slurm_cluster.sh up         start what is missing
#   tools/slurm_cluster.sh status|down
#   tools/slurm_cluster.sh purge      down, and forget every job
#   tools/slurm_cluster.sh kill-node NODE   every process of the node dies at once, as when power fails;
#                                     SLURM notices after 30 s and requeues. `up` brings the node back.
#
# Partitions: `main` (default) and `high`, whose jobs preempt and requeue those of `main` after 30 s of grace.
# Environment: SLURM_NODES=2 SLURM_NODE_CPUS=4 SLURM_NODE_GPUS=2 SLURM_NODE_MEM=8000 (MB)
# SLURM_DIR=/var/lib/ifvit-slurm
set -euo pipefail
NODES=${SLURM_NODES:-2} CPUS=${SLURM_NODE_CPUS:-4} GPUS=${SLURM_NODE_GPUS:-2} MEM=${SLURM_NODE_MEM:-8000}
DIR=${SLURM_DIR:-/var/lib/ifvit-slurm} CONF=/etc/slurm/slurm.conf MARK='# ifvit slurm_cluster.sh'
. "$(dirname "$0")/daemons.sh"

configure() {
  mkdir -p "$DIR"/{ctld,log,run} /etc/slurm
  chmod 755 "$DIR" "$DIR"/{ctld,log,run}
  # /etc/hosts may be a mount: rewritten in place.
  local n hosts; hosts=$(grep -v -F "$MARK" /etc/hosts || true)
  for ((n = 1; n <= NODES; n++)); do hosts+=$'\n'"127.0.1.$n node$n $MARK"; done
  echo "$hosts" >/etc/hosts
  # Job ids must not start at 1 again after a purge: submitit names its result files by job id.
  [ -s "$DIR/first_job_id" ] || echo $(($(date +%s) / 10 % 60000000)) >"$DIR/first_job_id"
  {
    cat <<CFG
$MARK
ClusterName=ifvit
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it may start again.
AuthInfo=cred_expire=10
SlurmctldPort=16817
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.%n.pid
StateSaveLocation=$DIR/ctld
SlurmdSpoolDir=$DIR/spool.%n
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
FirstJobId=$(cat "$DIR/first_job_id")
# No cgroups and no CPU binding: the CPUs are made up.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=5,batch_sched_delay=0,sched_min_interval=100000
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# A preempted job first gets the signal of its own --signal, then the partition's grace time.
SlurmctldParameters=preempt_send_user_signal
KillWait=5
MinJobAge=86400
SlurmdTimeout=30
MessageTimeout=30
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=16819
GresTypes=gpu
CFG
    for ((n = 1; n <= NODES; n++)); do
      echo "NodeName=node$n NodeHostname=node$n NodeAddr=127.0.1.$n Port=$((16900 + n)) CPUs=$CPUS RealMemory=$MEM Gres=gpu:$GPUS State=UNKNOWN"
    done
    echo "PartitionName=DEFAULT Nodes=ALL State=UP MaxTime=INFINITE DefMemPerCPU=$((MEM / CPUS))"
    echo "PartitionName=main Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30"
    echo "PartitionName=high PriorityTier=100 PreemptMode=OFF"
  } >"$CONF.new"
  CHANGED=; cmp -s "$CONF.new" $CONF || CHANGED=1
  mv "$CONF.new" $CONF
  # SLURM sets CUDA_VISIBLE_DEVICES only for character devices.
  for ((n = 0; n < GPUS; n++)); do [ -c "$DIR/gpu$n" ] || mknod "$DIR/gpu$n" c 1 3; done
  echo "NodeName=node[1-$NODES] Name=gpu File=$DIR/gpu[0-$((GPUS - 1))]" >/etc/slurm/gres.conf
  cat >/etc/slurm/slurmdbd.conf <<CFG
$MARK
AuthType=auth/munge
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=16819
SlurmUser=root
PidFile=$DIR/run/slurmdbd.pid
LogFile=$DIR/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
CFG
  chmod 600 /etc/slurm/slurmdbd.conf
}

start_munge() {
  if munge -n </dev/null | unmunge; then return; fi
  mkdir -p /run/munge; chown munge: /run/munge
  [ -s /etc/munge/munge.key ] || head -c 128 /dev/urandom >/etc/munge/munge.key
  chown munge: /etc/munge/munge.key; chmod 400 /etc/munge/munge.key
  launch runuser -u munge -- munged --force
  wait_for 10 munged sh -c 'munge -n </dev/null | unmunge'
}

# Accounting: submitit asks `sacct` whether a job has ended, and waits for ever where there is none.
start_accounting() {
  local socket=$DIR/mysqld.sock
  if ! alive "$DIR/run/mariadbd.pid" mariadbd; then
    [ -d "$DIR/mysql/mysql" ] || mariadb-install-db --no-defaults --user=root --datadir="$DIR/mysql" \
      --auth-root-authentication-method=normal --skip-test-db --innodb-log-file-size=8M
    launch setsid --fork mariadbd --no-defaults --user=root --datadir="$DIR/mysql" --socket="$socket" --skip-networking \
      --pid-file="$DIR/run/mariadbd.pid" --innodb-buffer-pool-size=32M --innodb-log-file-size=8M \
      --innodb-lock-wait-timeout=900 --innodb-flush-log-at-trx-commit=2 --performance-schema=OFF
    wait_for 60 mariadbd mariadb --no-defaults -uroot -S "$socket" -e 'select 1'
  fi
  if ! alive "$DIR/run/slurmdbd.pid" slurmdbd; then
    # libmariadb takes the socket's path from here: slurmdbd.conf has no word for it.
    MYSQL_UNIX_PORT=$socket launch slurmdbd
    wait_for 60 slurmdbd sacctmgr -n list cluster
  fi
  if [ -z "$(sacctmgr -n -P list cluster ifvit format=cluster)" ]; then
    sacctmgr -i add cluster ifvit
    sacctmgr -i add account ifvit cluster=ifvit
    sacctmgr -i add user root account=ifvit cluster=ifvit
  fi
}

start_node() { # the namespace's id is kept: it names all of the node's processes
  local pidfile=$DIR/run/slurmd.$1.pid
  mkdir -p "$DIR/spool.$1"
  launch unshare --uts sh -c 'hostname "$1" && exec slurmd -N "$1"' - "$1"
  wait_for 10 "slurmd of $1" alive "$pidfile" slurmd
  readlink "/proc/$(cat "$pidfile")/ns/uts" >"$DIR/run/$1.uts"
}

kill_node() {
  local namespace process round; namespace=$(cat "$DIR/run/$1.uts" 2>/dev/null) || return 0
  [ "$namespace" != "$(readlink /proc/$$/ns/uts)" ] || die "$DIR/run/$1.uts names this machine's own namespace"
  for round in 1 2 3; do # a process may fork between the look and the kill
    for process in /proc/[0-9]*; do
      if [ "$(readlink "$process/ns/uts" 2>/dev/null)" = "$namespace" ]; then
        kill -KILL "${process#/proc/}" 2>/dev/null || true
      fi
    done
  done
  rm -f "$DIR/run/$1.uts" "$DIR/run/slurmd.$1.pid"
}

stop_slurm() {
  local file
  stop "$DIR/run/slurmctld.pid" slurmctld
  for file in "$DIR"/run/slurmd.*.pid; do [ ! -e "$file" ] || stop "$file" slurmd; done
}

ready() { # every node is idle, mixed or allocated
  local states; states=$(sinfo -h -N -p main -o '%n %t') || return 1
  [ "$(grep -c -E ' (idle|mix|alloc|comp)$' <<<"$states")" = "$NODES" ]
}

start() {
  local n
  configure; start_munge; start_accounting
  if [ -n "$CHANGED" ]; then stop_slurm; fi
  alive "$DIR/run/slurmctld.pid" slurmctld || launch slurmctld
  wait_for 30 slurmctld scontrol ping
  for ((n = 1; n <= NODES; n++)); do
    alive "$DIR/run/slurmd.node$n.pid" slurmd || start_node "node$n"
  done
  wait_for 60 "the nodes" ready
}

down() {
  local file
  if alive "$DIR/run/slurmctld.pid" slurmctld; then timeout 20 scancel --user=root || true; fi
  stop_slurm
  for file in "$DIR"/run/*.uts; do [ ! -e "$file" ] || { file=${file##*/}; kill_node "${file%.uts}"; }; done
  stop "$DIR/run/slurmdbd.pid" slurmdbd
  stop "$DIR/run/mariadbd.pid" mariadbd
  stop /run/munge/munged.pid munged
  local hosts; hosts=$(grep -v -F "$MARK" /etc/hosts || true); echo "$hosts" >/etc/hosts
}

status() {
  local daemon rc=0
  for daemon in slurmctld slurmdbd mariadbd; do
    alive "$DIR/run/$daemon.pid" $daemon || { say "$daemon does not run"; rc=1; }
  done
  [ $rc = 0 ] && timeout 20 sinfo -N -o '%N %t %c %m %G %P' && timeout 20 squeue && ready
}

only_one
case ${1:-} in
  up)
    install munge:munged slurmctld:slurmctld slurmd:slurmd slurm-client:sbatch \
      slurmdbd:slurmdbd mariadb-server-core:mariadbd mariadb-client-core:mariadb
    mkdir -p "$DIR/log"
    trap '[ $? = 0 ] || say "failed; logs are in $DIR/log"' EXIT
    { start; } >>"$DIR/log/up.log" 2>&1 ;;
  status) status ;;
  down) down ;;
  purge) down; rm -rf "$DIR" ;;
  kill-node) kill_node "${2:?node}" ;;
  *) die "usage: $0 up|status|down|purge|kill-node NODE" ;;
esac
