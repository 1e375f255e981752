"""The house rules: who may import whom, one module per page, pages a reader can take in, nothing stored that should not be."""
import ast, json, re, statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = "foundation", "paper1", "paper2", "related", "tools"
NOTEBOOKS = [p for folder in FOLDERS for p in sorted((ROOT/"nbs"/folder).glob("[0-9][0-9]_*.ipynb"))]
SECTIONS = [p for p in NOTEBOOKS if p.parent.name.startswith(("paper", "related")) and p.stem != "00_claims"]


def name(path): return f"{path.parent.name}/{path.stem}"
def module_of(path): return path.stem[3:] if path.parent.name == "foundation" else f"{path.parent.name}.{path.stem[3:]}"
def folder_of(module): return module.split(".")[0] if "." in module else "foundation"
def cells(path, kind="code"): return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]
def source(cell): return "".join(cell["source"])
def lines(cell): return [l for l in source(cell).splitlines() if l.strip()]
def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom): yield node.module or "", [a.name for a in node.names]
        elif isinstance(node, ast.Import): yield from ((a.name, []) for a in node.names)


PLACE = {module_of(p): i for i,p in enumerate(NOTEBOOKS)}
pages = lambda paths: pytest.mark.parametrize("path", paths, ids=name)


@pages(NOTEBOOKS)
def test_module_has_the_pages_name(path):
    assert re.findall(r"#\| default_exp (\S+)", "\n".join(map(source, cells(path)))) == [module_of(path)]


@pages(NOTEBOOKS)
def test_who_may_import_whom(path):
    "Foundation: earlier pages of it. A part: foundation and earlier pages of its own. Tools: everything before them. Nobody: private names."
    code = "\n".join(l for c in cells(path) for l in source(c).splitlines() if not l.startswith(("%", "!")))
    own = module_of(path)
    for module,names in imports(ast.parse(code)):
        if not module.startswith("sparse_coding."): continue
        other = module.removeprefix("sparse_coding.")
        assert PLACE[other] < PLACE[own], f"{own} imports {other}, which comes after it"
        assert folder_of(own) == "tools" or folder_of(other) in ("foundation", folder_of(own)), f"{own} imports {other}"
        assert not [n for n in names if n.startswith("_")], f"{own} imports {names} of {other}"


@pages(NOTEBOOKS)
def test_cells_can_be_taken_in(path):
    sizes = sorted(len(lines(c)) for c in cells(path) if lines(c))
    long = [l for c in cells(path) for l in source(c).splitlines() if len(l) > 120]
    assert not long, f"{len(long)} lines over 120 characters, such as {long[0]}"
    assert sizes[-1] <= 30
    assert sizes[int(.9*(len(sizes) - 1))] <= (12 if path in SECTIONS else 16)
    assert path not in SECTIONS or statistics.median(sizes) <= 6


@pages(SECTIONS)
def test_the_paper_comes_before_the_machinery(path):
    "A figure soon, and a tenth of the code at most for the ledger."
    all_cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    shows = lambda c: c["cell_type"] == "code" and "#| export" not in source(c) and re.search(r"\bstamp\(", source(c))
    figures = [i for i,c in enumerate(all_cells) if shows(c)]
    assert figures and figures[0] <= 20, f"first figure at cell {figures[:1]}"
    judged = sum(len(lines(c)) for c in cells(path) if re.search(r"^@claim|\brecord\(", source(c), re.M))
    assert judged <= .1*sum(len(lines(c)) for c in cells(path))


@pages(NOTEBOOKS)
def test_stored_outputs_are_clean(path):
    outputs = [o for c in cells(path) for o in c["outputs"]]
    assert not any(o["output_type"] == "error" for o in outputs)
    assert not any("widget-view" in json.dumps(o) for o in outputs), "a stored progress bar"
    texts = ["".join(o.get("text", [])) + "".join(o.get("data", {}).get("text/plain", [])) for o in outputs]
    digits = re.compile(r"(?<![\w.])-?(\d*\.\d+)(?:e-?\d+)?(?![\w.])")
    many = [m[0] for t in texts for m in digits.finditer(t) if len(m[1].replace(".", "").strip("0")) > 4]
    assert not many, f"numbers with more than four digits: {many[:5]}"
    assert path.stat().st_size < 1_500_000


def test_library_does_not_import_nbdev_or_pickle():
    for module in (ROOT/"sparse_coding").rglob("*.py"):
        used = {m.split(".")[0] for m,_ in imports(ast.parse(module.read_text(encoding="utf-8")))}
        assert not used & {"nbdev", "pickle", "dill", "joblib"}, module.name


def test_modules_and_pages_correspond():
    files = [p.relative_to(ROOT/"sparse_coding").with_suffix("") for p in (ROOT/"sparse_coding").rglob("*.py")]
    assert {".".join(p.parts) for p in files if p.name not in ("__init__", "_modidx")} == set(PLACE)


def test_links_lead_somewhere():
    for path in [*NOTEBOOKS, *ROOT.glob("*.md"), *(ROOT/"nbs").rglob("*.md")]:
        text = path.read_text(encoding="utf-8") if path.suffix == ".md" else "\n".join(map(source, cells(path, "markdown")))
        for target in re.findall(r"\]\(([^)#:]+\.(?:ipynb|md|png))\)", text):
            assert (path.parent/target).exists(), f"{path.name} links to {target}"


def test_names_that_pages_once_had_lead_to_pages():
    from sparse_coding.tools.runner import WENT
    assert set(WENT.values()) <= {name(p) for p in NOTEBOOKS}


def test_readme_and_table_say_what_the_ledger_says():
    from sparse_coding.ledger import claims_table, report, tally
    rows = report(ROOT/"nbs"/"claims"/"laptop.json")
    assert tally(rows) in (ROOT/"README.md").read_text(encoding="utf-8"), "sparse-coding report --write"
    assert claims_table(rows) in (ROOT/"nbs"/"claims"/"claims.md").read_text(encoding="utf-8"), "sparse-coding report --write"


def test_every_claim_is_recorded_by_its_page():
    from sparse_coding.ledger import claims
    code = {name(p): "\n".join(map(source, cells(p))) for p in NOTEBOOKS}
    for c in claims().values():
        assert f'"{c.id}"' in code[c.page], f"{c.page} does not record {c.id}"


def test_the_library_door_of_readme_opens():
    "The lines that README shows to users of the library run as they stand."
    code = re.search(r"```python\n(.*?)```", (ROOT/"README.md").read_text(encoding="utf-8"), re.S)[1]
    scope = {}
    exec(code, scope)
    assert (scope["sae"].encode(scope["x"]) > 0).any()


def test_the_cost_of_every_page_is_known():
    "So that estimates hold: after a page is added, `sparse-coding reproduce` from an empty cache, and `sparse-coding estimate --record out/quick`."
    known = json.loads((ROOT/"nbs"/"costs.json").read_text(encoding="utf-8"))["quick"]["pages"]
    assert {name(p) for p in NOTEBOOKS if "_bench" not in p.stem} <= set(known)
