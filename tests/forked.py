"""Runs the training program in processes of its own, which are forked from one that has imported everything.

So a test does not wait for Python's imports, and can have processes killed at a point that it names. Run as a program,
this file is the one that is forked. It reads one JSON object a line: 'argv' of the program, the number of its
'processes', the file of its 'log', 'code' that each runs first, and a 'point' [kind, number, rank] to die at, or null.
With 'restarts', a number, torchrun's agent starts the processes, and starts them again as often when one has died.
It prints the number of a process that has begun a session, forks those of the job, and writes to 'log'.json the exit
code of the first that did not end well (negative for a signal), and how often rank 0 passed each kind of point.

The points:
    file: before the number-th change of a name in the run folder (a rename, link, removal, new file or new folder)
    torn: in the number-th torch.save, when half of the file is there
    step: after the number-th training step
    inside: in the number-th update, when the gradient is there
"""

import collections
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHANGES = ('os.rename', 'os.link', 'os.remove', 'os.mkdir', 'open')
SIGKILL = -9


class Job:
    """A program that runs.

    Attributes:
        session: Number of the session that its processes are in, a process group.
        log: What it prints.
    """

    def __init__(self, session: int, log: Path) -> None:
        self.session, self.log = session, log
        self.passed: dict[str, int] = {}

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text() if self.log.is_file() else ''

    @property
    def pids(self) -> list[int]:
        """Its processes, rank by rank."""
        command = ['pgrep', '-P', str(self.session)]
        return [int(pid) for pid in subprocess.run(command, capture_output=True, text=True).stdout.split()]

    def wait_for(self, *texts: str) -> None:
        """Wait until it has printed one of some texts."""
        end = time.monotonic() + 60
        while not any(text in self.text for text in texts):
            assert not self.result.is_file(), self.text
            assert time.monotonic() < end, self.text
            time.sleep(0.01)

    @property
    def result(self) -> Path:
        """The file that is there when it has ended."""
        return self.log.with_name(f'{self.log.name}.json')

    def finish(self, timeout: float = 120) -> int:
        """Wait for its end; return the exit code."""
        end = time.monotonic() + timeout
        while not self.result.is_file():
            assert time.monotonic() < end, self.text
            time.sleep(0.005)
        code, self.passed = json.loads(self.result.read_text())
        return int(code)


class Forked:
    """Starts jobs; see the head of this file."""

    def __init__(self, server: subprocess.Popen) -> None:
        self.server = server
        self.jobs: list[Job] = []

    def start(
        self,
        output: Path,
        *argv: Any,
        processes: int = 1,
        code: str = '',
        point: tuple[str, int] | None = None,
        rank: int = 0,
        restarts: int | None = None,
    ) -> Job:
        """Start the program with the options `argv` and `--output`."""
        output.mkdir(exist_ok=True, parents=True)
        job = Job(0, output / f'log-{time.monotonic_ns()}.txt')
        words = [str(word) for word in (*argv, '--output', output)]
        values = {'argv': words, 'processes': processes, 'code': code, 'point': point and [*point, rank]}
        values['restarts'] = restarts
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(f'{json.dumps({**values, "log": str(job.log)})}\n')
        self.server.stdin.flush()
        job.session = int(self.server.stdout.readline())
        self.jobs.append(job)
        return job

    def run(self, output: Path, *argv: Any, **options: Any) -> Job:
        """Run the program to its end, which must be a good one."""
        job = self.start(output, *argv, **options)
        assert job.finish() == 0, job.text
        return job


@contextlib.contextmanager
def forked() -> Any:
    """Yield a `Forked`."""
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        programs = Forked(server)
        yield programs
        for job in programs.jobs:  # of a test that failed
            if not job.result.is_file():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(job.session, signal.SIGKILL)
        assert server.stdin is not None
        server.stdin.close()


