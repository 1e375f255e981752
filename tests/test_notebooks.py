"""Each notebook is one test, in a process of its own: all cells run at preset quick, and their inline checks are the assertions."""
import subprocess
from pathlib import Path

import pytest

from command import COMMAND

NOTEBOOKS = sorted((Path(__file__).parent.parent/"nbs").glob("[0-9][0-9]_*.ipynb"))
SECONDS = {"04_activations": 420, "07_training": 600}                          # the rest must finish within the default
DEFAULT = 240


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path, tmp_path):
    "Through the same command a reader uses."
    command = [*COMMAND, "reproduce", "--preset", "quick", "--only", path.stem, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS.get(path.stem, DEFAULT))
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path/"notebooks"/path.name).exists()
