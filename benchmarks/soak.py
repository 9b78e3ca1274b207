"""Kill and continue at random, and compare the end with that of what was never killed.

    python benchmarks/soak.py --minutes 60
    python benchmarks/soak.py --minutes 10 --what live

live: a short training of the sample in examples/fashion_mnist, with everything on that draws random numbers or keeps a
state. stored: the same on recorded predictions. record: two processes that record these. hub: a push and a pull of an
exported folder, with a server on loopback that breaks connections, answers late, with errors (5xx), and sends damaged
files. In turn, or one of them with --what.

Each is run once without a kill; then again and again, with kills by SIGKILL or SIGTERM, each followed by the same
command again. A kill comes when the process has used a random part of its CPU time, or after a random number of its
requests to the Hub: the load of the machine moves none out of the work. In the end the files have to be the same: of a
run folder every tensor of every checkpoint to the bit, the names of the files, and the summary but for its speed; of
the others every byte. The program ends with 1 if anything differs.
"""

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from timm_mealv2.command_line import OneLineParser, run_cli
from timm_mealv2.errors import UserError
from timm_mealv2.models.checkpoint import TrainingCheckpoint
from timm_mealv2.runs import TIMES

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / 'tests'))
from hub_server import WRITE_TOKEN, HubServer  # type: ignore[import-not-found] # noqa: E402

