#!/bin/bash
# A private Slurm of two nodes on this machine, for the tests: own keys, ports and folders, nothing outside FOLDER.
#     cluster.sh start FOLDER    prints the line to source: export SLURM_CONF=…
#     cluster.sh stop FOLDER
# Needs root and Debian's slurm-wlm and munge (22.05 and newer).
set -eu
dir=$2

running() { [ -e "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }

stop() {
    for pid in "$dir"/slurmd-*.pid "$dir/slurmctld.pid" "$dir/munged.pid"; do
        if running "$pid"; then kill "$(cat "$pid")" || true; fi
    done
    for _ in $(seq 50); do
        left=
        for pid in "$dir"/slurmd-*.pid "$dir/slurmctld.pid" "$dir/munged.pid"; do
            if running "$pid"; then left=1; fi
        done
        [ -z "$left" ] && return 0
        sleep 0.2
    done
    echo "some daemons under $dir did not end" >&2
    return 1
}

start() {
    for program in munged slurmctld slurmd sbatch srun; do
        if ! command -v $program > /dev/null; then
            echo "no $program: apt-get install slurm-wlm munge" >&2
            exit 77
        fi
    done
    mkdir -p "$dir/state"
    chmod 700 "$dir"
    dir=$(cd "$dir" && pwd)
    head -c 128 /dev/urandom > "$dir/munge.key"
    chmod 400 "$dir/munge.key"
    # The socket is for everybody who may read the folder's name; the key is not.
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munge.seed"
    host=$(hostname)
    port=$((20000 + RANDOM % 20000))
    cores=$(nproc)
    # cred_expire is how long a requeued job is held: two minutes otherwise. The sched parameters make the scheduler look often.
    cat > "$dir/slurm.conf" <<END
ClusterName=private
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=15
CredType=cred/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=1
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=10
MailProg=/bin/true
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=$cores
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.2 Port=$((port + 2)) CPUs=$cores
PartitionName=test Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
END
    export SLURM_CONF=$dir/slurm.conf
    slurmctld
    for node in n1 n2; do
        slurmd -N $node || echo "no second slurmd on this machine" >&2
    done
    for _ in $(seq 100); do
        if [ "$(sinfo --noheader --format=%t 2> /dev/null | sort -u)" = idle ]; then
            echo "export SLURM_CONF=$dir/slurm.conf"
            return 0
        fi
        sleep 0.3
    done
    echo "the nodes did not become idle; see $dir/*.log" >&2
    sinfo >&2 || true
    stop || true
    exit 1
}

case $1 in
    start) start ;;
    stop) stop ;;
    *) echo "usage: cluster.sh start|stop FOLDER" >&2; exit 2 ;;
esac
