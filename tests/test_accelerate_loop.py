"""`examples/accelerate_loop.py`: the task in the loop of accelerate, alone and in two processes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import timm_mealv2

ROOT = Path(timm_mealv2.__file__).parents[1]
SCRIPT = ROOT / 'examples/accelerate_loop.py'


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_a_loop_of_accelerate_trains_the_student(processes: int, small_sample: Path, tmp_path: Path) -> None:
    pytest.importorskip('accelerate')
    command = ['-m', 'accelerate.commands.launch', '--cpu', '--num_processes', str(processes), '--num_machines', '1']
    command += ['--mixed_precision', 'no', '--dynamo_backend', 'no', str(SCRIPT)]
    command += ['--data-dir', str(small_sample), '--epochs', '3', '--out', str(tmp_path / 'student.pth')]
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    divergence = [float(text) for text in re.findall(r'KL ([\d.]+)', result.stdout)]
    assert len(divergence) == 3
    assert divergence[-1] < divergence[0]
    state = torch.load(tmp_path / 'student.pth', weights_only=True)
    assert state['fc.weight'].shape[0] == 10
