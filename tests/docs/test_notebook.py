"""The notebook runs top to bottom, in one process as a kernel would run it."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'examples').symlink_to(ROOT / 'examples')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MPLBACKEND', 'agg')
    cells = json.loads((ROOT / 'examples/quickstart.ipynb').read_text())['cells']
    namespace: dict[str, object] = {}
    for cell in cells:
        if cell['cell_type'] == 'code':
            exec(''.join(cell['source']).replace('epochs = 30', 'epochs = 1'), namespace)
    assert (tmp_path / 'output/notebook_student/config.json').is_file()
