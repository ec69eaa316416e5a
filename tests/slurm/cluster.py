"""A real SLURM of ten small nodes on one machine, for the tests and to play with.

    python tests/slurm/cluster.py install             # Debian's packages, once
    python tests/slurm/cluster.py start DIR           # does nothing when it runs already
    python tests/slurm/cluster.py status DIR
    python tests/slurm/cluster.py kill DIR n2         # as if n2 lost its power
    python tests/slurm/cluster.py revive DIR n2
    python tests/slurm/cluster.py stop DIR
    python tests/slurm/cluster.py guard DIR           # for tests: stops and removes it when its standard input ends

Confs, logs, sockets and the accounting database lie below DIR; README.md lists what lies elsewhere.
Exit status: 0 done, 1 failed or not running, 3 cannot be had on this machine.
"""

import argparse
import contextlib
import fcntl
import getpass
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

MAIN_NODES = ("n1", "n2", "n3", "n4")
APART_NODES = ("n5", "n6", "n7", "n8")  # may be killed or filled while others use the rest
ODD_NODES = ("n9", "n10")  # as sites have them: nodes that differ, in partitions with rules of their own
NODES = MAIN_NODES + APART_NODES + ODD_NODES
GPUS = {"n3": 1, "n4": 1, "n9": 2}
GPU_NODES = ("n3", "n4")
CPUS = 4
MEMORY_MB = 16384
SMALL = {"n10": "CPUs=2 RealMemory=6000"}

ACCOUNTS = {
    "free": "",
    "one_gpu": "GrpTRES=gres/gpu=1",
    "one_job": "GrpSubmitJobs=1",
}
"""Accounts of the user that runs the tests, and their limits. The first is the default."""

PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client", "slurmdbd", "mariadb-server-core", "mariadb-client-core")
PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "sbatch", "sacct", "mariadbd", "my_print_defaults")
PORTS = {"slurmctld": 26817, "slurmdbd": 26819} | {node: 26821 + index for index, node in enumerate(NODES)}

# Where SLURM looks unless told otherwise. No variable can stand in for this link: job steps lose SLURM_CONF.
DEFAULT_CONF = Path("/etc/slurm/slurm.conf")
CONF_NAME = "lorasweep-slurm.conf"  # by this name a link is known as ours, even when it dangles
MUNGE_SOCKET = Path("/run/munge/munge.socket.2")
MADE_MARK = ".made-by-lorasweep"  # lies in a folder of the system that was not there, and goes with it
POLICY = Path("/usr/sbin/policy-rc.d")

# Daemons carry these and are found by them: the number in a stale pid file can be a stranger's by now.
DIR_VARIABLE = "LORASWEEP_SLURM_DIR"
DAEMON_VARIABLE = "LORASWEEP_SLURM_DAEMON"

# Processes that tests start carry this, and are ended with the cluster that it names.
TESTS_VARIABLE = "LORASWEEP_SLURM_TESTS"
TESTS_MARK = "for-tests"  # in the folder of such a cluster
TESTS_LOCK = Path("/run/lorasweep-slurm-tests.lock")  # held as long as it runs, by the tests and by its guard
SECONDS_FOR_OTHERS = 3600

# What a login shell or a job has SLURM's programs do.
SETTINGS_OF_PROGRAMS = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_", "SCONTROL_")

# The path of a socket has 107 characters at most, and SLURM adds up to 35 of them.
MAX_DIR_LENGTH = 70

START_SECONDS = 300
TERM_SECONDS = 5
ANSWER_SECONDS = 30

