"""Each notebook is one test, in a kernel of its own: all cells run at preset quick, and their inline checks are the assertions."""
import pytest

from sparse_coding.presets import preset
from sparse_coding.runs import cache_dir, read_json
from sparse_coding.tools.runner import environment, execute, notebooks, page_name

NOTEBOOKS = notebooks()
SECONDS = 600     # for one cell: any page may be the first that harvests and trains


@pytest.mark.parametrize("path", NOTEBOOKS, ids=page_name)
def test_notebook(path, tmp_path):
    "By the runner that the command line uses."
    env = environment(preset("quick"), tmp_path, tmp_path/"claims.json")
    execute(path, tmp_path/path.name, env, timeout=SECONDS)


def test_nothing_was_harvested_twice():
    "A notebook's own functions and those exported from it have one hash, so all notebooks share one store."
    made = [read_json(f) for f in cache_dir().glob("activations/*/config.json")]
    same = [tuple(sorted((k, str(v)) for k,v in c.items() if k != "code")) for c in made]
    if not made: pytest.skip("no notebook was run before")
    assert len(set(same)) == len(same)
