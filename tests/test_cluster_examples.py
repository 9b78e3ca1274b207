"""The files of examples/cluster: their syntax, and that the options they use exist and go together."""

import re
import shlex
import subprocess
from pathlib import Path

import yaml

from timm_mealv2.training.settings import parse_args

EXAMPLES = Path(__file__).parents[1] / 'examples/cluster'


def program_arguments(words: list[str]) -> list[str]:
    return words[words.index('mealv2-train') + 1 :]


def assert_continues_by_itself(argv: list[str]) -> None:
    args = parse_args(argv)
    assert args.resume == 'auto'
    assert args.experiment
    assert args.recovery_interval > 0
    assert args.total_batch_size == 512


def test_the_slurm_script_hands_the_signal_on_and_continues_after_it() -> None:
    script = EXAMPLES / 'train.sbatch'
    subprocess.run(['bash', '-n', str(script)], check=True)
    text = script.read_text()
    command = re.search(r'^srun .*?&$', text.replace('\\\n', ' '), re.MULTILINE)
    assert command is not None
    assert_continues_by_itself(program_arguments(shlex.split(command[0].rstrip('&'))))
    for line in ('#SBATCH --requeue', '#SBATCH --signal=B:TERM@120', 'export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100'):
        assert line in text.splitlines()


def test_the_kubernetes_job_leaves_time_for_a_checkpoint_and_restarts() -> None:
    job = yaml.safe_load((EXAMPLES / 'pytorchjob.yaml').read_text())
    assert job['kind'] == 'PyTorchJob'
    worker = job['spec']['pytorchReplicaSpecs']['Worker']
    assert worker['restartPolicy'] == 'OnFailure'
    pod = worker['template']['spec']
    assert pod['terminationGracePeriodSeconds'] >= 60
    (container,) = pod['containers']
    assert container['name'] == 'pytorch'  # the operator looks for this name
    assert_continues_by_itself(container['args'])
    (timeout,) = container['env']
    assert int(timeout['value']) < pod['terminationGracePeriodSeconds']
    mounted = {mount['name'] for mount in container['volumeMounts']}
    assert mounted == {volume['name'] for volume in pod['volumes']}


def test_the_slurm_script_requeues_after_the_training_has_stopped(tmp_path: Path) -> None:
    """The script itself, with the cluster's commands replaced by ones that write down when they are called."""
    log = tmp_path / 'log'
    commands = {
        'scontrol': f'echo scontrol "$@" >> {log}; [ "$1" = requeue ] || echo node1',
        # As the training does: it takes the signal, saves, exits with 143.
        'srun': f'trap "sleep 0.3; echo saved >> {log}; exit 143" TERM; kill -TERM $PPID; sleep 20 & wait $!',
    }
    for name, body in commands.items():
        path = tmp_path / name
        path.write_text(f'#!/bin/bash\n{body}\n')
        path.chmod(0o755)
    environment = {
        'PATH': f'{tmp_path}:/usr/bin:/bin',
        'SLURM_JOB_ID': '7',
        'SLURM_JOB_NODELIST': 'node1',
        'SLURM_NNODES': '1',
        'SLURM_GPUS_ON_NODE': '8',
    }
    result = subprocess.run(
        ['bash', str(EXAMPLES / 'train.sbatch'), 'data', 'runs', 'name'], env=environment, timeout=20
    )
    assert result.returncode == 0
    assert log.read_text().splitlines() == ['scontrol show hostnames node1', 'saved', 'scontrol requeue 7']
