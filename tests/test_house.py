"""The house rules: data flows one way, one module per notebook, cells a reader can take in, nothing stored that should not be."""
import ast, json, re, statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = "foundation", "paper1", "paper2", "related", "tools"
NOTEBOOKS = [p for folder in FOLDERS for p in sorted((ROOT/"nbs"/folder).glob("[0-9][0-9]_*.ipynb"))]


def module_of(path): return path.stem[3:] if path.parent.name == "foundation" else f"{path.parent.name}.{path.stem[3:]}"


PLACE = {module_of(p): i for i,p in enumerate(NOTEBOOKS)}


def cells(path, kind): return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]
def source(cell): return "".join(cell["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_module_has_the_notebooks_name(path):
    exports = re.findall(r"#\| default_exp (\S+)", "\n".join(map(source, cells(path, "code"))))
    assert exports == [module_of(path)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_imports_point_back(path):
    "A notebook, and so its module, imports only from notebooks before it."
    code = "\n".join(l for c in cells(path, "code") for l in source(c).splitlines() if not l.startswith(("%", "!")))
    for node in ast.walk(ast.parse(code)):
        names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if (name or "").startswith("sparse_coding."): assert PLACE[name.removeprefix("sparse_coding.")] < PLACE[module_of(path)], name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_cells_are_short_and_outputs_clean(path):
    code = cells(path, "code")
    longest = max(code, key=lambda c: source(c).count("\n"))
    assert source(longest).count("\n") < 30, source(longest)[:200]
    assert not any(o["output_type"] == "error" for c in code for o in c["outputs"])
    assert not any("widget-view" in json.dumps(o) for c in code for o in c["outputs"]), "a stored progress bar"
    assert path.stat().st_size < 1_500_000


def test_library_does_not_import_nbdev_or_pickle():
    for module in (ROOT/"sparse_coding").rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert not {n.split(".")[0] for n in names} & {"nbdev", "pickle", "dill", "joblib"}, module.name


def test_modules_and_notebooks_correspond():
    files = [p.relative_to(ROOT/"sparse_coding").with_suffix("") for p in (ROOT/"sparse_coding").rglob("*.py")]
    modules = {".".join(p.parts) for p in files if p.name not in ("__init__", "_modidx")}
    assert modules == set(PLACE)


def test_links_between_notebooks_lead_somewhere():
    for path in [*NOTEBOOKS, ROOT/"README.md"]:
        text = path.read_text(encoding="utf-8") if path.suffix == ".md" else "\n".join(map(source, cells(path, "markdown")))
        for target in re.findall(r"\]\(([^)#:]+\.ipynb)\)", text):
            assert (path.parent/target).exists(), f"{path.name} links to {target}"


def test_readme_and_last_page_say_what_the_ledger_says():
    from sparse_coding.ledger import report
    from sparse_coding.tools.command_line import table
    from sparse_coding.ledger import tally
    rows = report(ROOT/"nbs"/"claims"/"laptop.json")
    assert tally(rows) + "\n\n" + table(rows) in (ROOT/"README.md").read_text(encoding="utf-8"), "sparse-coding report --write"
    stored = json.dumps([c["outputs"] for c in cells(ROOT/"nbs"/"tools"/"90_command_line.ipynb", "code")])
    for paper in ("P1", "P2"): assert tally([r for r in rows if r["paper"] == paper]) in stored, f"the tally of {paper} in 90_command_line"
