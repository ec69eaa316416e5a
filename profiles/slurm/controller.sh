#!/bin/bash
# Run snakemake as a SLURM job, where login nodes end long processes. From the root of the clone:
#
#   sbatch profiles/slurm/controller.sh --configfile my.yaml
#
# Its arguments are those of `snakemake --profile slurm`. Five minutes before its time limit it submits the next such
# job, and ends. That one goes on: trainings run meanwhile, and are waited for; other jobs are done again. Give sbatch your
# site's options, such as --partition and --account; the next job has the same partition and account. It has what you give
# as variables, too: SBATCH_QOS=long sbatch profiles/slurm/controller.sh ...
#SBATCH --job-name=lorasweep-controller
#SBATCH --output=lorasweep-controller-%j.log
#SBATCH --time=1-00:00:00
#SBATCH --cpus-per-task=1
#SBATCH --mem=4000
#SBATCH --signal=B:USR1@300
set -u
cd "$SLURM_SUBMIT_DIR"
job=$SLURM_JOB_ID
options=(--job-name="$SLURM_JOB_NAME" --partition="$SLURM_JOB_PARTITION" ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"})
limit=$(squeue --noheader --jobs="$job" --format=%l)
. .venv/driver/bin/activate

is_next_queued() {
    squeue --me --noheader --states=PENDING --format=%E | grep --quiet --word-regexp "afterany:$job"
}
go_on() {
    # SLURM may refuse it for a while, at a limit on the number of jobs, or lose the answer. The sweep goes on meanwhile.
    until is_next_queued || sbatch --export=ALL,LORASWEEP_GOES_ON=1 --dependency="afterany:$job" --time="$limit" \
        "${options[@]}" profiles/slurm/controller.sh "${arguments[@]}"; do
        sleep 6
    done
    # `kill -9`, so that no job is cancelled. The next snakemake finds them by the record of this one.
    [ -z "$snakemake" ] || kill -9 "$snakemake"
    exit 0
}
arguments=("$@")
snakemake=
trap go_on USR1 # at once, since the signal ends a job that has no trap

if [ -n "${LORASWEEP_GOES_ON:-}" ]; then # the job before this one has ended, and runs the sweep no more
    snakemake --profile slurm "$@" --unlock
fi
snakemake --profile slurm "$@" &
snakemake=$!
wait "$snakemake"
