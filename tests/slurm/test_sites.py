"""Sites of all kinds, row by row of docs/how-to/slurm.md: what a site asks for is done, or told before any job."""

import signal
from collections.abc import Callable

import psutil
import pytest

from cluster import Cluster
from slurm_sweep import ALIVE, TRAINING_ONLY, SlurmSweep, check_undisturbed, read_accounting, stumble, wait_for


def long(*values: object) -> object:
    """Values of a case that `make test` leaves out."""
    return pytest.param(*values, marks=pytest.mark.long)


def request(*rules: str, **resources: object) -> list[str]:
    return ["--set-resources", *(f"{rule}:{name}={value}" for rule in rules for name, value in resources.items())]


@pytest.mark.long
@pytest.mark.parametrize(
    ("site", "resources", "gpus"),
    [
        ("one_by_gres", {"gres": "gpu:1", "gpu": 0, "slurm_partition": "gpu"}, 1),
        ("typed", {"gres": "gpu:fake:1", "gpu": 0, "slurm_partition": "gpu"}, 1),
        ("several", {"gres": "gpu:fake:2", "gpu": 0, "slurm_partition": "odd"}, 2),
        ("by_model", {"gpu_model": "fake", "gpu": 2, "slurm_partition": "odd"}, 2),
    ],
)
def test_gpus_are_those_of_the_step_that_trains(
    make: Callable[..., SlurmSweep], own_cluster: Cluster, site: str, resources: dict[str, object], gpus: int
) -> None:
    sweep = make(site, variables={"seed": [0]})
    sweep.edit(evaluation=TRAINING_ONLY)
    run = sweep.start(*request("train", **resources))
    assert sweep.wait(run) == 0, sweep.said[-6000:]
    check_undisturbed(sweep)
    [[allocated]] = read_accounting(sweep, "AllocTRES", steps=True)
    assert f"gres/gpu={gpus}" in allocated.split(",")


@pytest.mark.long  # the next test says so of what a partition never takes
@pytest.mark.parametrize(
    ("site", "resources"),
    [
        ("whole", {"slurm_partition": "whole"}),
        ("exclusive", {"slurm_partition": "odd", "slurm_extra": "'--exclusive'"}),
        ("several_partitions", {"slurm_partition": "odd,main"}),
        # Only one of its nodes has the memory.
        ("unlike_nodes", {"slurm_partition": "odd", "mem_mb": 9000}),
    ],
)
def test_a_partition_is_right(
    make: Callable[..., SlurmSweep], own_cluster: Cluster, site: str, resources: dict[str, object]
) -> None:
    sweep = make(site, variables={"seed": [0], "mode": ["B1"]})
    sweep.edit(evaluation={"baseline": False})
    run = sweep.start(*request("train", "merge", "evaluate", **resources))
    assert sweep.wait(run) == 0, sweep.said[-6000:]
    check_undisturbed(sweep)
    if site in ("whole", "exclusive"):
        # All cores of a node.
        assert {cpus for [cpus] in read_accounting(sweep, "AllocCPUS")} <= {"2", "4"}


@pytest.mark.parametrize(
    ("site", "resources", "words"),
    [
        ("time", {"slurm_partition": "short"}, "time limit"),
        ("memory", {"mem_mb": 99000}, "Requested node configuration is not available"),
        ("more_gpus", {"gpu": 3}, "Requested node configuration is not available"),
        long("unknown_gpu", {"gres": "gpu:a100:1", "gpu": 0}, "Requested node configuration is not available"),
        long("quotes", {"gres": "'\"gpu:fake:1\"'", "gpu": 0}, "GRES format should not be a nested string"),
        ("account", {"slurm_account": "nobody"}, "nobody"),
        long("qos", {"qos": "golden"}, "Invalid qos specification"),
    ],
)
def test_what_a_site_never_takes_is_told_before_the_first_job(
    make: Callable[..., SlurmSweep], own_cluster: Cluster, site: str, resources: dict[str, object], words: str
) -> None:
    sweep = make(site, variables={"seed": [0]})
    sweep.edit(evaluation=TRAINING_ONLY)
    done = sweep.snakemake("--retries", "0", *request("train", **resources))
    said = done.stdout + done.stderr
    assert done.returncode == 1, said[-4000:]
    assert words in said, said[-4000:]
    assert "Traceback" not in said
    assert ", as SLURM job " not in said
    assert not [*sweep.results.glob("trainings/*/recipe.yaml")]


def test_other_gpus_than_a_job_uses_are_refused(make: Callable[..., SlurmSweep], own_cluster: Cluster) -> None:
    sweep = make("other_gpus", variables={"seed": [0]})
    sweep.edit(evaluation=TRAINING_ONLY, model={"device": "cuda"}, controls={"gpus": 2})
    resources = request("train", gres="gpu:fake:1", gpu=0, slurm_partition="odd")
    done = sweep.snakemake("--retries", "0", *resources)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said[-4000:]
    assert "train: its jobs use 2 GPUs and request 1. Expected: gpu=2, or 2 as the number in gres" in said, said[-4000:]