SAMPLE = ROOT / 'examples/fashion_mnist'
SAMPLES = (
    f'--data-dir {SAMPLE}/data --train-split train.tar --num-classes 10 --in-chans 1 --img-size 28 --batch-size 50 '
    '--mixup 0.2 --reprob 0.3 --device cpu'
).split()
TEACHERS = ['--teachers', *(f'local-dir:{SAMPLE}/teachers/teacher_{name}' for name in 'ab')]
OPTIONS = (
    '--model test_resnet --epochs 3 --lr 0.02 --opt adamw --sched plateau --patience-epochs 0 --warmup-epochs 1 '
    '--grad-accum-steps 2 --clip-grad 1 --model-ema --model-ema-decay 0.9 --drop 0.1 --drop-path 0.1 '
    '--checkpoint-hist 2 --recovery-interval 3 --log-interval 100 --no-preflight --resume auto '
    '--val-split validation.tar'
).split()
PUSH_AND_PULL = """
import sys
from timm_mealv2.command_line import run_cli
from timm_mealv2.hub.hub_api import pull_model, push_model

def main(argv):
    push_model(argv[0], argv[1])
    pull_model(argv[1], argv[2])

run_cli(main, sys.argv[1:])
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this program."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--what', choices=('live', 'stored', 'record', 'hub'), help='all in turn if not given')
    parser.add_argument('--minutes', type=float, default=10, help='begin no further run after this time')
    parser.add_argument('--seed', type=int, default=0, help='of the times and kinds of the kills')
    parser.add_argument('--workers', type=int, default=2, help='worker processes of the training')
    parser.add_argument('--processes', type=int, default=1, help='training processes, under torchrun if not 1')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures there as well')
    return parser


def differences(first: Path, second: Path) -> list[str]:
    """Compare two run folders; what differs, one text each, none if they are the same.

    Compared are the names of the files, each value of each checkpoint but its arguments (they hold the folder) and
    its counter, and the summary but for speed and times.
    """
    found = []
    names = [sorted(path.name for path in folder.iterdir()) for folder in (first, second)]
    if names[0] != names[1]:
        found.append(f'files: {names[0]} and {names[1]}')
    rows = []
    for folder in (first, second):
        with open(folder / 'summary.csv', newline='') as file:
            own = csv.DictReader(file)
            rows.append([{k: v for k, v in row.items() if k not in ('images_per_second', *TIMES)} for row in own])
    if rows[0] != rows[1]:
        found.append(f'summary.csv: {rows[0]} and {rows[1]}')
    apart = ('args', 'written')  # the folder, and how often the run was told to stop
    for name in sorted(set(names[0]) & set(names[1])):
        if name.endswith('.pth.tar'):
            contents = [TrainingCheckpoint.read(folder / name).contents for folder in (first, second)]
            values = [dict(_leaves({k: v for k, v in own.items() if k not in apart})) for own in contents]
            for key in sorted(values[0].keys() | values[1].keys()):
                if not _equal(*(value.get(key, 'absent') for value in values)):
                    found.append(f'{name}: {key}')
    return found


def _leaves(value: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    if isinstance(value, (dict, list, tuple)):
        yield path, type(value).__name__
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, f'{path}/{key}')
    else:
        yield path, value


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    return type(first) is type(second) and (first == second or (first != first and second != second))


@dataclass
class Task:
    """What is run in a folder and killed.

    Attributes:
        command: For the folder; given again it goes on.
        differences: Between the folder of an undisturbed run and another.
        processes: How many are started at a time, each killed by itself.
        share: A process is killed before this share of the work of an undisturbed run, and goes on from there.
        begin: Called before each start; its disturbances are the task's own.
        spent: How far a process has come, in any unit.
    """

    name: str
    command: Callable[[Path], list[str]]
    differences: Callable[[Path, Path], list[str]]
    processes: int = 1
    share: float = 0.5
    begin: Callable[[], None] = lambda: None
    spent: Callable[[subprocess.Popen], float] = lambda process: cpu_seconds(process.pid)
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, folder: Path, *options: str) -> subprocess.Popen:
        """Start a process, or let it go on."""
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', **self.environment}
        with open(f'{folder}.log', 'ab') as log:
            # A session of its own: a kill meets the worker processes too, as when a machine is taken away.
            return subprocess.Popen(
                [*self.command(folder), *options], stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def measure(self, folder: Path, *options: str) -> float:
        """Run one process undisturbed; return what it has spent."""
        process, spent = self.start(folder, *options), 0.0
        while process.poll() is None:
            spent = self.spent(process)
            time.sleep(0.05)
        if process.returncode:
            raise UserError(f'{self.name} does not run: {_last_line(folder)}')
        return spent


def cpu_seconds(session: int) -> float:
    """CPU time of the processes of a session, and of those that they have waited for."""
    ticks = 0
    for path in Path('/proc').glob('[0-9]*/stat'):
        with suppress(OSError):  # it has ended
            fields = path.read_text().rpartition(')')[2].split()
            if int(fields[3]) == session:
                ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf('SC_CLK_TCK')


def disturb(task: Task, folder: Path, draw: Callable[[], float], generator: random.Random) -> Counter[str]:
    """Run the processes of a task, kill each again and again until it ends by itself; count what happened."""
    counts: Counter[str] = Counter()
    running: dict[subprocess.Popen, float] = {}
    for _ in range(task.processes):
        task.begin()
        running[task.start(folder)] = draw()
    while running:
        time.sleep(0.05)
        for process, limit in list(running.items()):
            if process.poll() is None:
                if task.spent(process) < limit:
                    continue
                name = generator.choice(('SIGKILL', 'SIGTERM'))
                counts[name] += 1
                if name == 'SIGKILL':
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.terminate()
                process.wait()
            elif process.returncode == 2 and task.name == 'hub':
                counts['given up'] += 1  # after more faults than it makes attempts
            elif process.returncode:
                raise UserError(f'{folder.name} ended with {process.returncode}: {_last_line(folder)}')
            else:
                del running[process]
                continue
            del running[process]
            counts['resumes'] += 1
            task.begin()
            running[task.start(folder)] = draw()
    return counts


def soak(task: Task, root: Path, args: argparse.Namespace) -> Counter[str]:
    """Run a task undisturbed and then disturbed, for the given time; return what happened how often."""
    end = time.monotonic() + 60 * args.minutes / (1 if args.what else 4)
    generator = random.Random(args.seed)
    whole = root / f'{task.name}-unkilled'
    least = task.measure(root / 'help', '--help') if task.name != 'hub' else 0.0
    most = task.measure(whole)
    total: Counter[str] = Counter(runs=0, differences=0)
    while time.monotonic() < end:
        run = root / f'{task.name}-{total["runs"]}'
        counts = disturb(task, run, lambda: least + generator.uniform(0, task.share) * (most - least), generator)
        found = task.differences(whole, run)
        total.update(counts, runs=1, differences=len(found))
        print(f'{run.name}: {dict(counts)}, {len(found)} differences', flush=True)
        for text in found[:20]:
            print(f'  {text[:500]}', flush=True)
        shutil.rmtree(run)
    return total


def byte_differences(first: Path, second: Path) -> list[str]:
    """Names of the files that two folders do not have alike."""
    contents = [
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('[!.]*') if path.is_file()}
        for folder in (first, second)
    ]
    return sorted(name for name in {*contents[0], *contents[1]} if contents[0].get(name) != contents[1].get(name))


def recording(folder: Path) -> list[str]:
    """The command that records in `folder`."""
    command = [sys.executable, '-m', 'timm_mealv2.cli.soft_labels', 'record', *SAMPLES, *TEACHERS, '--workers', '0']
    return [*command, '--epochs', '20', '--top-k', '5', '--out', str(folder)]


def training(args: argparse.Namespace, folder: Path, *options: str) -> list[str]:
    """The command that trains in `folder`."""
    command = [sys.executable]
    if args.processes > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(args.processes)]
    command += [str(ROOT / 'train_distill.py'), *SAMPLES, *OPTIONS, '--workers', str(args.workers), *options]
    return [*command, '--output', str(folder.parent), '--experiment', folder.name]


def hub_task(server: HubServer, generator: random.Random) -> Task:
    """The push and pull of the sample's teacher, with up to three faults at each start."""
    export = SAMPLE / 'teachers/teacher_a'
    seen = 0

    def begin() -> None:
        nonlocal seen
        seen = len(server.requests)
        server.clear_faults()
        for _ in range(generator.randint(0, 3)):
            where = generator.choice(('/revision/', '/tree/', '/preupload/', '/lfs/', '/commit/', '/resolve/', '/api/'))
            if where == '/resolve/' and generator.random() < 0.5:
                server.damage('model.safetensors', generator.choice(('flip', 'truncate')))
            else:
                status = generator.choice((None, 500, 502, 503, 504))
                times, when = generator.randint(1, 3), generator.choice(('before', 'after'))
                server.fail(where, status=status, times=times, when=when, stall=generator.choice((0, 0, 3)))

    def compare(whole: Path, run: Path) -> list[str]:
        """The folder that was pulled, what the repository holds, and that it came in one commit."""
        repo = server.repos[f'me/{run.name}']
        pushed = {path.name: path.read_bytes() for path in export.iterdir()}
        found = byte_differences(export, whole) + byte_differences(whole, run)
        return found + ['the repository'] * (repo.files() != pushed) + ['commits'] * (len(repo.log()) != 2)

    return Task(
        'hub',
        lambda folder: [sys.executable, '-c', PUSH_AND_PULL, str(export), f'me/{folder.name}', str(folder)],
        compare,
        share=1.0,  # a pull begins anew
        begin=begin,
        spent=lambda process: len(server.requests) - seen,
        environment={'HF_ENDPOINT': server.url, 'HF_TOKEN': WRITE_TOKEN, 'HF_HUB_DISABLE_XET': '1'},
    )


