"""Runs the training program in processes that are killed at a point that is asked for.

Reads one JSON object a line: 'argv' of the program, the number of its 'processes', the file of its 'log', and a 'point'
[kind, number, rank] to die at, or null. The processes are forks of this one, which thereby imports torch only once;
when one dies by a signal, the others are killed too. The answer is one JSON line: the exit code of the process that
ended first (negative for a signal), and how often rank 0 passed each kind of point.

The points:
    file: before the number-th change of a name in the run folder (a rename, link, removal, new file or new folder)
    torn: in the number-th torch.save, when half of the file is there
    step: after the number-th training step
    inside: in the number-th training step, between the gradient and the update
"""

import collections
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from timm_mealv2.command_line import run_cli
from timm_mealv2.training import loop, run

CHANGES = ('os.rename', 'os.link', 'os.remove', 'os.mkdir', 'open')


class Killer:
    """Counts what this process passes, and kills it where it is to die."""

    def __init__(self, point: tuple[str, int] | None, folder: Path) -> None:
        self.point = point
        self.folder = folder
        self.passed: collections.Counter[str] = collections.Counter()
        self.pid = os.getpid()

    def at(self, kind: str) -> bool:
        """Count a point; tell whether it is the one to die at."""
        if os.getpid() != self.pid:  # a worker process
            return False
        self.passed[kind] += 1
        return self.point == (kind, self.passed[kind])

    def die(self) -> None:
        """Leave as if the machine had been taken away."""
        os.kill(self.pid, signal.SIGKILL)

    def install(self) -> None:
        """Put the points into this process."""
        sys.addaudithook(self._hear)
        save, step, backward = torch.save, loop.Stepper.step, loop.Stepper.backward

        def torn_save(value: Any, path: Any, **kwargs: Any) -> None:
            save(value, path, **kwargs)
            if isinstance(path, str) and self.at('torn'):  # not what goes to other processes
                os.truncate(path, os.path.getsize(path) // 2)
                self.die()

        def counted_step(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            if self.at('step'):
                self.die()
            return result

        def counted_backward(stepper: Any, loss: torch.Tensor) -> Any:
            if self.at('inside'):
                loss.backward()
                self.die()
            return backward(stepper, loss)

        torch.save = torn_save
        loop.Stepper.step = counted_step  # type: ignore[method-assign]
        loop.Stepper.backward = counted_backward  # type: ignore[method-assign]

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in CHANGES or isinstance(args[0], int) or self.folder not in Path(os.fsdecode(args[0])).parents:
            return
        if event == 'open' and not args[2] & os.O_CREAT:
            return
        if self.at('file'):
            self.die()


def child(job: dict[str, Any], rank: int, port: int, answer: int) -> None:
    """Run the program in this process, and end it."""
    code = 1
    try:
        log = os.open(f'{job["log"]}', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if job['processes'] > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(job['processes']),
                MASTER_ADDR='127.0.0.1',
                MASTER_PORT=str(port),
            )
        argv = job['argv']
        folder = Path(argv[argv.index('--output') + 1])
        kind, number, where = job['point'] or (None, 0, 0)
        killer = Killer((kind, number) if where == rank else None, folder)
        killer.install()
        run_cli(run.main, argv)
        code = 0
        if rank == 0:
            os.write(answer, json.dumps(killer.passed).encode())
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def work(job: dict[str, Any]) -> list[Any]:
    """Run one job; return its answer."""
    with socket.socket() as listening:
        listening.bind(('127.0.0.1', 0))
        port = listening.getsockname()[1]
    read, write = os.pipe()
    pids = []
    for rank in range(job['processes']):
        pid = os.fork()
        if pid == 0:
            os.close(read)
            child(job, rank, port, write)
        pids.append(pid)
    os.close(write)
    first = None
    while pids:
        pid, status = os.wait()
        if pid not in pids:
            continue
        pids.remove(pid)
        code = os.waitstatus_to_exitcode(status)
        if first is None:
            first = code
        if code:
            for other in pids:
                os.kill(other, signal.SIGKILL)
    with os.fdopen(read) as file:
        passed = file.read()
    return [first, json.loads(passed or '{}')]


if __name__ == '__main__':
    for line in sys.stdin:
        print(json.dumps(work(json.loads(line))), flush=True)