@pytest.mark.long  # test_gpus_are_those_of_the_step says so of other resources
def test_memory_is_asked_for_by_core_where_a_site_wants_it(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("by_core", variables={"seed": [0]})
    sweep.edit(evaluation=TRAINING_ONLY)
    refusal = 'echo "sbatch: error: Use --mem-per-cpu instead of --mem." >&2; exit 1'
    stumble(sweep, "sbatch", f'case "$*" in *"--mem "*) {refusal};; esac\nexec "$real" "$@"')
    done = sweep.snakemake("--retries", "0")
    assert done.returncode == 1
    assert "Use --mem-per-cpu instead of --mem." in done.stdout + done.stderr
    sweep.edit(slurm={"mem_per_cpu": True})
    run = sweep.start("--set-threads", "train=3", "--set-resources", "train:mem_mb=3000")
    assert sweep.wait(run) == 0, sweep.said[-6000:]
    check_undisturbed(sweep)


@pytest.mark.long  # test_stumbles shows other reasons
def test_a_limit_on_running_gpus_is_waited_for_and_shown(make: Callable[..., SlurmSweep], own_cluster: Cluster) -> None:
    sweep = make("one_gpu", variables={"seed": [0, 1]})
    sweep.edit(evaluation=TRAINING_ONLY)
    sweep.hold.touch()
    run = sweep.start(*request("train", slurm_account="one_gpu", gpu=1, slurm_partition="gpu"))
    sweep.wait_for("the reason", lambda: "waiting: AssocGrpGRES" in sweep.call("status"))
    sweep.hold.unlink()
    assert sweep.wait(run) == 0, sweep.said[-6000:]
    check_undisturbed(sweep)


@pytest.mark.long  # tests/unit says so of the submission
def test_a_limit_on_submitted_jobs_is_waited_for(make: Callable[..., SlurmSweep], own_cluster: Cluster) -> None:
    sweep = make("one_job", variables={"seed": [0, 1, 2]})
    sweep.edit(evaluation=TRAINING_ONLY)
    run = sweep.start(*request("train", slurm_account="one_job"))
    assert sweep.wait(run) == 0, sweep.said[-6000:]
    assert "AssocGrpSubmitJobsLimit" in sweep.said
    check_undisturbed(sweep)


@pytest.mark.long  # tests/unit says so of the submission
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_ends_at_a_limit_submits_no_more_jobs(
    make: Callable[..., SlurmSweep], own_cluster: Cluster, number: signal.Signals
) -> None:
    sweep = make(f"over_{number.name}", variables={"seed": [0, 1, 2, 3]})
    sweep.edit(evaluation=TRAINING_ONLY)
    sweep.hold.touch()
    arguments = request("train", slurm_account="one_job")
    run = sweep.start(*arguments)
    sweep.wait_for("the limit", lambda: "SLURM has taken no further job since" in sweep.said)
    assert list_submitting(sweep)
    run.send_signal(number)
    run.wait()
    assert number == signal.SIGKILL or "0 of 4 points done, 0 failed, 4 not finished" in sweep.said
    wait_for("the end of its submissions", lambda: not list_submitting(sweep))
    sweep.hold.unlink()
    wait_for("the end of its job", lambda: not sweep.list_jobs(ALIVE))
    assert len(read_accounting(sweep, "State")) == 1
    assert sweep.wait(sweep.start(*arguments)) == 0, sweep.said[-6000:]
    assert sweep.plan() == {}


def list_submitting(sweep: SlurmSweep) -> list[int]:
    """Return the processes that submit a sweep's jobs."""
    commands = {process.pid: process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])}
    return [
        process
        for process, command in commands.items()
        if "sbatch" in command and any(part.startswith(sweep.job_name) for part in command)
    ]


@pytest.mark.alone
@pytest.mark.long  # tests/unit says so of the query
def test_jobs_that_slurm_forgets_at_once_are_done(make: Callable[..., SlurmSweep], own_cluster: Cluster) -> None:
    sweep = make("forgetful", variables={"seed": [0, 1]})
    sweep.edit(evaluation=TRAINING_ONLY)
    stumble(sweep, "sacct", 'echo "Slurm accounting storage is disabled" >&2; exit 1')
    with own_cluster.configure("MinJobAge", "2"):
        assert sweep.wait(sweep.start()) == 0, sweep.said[-6000:]
    check_undisturbed(sweep)


def test_job_arrays_are_refused_before_the_first_job(make: Callable[..., SlurmSweep]) -> None:
    sweep = make("arrays", variables={"seed": [0]})
    sweep.edit(evaluation=TRAINING_ONLY)
    done = sweep.snakemake("--retries", "0", "--slurm-array-jobs", "train")
    said = done.stdout + done.stderr
    assert done.returncode == 1, said[-4000:]
    assert "--slurm-array-jobs: SLURM would give all jobs of an array what the first one requests" in said
    assert not [*sweep.results.glob("trainings/*/recipe.yaml")]


@pytest.mark.long  # test_failures says so of this one
def test_a_new_start_on_another_login_node_waits_for_what_runs(
    make: Callable[..., SlurmSweep], own_cluster: Cluster
) -> None:
    sweep = make("login", variables={"seed": [0, 1]})
    sweep.edit(evaluation=TRAINING_ONLY)
    sweep.hold.touch()
    sweep.login_node = "login1"
    first = sweep.start()
    running = sweep.wait_for("its jobs", lambda: len(jobs := sweep.list_jobs()) == 2 and jobs)
    first.kill()
    first.wait()
    sweep.login_node = "login2"
    assert sweep.wait(sweep.start()) == 1
    assert "--unlock" in sweep.said
    assert sweep.wait(sweep.start("--unlock")) == 0, sweep.said[-4000:]
    second = sweep.start()
    sweep.wait_for("its word", lambda: "still runs: the same training" in sweep.said)
    sweep.hold.unlink()
    assert sweep.wait(second) == 0, sweep.said[-6000:]
    assert {state for [state] in read_accounting(sweep, "State")} == {"COMPLETED"}
    assert sweep.plan() == {}
    assert set(running) <= set(sweep.list_jobs("all"))
