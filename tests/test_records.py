"""Every claim is recorded by its page, and no condition around a record rests on a name that another cell rebinds."""
import ast
import json
from pathlib import Path

import pytest

from sparse_coding.ledger import claims

NBS = Path(__file__).parent.parent/"nbs"
PAGES = sorted({c.page for c in claims().values()})


def trees(page):
    "The code cells of a page, parsed; magics left out."
    cells = json.loads((NBS/f"{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    return [ast.parse("\n".join(l for l in t.splitlines() if not l.startswith(("%", "!")))) for t in code]


def calls(tree, names):
    "Calls of some functions."
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in names]


def recorders(page):
    "`record`, and what the page defines to call it."
    defined = [n for tree in page for n in tree.body if isinstance(n, ast.FunctionDef)]
    return {"record"} | {f.name for f in defined if calls(f, {"record"})}


def bound(tree):
    "Names that a cell binds at its top level, in loops and under conditions too, but not inside functions."
    found, todo = set(), list(tree.body)
    while todo:
        n = todo.pop()
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)): found.add(n.name)
        elif isinstance(n, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)): continue
        else:
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store): found.add(n.id)
            todo += ast.iter_child_nodes(n)
    return found


def conditions(page):
    "Names in the conditions around records."
    names = recorders(page)
    for tree in page:
        for n in ast.walk(tree):
            if isinstance(n, ast.If) and any(calls(s, names) for s in n.body + n.orelse):
                yield from (m.id for m in ast.walk(n.test) if isinstance(m, ast.Name))


@pytest.mark.parametrize("page", PAGES)
def test_every_claim_stands_where_a_record_is_made(page):
    cells, wanted = trees(page), {c.id for c in claims().values() if c.page == page}
    names = recorders(cells)
    written = {n.value for tree in cells if calls(tree, names) for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert wanted <= written, f"{page} never records {sorted(wanted - written)}"


@pytest.mark.parametrize("page", PAGES)
def test_no_condition_of_a_record_is_rebound(page):
    cells = trees(page)
    for name in set(conditions(cells)):
        where = [k for k,tree in enumerate(cells) if name in bound(tree)]
        assert len(where) <= 1, f"{page}: {name!r} decides over a record and is bound in code cells {where}"


def test_a_rebound_condition_is_found():
    cells = [ast.parse(t) for t in ("chosen = None", "for chosen in (1, 2): pass", "if chosen is None: record('P1-tree', 1)")]
    assert list(conditions(cells)) == ["chosen"] and sum("chosen" in bound(c) for c in cells) == 2