class Killer:
    """Counts what this process passes, and kills it where it is to die."""

    def __init__(self, point: tuple[str, int] | None, folder: Path) -> None:
        self.point = point
        self.folder = folder
        self.passed: collections.Counter[str] = collections.Counter()
        self.pid = os.getpid()

    def at(self, kind: str) -> None:
        """Count a point, and die there if it is the one."""
        if os.getpid() == self.pid:  # not a worker process
            self.passed[kind] += 1
            if self.point == (kind, self.passed[kind]):
                os.kill(self.pid, signal.SIGKILL)

    def install(self) -> None:
        """Put the points into this process."""
        import torch

        from timm_mealv2.training.loop import Stepper

        sys.addaudithook(self._hear)
        save, step, update = torch.save, Stepper.step, Stepper.update

        def torn_save(value: Any, path: Any, **kwargs: Any) -> None:
            save(value, path, **kwargs)
            if isinstance(path, str):  # not what goes to other processes
                if self.point == ('torn', self.passed['torn'] + 1):
                    os.truncate(path, os.path.getsize(path) // 2)
                self.at('torn')

        def counted_step(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self.at('step')
            return result

        def counted_update(*args: Any) -> Any:
            self.at('inside')
            return update(*args)

        torch.save = torn_save
        Stepper.step = counted_step  # type: ignore[method-assign]
        Stepper.update = counted_update  # type: ignore[method-assign]

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in CHANGES or isinstance(args[0], int) or self.folder not in Path(os.fsdecode(args[0])).parents:
            return
        if event != 'open' or args[2] & os.O_CREAT:
            self.at('file')


def child(job: dict[str, Any], rank: int, port: int, answer: int) -> None:
    """Run the program in this process, and end it."""
    from timm_mealv2.command_line import run_cli
    from timm_mealv2.training import run

    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if job['restarts'] is not None:
            launch(job)
            os._exit(0)
        if job['processes'] > 1:
            places = {'RANK': rank, 'LOCAL_RANK': rank, 'WORLD_SIZE': job['processes']}
            places |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
            os.environ.update({name: str(value) for name, value in places.items()})
        argv = job['argv']
        kind, number, where = job['point'] or (None, 0, 0)
        folder = Path(argv[argv.index('--output') + 1])
        killer = Killer((kind, number) if where == rank else None, folder)
        killer.install()
        exec(job['code'], {'__name__': '__main__', 'rank': rank})
        run_cli(run.main, argv)
        code = 0
        if rank == 0:
            os.write(answer, json.dumps(killer.passed).encode())
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def attempt(job: dict[str, Any]) -> None:
    """Run the program in this process, which torchrun's agent has started."""
    from timm_mealv2.training import run

    exec(job['code'], {'__name__': '__main__', 'rank': int(os.environ['RANK'])})
    sys.argv = ['mealv2-train', *job['argv']]
    run.cli()


def launch(job: dict[str, Any]) -> None:
    """Do in this process what torchrun does, but fork the program's processes."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job['processes'],
        run_id=job['log'],
        rdzv_backend='c10d',
        rdzv_endpoint='localhost:0',
        max_restarts=job['restarts'],
        monitor_interval=0.1,
        start_method='fork',
    )
    elastic_launch(config, attempt)(job)


def work(job: dict[str, Any]) -> list[Any]:
    """Run one job; return what its file says."""
    with socket.socket() as listening:
        listening.bind(('127.0.0.1', 0))
        port = listening.getsockname()[1]
    read, write = os.pipe()
    pids = []
    for rank in range(job['processes'] if job['restarts'] is None else 1):
        pid = os.fork()
        if pid == 0:
            os.close(read)
            child(job, rank, port, write)
        pids.append(pid)
    os.close(write)
    first = 0
    while pids:
        pid, status = os.wait()
        pids.remove(pid)
        code = os.waitstatus_to_exitcode(status)
        first = first or code
        if code < 0:  # as a launcher does
            for other in pids:
                os.kill(other, signal.SIGKILL)
    with os.fdopen(read) as file:
        passed = file.read()
    return [first, json.loads(passed or '{}')]


def lead(job: dict[str, Any]) -> None:
    """Run one job in a session of its own, and end this process."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(job['log'], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        path = Path(f'{job["log"]}.json')
        path.with_suffix('.new').write_text(json.dumps(work(job)))
        path.with_suffix('.new').rename(path)
    finally:
        os._exit(0)


def main() -> None:
    """Fork a process for each job."""
    import timm_mealv2.training.run  # noqa: F401  # what the jobs would have to import

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nothing is kept of those that have ended
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            lead(json.loads(line))
        print(pid, flush=True)


if __name__ == '__main__':
    main()
