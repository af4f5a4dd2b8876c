# shellcheck shell=bash
# What every job here does first: find Python and the data sets, or end with one clear line.
# From the environment of sbatch: VENV (default .venv), DATA (default data), LAUNCHER (default srun).
set -euo pipefail

VENV=${VENV:-.venv}
DATA=${DATA:-data}
PYTHON=$VENV/bin/python
LAUNCHER=${LAUNCHER-srun} # set but empty: no SLURM, training starts in this shell
export PYTHONUNBUFFERED=1
# srun does not take this over from sbatch, and workers that prepare images would share one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}

die() {
    echo "error: $*" >&2
    exit 2
}

one_of() { # GIVEN NAME…: prints the name given if it is one of the others
    local given=$1 name
    shift
    for name in "$@"; do
        [[ $given != "$name" ]] || { echo "$name" && return; }
    done
    die "after the script comes the name of a figure, not '$given'; choose from: $*"
}

need() { # stl10, cifar10
    local data folder name
    for data in "$@"; do
        case $data in
            stl10) folder=stl10_binary name=STL-10 ;;
            cifar10) folder=cifar-10-batches-py name=CIFAR-10 ;;
            *) die "unknown data set '$data'" ;;
        esac
        [[ -d $DATA/$folder ]] || die "no $name in '$DATA': get it where there is a network, with" \
            "$VENV/bin/stepwise download $data --root '$DATA'," \
            "or say where it lies with DATA=FOLDER sbatch …"
    done
}

need_for_full() { # DATA OPTIONS…: the same, unless the options choose other data or another profile
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
    # 75: training got the signal before the time limit, and saved itself. After preemption SLURM requeues by itself.
    if [[ $status == 75 && $job ]]; then
        [[ -z ${SLURM_ARRAY_TASK_ID:-} ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
        echo "training is saved and goes on when job $job runs again"
        scontrol requeue "$job"
    fi
    exit "$status"
}

[[ -x $PYTHON ]] || die "no Python in '$VENV': make it with 'make .venv/.installed'," \
    "or say where it lies with VENV=FOLDER sbatch …"