SLURM_CONF = """\
ClusterName=lorasweep
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[slurmctld]}
# Root, for no other user is sure to exist.
SlurmUser=root
SlurmdUser=root
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/run/slurmctld.pid
SlurmdPidFile={dir}/run/%n.pid
SlurmctldLogFile={dir}/log/slurmctld.log
SlurmdLogFile={dir}/log/%n.log
# Only this machine reaches slurmctld and the nodes. slurmdbd cannot be told so; munge guards it.
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny

AuthType=auth/munge
CredType=cred/munge
# A job run again starts this much later; the default is two minutes.
AuthInfo=cred_expire=10
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none

# What the nodes claim is believed, whatever the machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=1024
GresTypes=gpu
# Jobs start at once.
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2,default_queue_depth=1000

# Memory is enforced by counting it, each second: there may be no cgroups.
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
KillWait=30
OverTimeLimit=0
# A node of a machine that does much else is slow, and not dead.
SlurmdTimeout=20
MessageTimeout=60
ReturnToService=2
MinJobAge=300
# SLURM's default, here to be changed: `configure` changes only what is here.
MaxArraySize=1001

AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports[slurmdbd]}
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=limits,qos
AccountingStoreFlags=job_comment

{nodes}
# What runs in `preemptible` gives way to jobs of the others, and is queued again.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes={main_nodes} Default=YES MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=gpu Nodes={gpu_nodes} MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=preemptible Nodes={main_nodes} MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
# Nodes that may be killed or filled while others use the rest.
PartitionName=apart Nodes={apart_nodes} MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=apart_preemptible Nodes={apart_nodes} MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
# As sites have them: nodes that differ, a limit that is shorter than a job of a model, whole nodes only.
PartitionName=odd Nodes={odd_nodes} MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=short Nodes={odd_nodes} MaxTime=5 State=UP PriorityTier=10
PartitionName=whole Nodes={odd_nodes} MaxTime=INFINITE State=UP PriorityTier=10 OverSubscribe=EXCLUSIVE
"""

SLURMDBD_CONF = """\
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={ports[slurmdbd]}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
LogFile={dir}/log/slurmdbd.log
PidFile={dir}/run/slurmdbd.pid
"""


class ClusterError(RuntimeError):
    """The cluster did not do what was asked; the message names the log to read."""


class Busy(ClusterError):
    """Another test cluster runs, and a machine runs one at a time."""

    def __init__(self, other: "Cluster") -> None:
        super().__init__(f"A test cluster runs below {other.dir} already; `cluster.py stop {other.dir}` stops it.")
        self.other = other


class Unavailable(ClusterError):
    """No cluster of ours can be had on this machine; tests that need one count as not run."""


def install() -> None:
    """Install what is missing of Debian's SLURM, starting no service.

    Raises:
        Unavailable: without root or apt-get.
        ClusterError: when apt-get fails.
    """
    missing = _missing_programs()
    if not missing:
        return
    if os.geteuid() != 0:
        raise Unavailable(f"SLURM is not installed ({missing} missing), and only root can install it.")
    if shutil.which("apt-get") is None:
        raise Unavailable(f"SLURM is not installed ({missing} missing), and there is no apt-get to install it with.")
    with _no_service_starts():
        for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            _run(["apt-get", "-q", *command], os.environ | {"DEBIAN_FRONTEND": "noninteractive"})
    if missing := _missing_programs():
        raise ClusterError(f"After installing {' '.join(PACKAGES)} there is still no {missing}.")


