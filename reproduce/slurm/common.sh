# shellcheck shell=bash
# Shared by all job scripts: find Python and the data sets, or exit with a one-line error.
# Environment variables: VENV (default .venv), DATA (default data), LAUNCHER (default srun).
set -euo pipefail

VENV=${VENV:-.venv}
DATA=${DATA:-data}
PYTHON=$VENV/bin/python
LAUNCHER=${LAUNCHER-srun} # empty: start training in this shell, without SLURM
export PYTHONUNBUFFERED=1
# srun does not inherit this from sbatch; without it all data loader workers share one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

die() {
    echo "error: $*" >&2
    exit 2
}

one_of() { # CHOICE NAME…: prints CHOICE if it is one of the names
    local choice=$1 name
    shift
    for name in "$@"; do
        [[ $choice != "$name" ]] || { echo "$name" && return; }
    done
    die "invalid figure '$choice'; choose from: $*"
}

need() { # stl10, cifar10
    local data folder name
    for data in "$@"; do
        case $data in
            stl10) folder=stl10_binary name=STL-10 ;;
            cifar10) folder=cifar-10-batches-py name=CIFAR-10 ;;
            *) die "unknown data set '$data'" ;;
        esac
        [[ -d $DATA/$folder ]] || die "no $name in '$DATA': download it on a machine with network access, with" \
            "$VENV/bin/stepwise download $data --root '$DATA'," \
            "or name its folder with DATA=FOLDER sbatch …"
    done
}

need_for_full() { # DATA OPTIONS…: requires DATA unless the options choose other data or another profile
    local data=$1 option
    shift
    for option in "$@"; do
        case $option in
            --data | --data=* | --profile | --profile=*) return ;;
        esac
    done
    need "$data"
}

run() {
    local status=0 job=${SLURM_JOB_ID:-}
    echo "$(date '+%F %T') $(hostname) job ${job:-none}, restart ${SLURM_RESTART_COUNT:-0}: $*"
    "$@" || status=$?
    # 75: training received the signal before the time limit and saved a checkpoint. SLURM requeues preempted jobs.
    if [[ $status == 75 && $job ]]; then
        [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
        echo "training saved a checkpoint and continues when job $job runs again"
        scontrol requeue "$job"
    fi
    exit "$status"
}

[[ -x $PYTHON ]] || die "no Python in '$VENV': create it with 'make .venv/.installed'," \
    "or name its folder with VENV=FOLDER sbatch …"
