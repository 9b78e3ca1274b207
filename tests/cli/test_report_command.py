"""Tests of timm_mealv2/cli/report.py: the program as a user runs it."""

from pathlib import Path

import pytest

from timm_mealv2.cli.report import main
from timm_mealv2.command_line import run_cli


def test_the_command_draws_one_run_into_its_folder_and_several_into_another(tmp_path: Path) -> None:
    run = tmp_path / 'first'
    run.mkdir()
    (run / 'summary.csv').write_text('epoch,train_loss,lr\n0,1.5,0.1\n')
    (run / 'args.yaml').write_text('lr: 0.1\n')
    main([str(run)])
    assert (run / 'curves.png').is_file()
    assert (run / 'report.html').is_file()
    other = tmp_path / 'second'
    other.mkdir()
    (other / 'summary.csv').write_text((run / 'summary.csv').read_text())
    main([str(run), str(other), '--out', str(tmp_path / 'both')])
    assert {path.name for path in (tmp_path / 'both').iterdir()} == {'curves.png', 'report.html'}
    assert '<th>second</th>' in (tmp_path / 'both/report.html').read_text()


def test_what_is_no_run_is_one_line_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'run').mkdir()
    with pytest.raises(SystemExit) as exit_info:
        run_cli(main, [str(tmp_path / 'run'), '--out', str(tmp_path / 'out')])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.count('\n') == 1
    assert not (tmp_path / 'out').exists()