@dataclass
class Cluster:
    """The cluster below `dir`. A machine runs one at a time, for there is one `/etc/slurm/slurm.conf`."""

    dir: Path

    def __post_init__(self) -> None:
        self.dir = self.dir.resolve()

    @property
    def conf(self) -> Path:
        return self.dir / CONF_NAME

    def output(self, daemon: str) -> Path:
        """What `munged`, `mariadbd`, `slurmdbd`, `slurmctld`, or a node's slurmd by the node's name, has printed."""
        return self.dir / "log" / f"{daemon}.out"

    def start(self) -> None:
        """Start the cluster anew unless all of it runs, and wait until every node takes jobs.

        Raises:
            Unavailable: without root, the programs, a free `/etc/slurm/slurm.conf`, or leave to make device nodes.
            Busy: while another test cluster runs.
            ClusterError: when a daemon dies or is not ready in time; nothing runs then.
        """
        if os.geteuid() != 0:
            raise Unavailable("Only root can start a SLURM.")
        if missing := _missing_programs():
            raise Unavailable(f"SLURM is not installed ({missing} missing); `cluster.py install` installs it.")
        if len(str(self.dir)) > MAX_DIR_LENGTH:
            raise ClusterError(f"{self.dir} is too long for the sockets below it; {MAX_DIR_LENGTH} characters fit.")
        self._claim_default_conf()
        for folder in ("log", "run", "state", "spool"):
            (self.dir / folder).mkdir(parents=True, exist_ok=True)
        with self._lock():
            if self.is_running():
                return
            try:
                self._start_daemons()
            except BaseException:
                self._stop()
                raise

    def stop(self) -> None:
        """Cancel the jobs, end every process of the cluster, and take back what `start` put outside `dir`."""
        with self._lock() if self.dir.exists() else contextlib.nullcontext():
            self._stop()

    def is_running(self) -> bool:
        """Whether every daemon runs, every node takes jobs, and accounting hears of them."""
        alive = {process.daemon for process in self._processes() if not process.is_job}
        if not alive >= {"mariadbd", "slurmdbd", "slurmctld", *NODES}:
            return False
        if DEFAULT_CONF.resolve() != self.conf or not _munge_answers():
            return False
        states = self.node_states()
        return len(states) == len(NODES) and all(map(_takes_jobs, states.values())) and self._is_accounted()

    def node_states(self) -> dict[str, str]:
        """Each node's state in sinfo's words (`idle`, `mixed`, `down*`); empty when slurmctld does not answer."""
        output = self._ask("sinfo", "--noheader", "--Node", "--format=%N %T")
        return dict(line.split() for line in output.splitlines())

    def kill_node(self, node: str, *, keep_jobs: bool = False) -> None:
        """Kill a node's slurmd and its jobs, as a power cut does; SLURM notices after about 30 s.

        With `keep_jobs` they run on unseen, as when a node loses its network.

        Raises:
            ClusterError: when the node does not run.
        """
        processes = [process for process in self._processes() if process.daemon == node]
        if all(process.is_job for process in processes):
            raise ClusterError(f"No node {node} runs below {self.dir}.")
        pids = [process.pid for process in processes if not (process.is_job and keep_jobs)]
        # All at once: else one tells SLURM how another ended.
        _signal(pids, signal.SIGSTOP)
        _end(pids, signal.SIGKILL)

    def revive_node(self, node: str) -> None:
        """Start a killed node again, and wait until it takes jobs.

        If SLURM had not noticed its death, it misses the jobs a minute later, and then starts them again.
        """
        if not any(process.daemon == node and not process.is_job for process in self._processes()):
            self._start_node(node)
        self._wait(node, lambda: _takes_jobs(self.node_states().get(node, "")))

    @contextlib.contextmanager
    def silence(self, *daemons: str) -> Iterator[None]:
        """Stop daemons, such as `slurmctld`, so that they do not answer; at the end they go on."""
        pids = [process.pid for process in self._processes() if process.daemon in daemons and not process.is_job]
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    @contextlib.contextmanager
    def configure(self, name: str, value: str) -> Iterator[None]:
        """Have slurmctld run with another value of a key of its conf; at the end it has the old one again."""
        before = self.conf.read_text()
        changed = re.sub(rf"^{name}=.*$", f"{name}={value}", before, flags=re.MULTILINE)
        try:
            self.conf.write_text(changed)
            _run(["scontrol", "reconfigure"])
            yield
        finally:
            self.conf.write_text(before)
            _run(["scontrol", "reconfigure"])

    def _start_daemons(self) -> None:
        self._end_processes()  # what is left of a start or a stop that was killed
        self._write_confs()
        _make_folder(DEFAULT_CONF.parent)
        DEFAULT_CONF.unlink(missing_ok=True)
        DEFAULT_CONF.symlink_to(self.conf)
        if not _munge_answers():
            self._start_munged()
        self._start_mariadbd()
        self._spawn("slurmdbd", "slurmdbd", "-D", MYSQL_UNIX_PORT=str(self._database_socket))
        self._wait("slurmdbd", lambda: _listens(PORTS["slurmdbd"]))
        self._spawn("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
        self._wait("slurmctld", lambda: _listens(PORTS["slurmctld"]))
        self._wait("slurmctld", self._is_accounted)
        self._make_accounts()
        for node in NODES:
            self._start_node(node)
        self._wait("slurmctld", self.is_running)

    def _stop(self) -> None:
        if DEFAULT_CONF.resolve() == self.conf and any(p.daemon == "slurmctld" for p in self._processes()):
            for partition in re.findall(r"^PartitionName=(\w+)", SLURM_CONF, re.MULTILINE):
                self._ask("scancel", f"--partition={partition}")  # else jobs would go on at the next start
        self._end_processes()
        if DEFAULT_CONF.is_symlink():
            if DEFAULT_CONF.readlink() != self.conf:
                return
            DEFAULT_CONF.unlink()
        for folder in (DEFAULT_CONF.parent, MUNGE_SOCKET.parent):
            if (folder / MADE_MARK).exists():
                (folder / MADE_MARK).unlink()
                with contextlib.suppress(OSError):  # others use it by now
                    folder.rmdir()

    def _end_processes(self) -> None:
        # Each daemon goes before the one it reports to, so that none waits for an answer.
        for daemons in (NODES, ("slurmctld",), ("slurmdbd",), ("mariadbd",), ("munged",)):
            processes = [process for process in self._processes() if process.daemon in daemons]
            _end((process.pid for process in processes if not process.is_job), signal.SIGTERM)
            _end((process.pid for process in processes if process.is_job), signal.SIGKILL)
        _end((process.pid for process in self._processes()), signal.SIGKILL)  # jobs that were being born

    def _claim_default_conf(self) -> None:
        """Make sure that the link in `/etc/slurm` is ours, a leftover of ours, or not there."""
        if not DEFAULT_CONF.is_symlink():
            if DEFAULT_CONF.exists():
                raise Unavailable(f"{DEFAULT_CONF} belongs to another SLURM, and is left alone.")
            return
        target = DEFAULT_CONF.readlink()
        if target.name != CONF_NAME:
            raise Unavailable(f"{DEFAULT_CONF} -> {target} belongs to another SLURM, and is left alone.")
        other = Cluster(target.parent)
        if other == self:
            return
        if other.conf.exists() and other._processes():
            raise Busy(other)
        other.stop()  # it was killed, or its folder removed, while it ran

    def _write_confs(self) -> None:
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={PORTS[node]}"
            f" {SMALL.get(node, f'CPUs={CPUS} RealMemory={MEMORY_MB}')}"
            f"{f' Gres=gpu:fake:{GPUS[node]}' if node in GPUS else ''}"
            for node in NODES
        )
        gpus = [self.dir / f"gpu{number}" for number in range(max(GPUS.values()))]
        for gpu in gpus:
            if not gpu.exists():
                try:
                    # Of a plain file SLURM makes a GPU too, but no CUDA_VISIBLE_DEVICES.
                    os.mknod(gpu, stat.S_IFCHR | 0o600, os.stat("/dev/null").st_rdev)
                except PermissionError as error:
                    raise Unavailable(f"{gpu}: no device node, to stand in for a GPU, can be made here.") from error
        lines = (f"NodeName={node} Name=gpu Type=fake File={gpu}\n" for node in GPUS for gpu in gpus[: GPUS[node]])
        (self.dir / "gres.conf").write_text("".join(lines))
        named = {
            "gpu_nodes": ",".join(GPU_NODES),
            "main_nodes": ",".join(MAIN_NODES),
            "apart_nodes": ",".join(APART_NODES),
            "odd_nodes": ",".join(ODD_NODES),
        }
        self.conf.write_text(SLURM_CONF.format(dir=self.dir, host=host, nodes=nodes, ports=PORTS, **named))
        slurmdbd_conf = self.dir / "slurmdbd.conf"
        slurmdbd_conf.touch(mode=0o600)
        slurmdbd_conf.write_text(SLURMDBD_CONF.format(dir=self.dir, host=host, ports=PORTS))

    def _make_accounts(self) -> None:
        """Make the accounts, once slurmctld has told slurmdbd what it is that they may limit."""
        user = getpass.getuser()
        for account, limit in ACCOUNTS.items():
            self._ask("sacctmgr", "--immediate", "add", "account", account, *limit.split())
            self._ask("sacctmgr", "--immediate", "add", "user", user, f"account={account}", "defaultaccount=free")

    def _start_munged(self) -> None:
        key = self.dir / "munge.key"
        if not key.exists():
            key.touch(mode=0o600)
            key.write_bytes(os.urandom(128))
        _make_folder(MUNGE_SOCKET.parent)
        self._spawn(
            "munged",
            "munged",
            "--foreground",
            "--force",  # over the socket of a munged that was killed
            f"--key-file={key}",
            f"--socket={MUNGE_SOCKET}",
            f"--pid-file={self.dir / 'run' / 'munged.pid'}",
            f"--seed-file={self.dir / 'state' / 'munge.seed'}",
        )
        self._wait("munged", _munge_answers)

    @property
    def _database_socket(self) -> Path:
        return self.dir / "run" / "mariadb.sock"

    def _start_mariadbd(self) -> None:
        data = self.dir / "database"
        if not data.exists():
            partial = self.dir / "database.partial"
            shutil.rmtree(partial, ignore_errors=True)
            _run(
                [
                    "mariadb-install-db",
                    "--no-defaults",
                    "--user=root",
                    f"--datadir={partial}",
                    "--skip-test-db",
                    "--auth-root-authentication-method=normal",
                ]
            )
            partial.rename(data)
        self._database_socket.unlink(missing_ok=True)
        self._spawn(
            "mariadbd",
            "mariadbd",
            "--no-defaults",
            "--user=root",
            f"--datadir={data}",
            f"--socket={self._database_socket}",
            f"--pid-file={self.dir / 'run' / 'mariadbd.pid'}",
            "--skip-networking",
            "--skip-grant-tables",
            "--innodb-buffer-pool-size=64M",
            "--innodb-lock-wait-timeout=900",  # slurmdbd asks for it
            "--innodb-flush-log-at-trx-commit=0",
        )
        self._wait("mariadbd", self._database_socket.exists)

    def _start_node(self, node: str) -> None:
        self._spawn(node, "slurmd", "-D", "-N", node, "-f", str(self.conf))
        self._wait(node, lambda: _listens(PORTS[node]))

    def _spawn(self, daemon: str, *command: str, **variables: str) -> None:
        """Start a daemon that outlives this process, and is nobody's zombie when it ends."""
        environ = {"PATH": _path(), "SLURM_CONF": str(self.conf), DIR_VARIABLE: str(self.dir), DAEMON_VARIABLE: daemon}
        folder = self.dir / "run" / daemon
        folder.mkdir(exist_ok=True)
        with self.output(daemon).open("ab") as output:
            subprocess.run(
                ["setsid", "--fork", *command],
                env=environ | variables,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=True,
            )

    def _wait(self, daemon: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        missed = 0
        while not ready():
            is_alive = any(process.daemon == daemon and not process.is_job for process in self._processes())
            missed = 0 if is_alive else missed + 1
            if missed == 60:  # three seconds: a look may fall before its exec, when it has no environment yet
                raise ClusterError(f"{daemon} has ended. The end of {self.output(daemon)}:\n{self._tail(daemon)}")
            if time.monotonic() > deadline:
                raise ClusterError(f"{daemon} is not ready. The end of {self.output(daemon)}:\n{self._tail(daemon)}")
            time.sleep(0.05)

    def _tail(self, daemon: str) -> str:
        return "\n".join(self.output(daemon).read_text(errors="replace").splitlines()[-10:])

    def _processes(self) -> "list[_Process]":
        return [process for process in _all_processes() if process.dir == str(self.dir)]

    def _is_accounted(self) -> bool:
        """Whether slurmctld has made itself known to slurmdbd."""
        clusters = self._ask("sacctmgr", "--noheader", "--parsable2", "list", "cluster", "format=cluster,controlport")
        return f"lorasweep|{PORTS['slurmctld']}" in clusters.splitlines()

    def _ask(self, *command: str) -> str:
        """What a SLURM program prints, or nothing when it fails."""
        environ = _without_settings(os.environ) | {"SLURM_CONF": str(self.conf)}
        try:
            done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            return ""
        return done.stdout if done.returncode == 0 else ""

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.dir / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@contextlib.contextmanager
def run_for_tests(say: Callable[[str], None]) -> Iterator[Cluster]:
    """A cluster for a run of the tests; those of another clone, or one started by hand, are waited for.

    However this process ends, a guard ends the cluster and what carries TESTS_VARIABLE with its folder.

    Raises:
        Unavailable: as `Cluster.start`.
        ClusterError: as `Cluster.start`, or others have not ended in an hour.
    """
    if os.geteuid() != 0:
        raise Unavailable("Only root can start a SLURM.")
    with TESTS_LOCK.open("a+") as lock:
        deadline = time.monotonic() + SECONDS_FOR_OTHERS

        def is_locked() -> str:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return TESTS_LOCK.read_text().strip() or "a folder not yet known"
            return ""

        _wait_for_others(is_locked, deadline, say)
        # Not in TMPDIR, whose path may be too long for sockets, or have blanks, which SLURM's confs cannot.
        own = Cluster(Path(tempfile.mkdtemp(prefix="lorasweep-slurm-", dir="/tmp")))
        (own.dir / TESTS_MARK).touch()
        lock.truncate(0)
        lock.write(f"{own.dir}\n")
        lock.flush()
        guard = subprocess.Popen(
            [sys.executable, __file__, "guard", str(own.dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=[lock.fileno()],
        )

        def is_busy() -> str:
            try:
                own.start()
            except Busy as busy:
                if not (busy.other.dir / TESTS_MARK).exists():
                    return str(busy.other.dir)
                _remove(busy.other)  # its tests and their guard are gone, or they would hold the lock
                return is_busy()
            return ""

        try:
            _wait_for_others(is_busy, deadline, say)
            yield own
        finally:
            assert guard.stdin
            guard.stdin.close()
            guard.wait()


def _wait_for_others(find_other: Callable[[], str], deadline: float, say: Callable[[str], None]) -> None:
    """Wait until no other cluster is found, and say once that it is waited for."""
    has_said = False
    while other := find_other():
        if not has_said:
            say(f"The SLURM of {other} runs on this machine: waiting for its end.")
            has_said = True
        if time.monotonic() > deadline:
            raise ClusterError(f"The SLURM of {other} still runs; `cluster.py stop {other}` stops it.")
        time.sleep(1)


def guard(directory: Path) -> None:
    """Wait until standard input ends, as it does with the process that holds it; then remove a cluster of tests."""
    sys.stdin.read()
    _remove(Cluster(directory))


def _remove(cluster: Cluster) -> None:
    """End the processes of tests, their cluster, and its folder."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        # Once more, since a process may have started others.
        _end(_find_processes_of_tests(cluster.dir), number)
    cluster.stop()
    for line in Path("/proc/mounts").read_text().splitlines():
        if line.split()[1].startswith(f"{cluster.dir}/"):
            subprocess.run(["umount", "--lazy", line.split()[1]], check=False)
    shutil.rmtree(cluster.dir, ignore_errors=True)


def _find_processes_of_tests(directory: Path) -> list[int]:
    mark = f"{TESTS_VARIABLE}={directory}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if mark in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


def _without_settings(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not name.startswith(SETTINGS_OF_PROGRAMS)}


def forget_settings() -> None:
    """Drop from this process what a login shell or a job has SLURM's programs do."""
    for name in set(os.environ) - set(_without_settings(os.environ)):
        del os.environ[name]


@dataclass(frozen=True)
class _Process:
    pid: int
    dir: str  # of its cluster
    daemon: str  # its own name, or that of the node whose job it is
    is_job: bool


def _all_processes() -> list[_Process]:
    """The processes of all test clusters: daemons, and what the jobs on their nodes started."""
    found: dict[int, _Process] = {}
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        with contextlib.suppress(OSError):  # it ended meanwhile
            # After the name, which may hold anything: the state, then the parent.
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            lines = (folder / "environ").read_text(errors="replace").split("\0")
            environ = dict(line.partition("=")[::2] for line in lines)
            conf = Path(environ.get("SLURM_CONF", ""))
            if (folder / "comm").read_text() == "slurmstepd\n":  # writes its title over its environment
                node_folder = Path(str((folder / "cwd").readlink()).removesuffix(" (deleted)"))
                found[pid] = _Process(pid, str(node_folder.parent.parent), node_folder.name, is_job=True)
            elif DIR_VARIABLE in environ and DAEMON_VARIABLE in environ:
                found[pid] = _Process(pid, environ[DIR_VARIABLE], environ[DAEMON_VARIABLE], is_job=False)
            elif conf.name == CONF_NAME and "SLURMD_NODENAME" in environ:
                found[pid] = _Process(pid, str(conf.parent), environ["SLURMD_NODENAME"], is_job=True)
    new = set(found)
    while new:
        new = {pid for pid, parent in parents.items() if parent in new and pid not in found}
        found |= {pid: replace(found[parents[pid]], pid=pid) for pid in new}
    return list(found.values())


def _make_folder(folder: Path) -> None:
    if not folder.exists():
        folder.mkdir()
        folder.chmod(0o755)  # whatever the umask
        (folder / MADE_MARK).touch()


def _end(pids: Iterable[int], signal_number: int) -> None:
    """Signal processes, and wait for their end; those that do not end in time are killed."""
    left = set(pids)
    for number in (signal_number, signal.SIGKILL):
        _signal(left, number)
        deadline = time.monotonic() + TERM_SECONDS
        while left and time.monotonic() < deadline:
            time.sleep(0.02)
            left = {pid for pid in left if _is_alive(pid)}


def _signal(pids: Iterable[int], number: int) -> None:
    """Signal those processes that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _run(command: list[str], environ: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise ClusterError(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def _takes_jobs(state: str) -> bool:
    return state in ("idle", "mixed", "allocated", "completing")


def _munge_answers() -> bool:
    return subprocess.run(["munge", "--no-input"], stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _path() -> str:
    """Where to look for programs: daemons lie where a plain user's PATH may not lead."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _missing_programs() -> str:
    return ", ".join(program for program in PROGRAMS if shutil.which(program, path=_path()) is None)


@contextlib.contextmanager
def _no_service_starts() -> Iterator[None]:
    """Keep Debian from starting what it installs, by the file that it asks."""
    kept = POLICY.with_name("policy-rc.d.before-lorasweep")
    if POLICY.exists() and not kept.exists():  # kept already by an install that was killed
        POLICY.rename(kept)
    try:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
        yield
    finally:
        POLICY.unlink(missing_ok=True)
        if kept.exists():
            kept.rename(POLICY)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("install")
    for action in ("start", "stop", "status", "guard", "kill", "revive"):
        action_parser = actions.add_parser(action)
        action_parser.add_argument("dir", type=Path, metavar="DIR")
        if action in ("kill", "revive"):
            action_parser.add_argument("node", choices=NODES)
    return parser.parse_args()


def main() -> int:
    arguments = _parse_arguments()
    if arguments.action == "install":
        install()
        return 0
    cluster = Cluster(arguments.dir)
    match arguments.action:
        case "start":
            cluster.start()
        case "stop":
            cluster.stop()
        case "guard":
            guard(arguments.dir)
        case "status":
            for node, state in cluster.node_states().items():
                print(node, state)
            return 0 if cluster.is_running() else 1
        case "kill":
            cluster.kill_node(arguments.node)
        case "revive":
            cluster.revive_node(arguments.node)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ClusterError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(3 if isinstance(error, Unavailable) else 1)