def _last_line(folder: Path) -> str:
    return (Path(f'{folder}.log').read_text(errors='replace').splitlines() or [''])[-1]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the soak and print its figures."""
    args = build_parser().parse_args(argv)
    figures: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder, HubServer() as server:
        root = Path(folder)
        stored = ['--soft-labels', str(root / 'store'), '--discriminator-weight', '1']
        live = [*TEACHERS, '--hard-label-weight', '0.2']
        tasks = (
            Task('live', lambda folder: training(args, folder, *live), differences),
            Task('stored', lambda folder: training(args, folder, *stored), differences),
            Task('record', recording, byte_differences, processes=2, share=0.25),
            hub_task(server, random.Random(args.seed)),
        )
        for task in tasks:
            if args.what in (None, task.name):
                if task.name == 'stored':
                    subprocess.run(recording(root / 'store'), check=True, capture_output=True)
                figures[task.name] = soak(task, root, args)
                if task.name == 'hub':
                    figures['hub']['faults'] = server.faults
                text = ', '.join(f'{count} {name}' for name, count in figures[task.name].items())
                print(f'{date.today()}, {task.name}: {text}', flush=True)
    if args.json:
        args.json.write_text(json.dumps({**figures, 'date': str(date.today())}, indent=1))
    if any(counts['differences'] for counts in figures.values()):
        raise SystemExit(1)


if __name__ == '__main__':
    run_cli(main)
