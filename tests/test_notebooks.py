"""Each notebook is one test, in a kernel of its own: all cells run at preset quick, and their inline checks are the assertions."""
from pathlib import Path

import pytest

from sparse_coding.core import cache_dir, preset, read_json
from sparse_coding.reproduce import environment, execute

NOTEBOOKS = sorted((Path(__file__).parent.parent/"nbs").glob("[0-9][0-9]_*.ipynb"))
SECONDS = {"04": 420, "07": 600, "20": 600, "21": 600, "22": 600, "23": 600}     # for one cell: those that may harvest and train
DEFAULT = 180


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path, tmp_path):
    "By the runner that the command line uses."
    env = environment(preset("quick"), tmp_path, tmp_path/"claims.json")
    execute(path, tmp_path/path.name, env, timeout=SECONDS.get(path.stem[:2], DEFAULT))


def test_nothing_was_harvested_twice():
    "A notebook's own functions and those exported from it have one hash, so all notebooks share one store."
    made = [read_json(f) for f in cache_dir().glob("activations/*/config.json")]
    same = [tuple(sorted((k, str(v)) for k,v in c.items() if k != "code")) for c in made]
    if not made: pytest.skip("no notebook was run before")
    assert len(set(same)) == len(same)
