"""Runs, assets and ledger where a notebook page would be too dull: processes that die or race, archives that are wrong, folders that cannot be written."""
import ast, importlib, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest
import torch

from sparse_coding import runs
from sparse_coding.presets import PRESETS, SparseCodingError, preset
from sparse_coding.runs import cache_dir, code_hash, load_or_compute, sha256
from sparse_coding.assets import WHEELS, fetch
from sparse_coding.ledger import claims, record, report

SLOW = """
import os, sys, time
from pathlib import Path
from sparse_coding.runs import load_or_compute
def compute(folder):
    with open(Path(os.environ["LOG"]), "a") as f: f.write("start\\n")
    for i in range(20):
        part = folder/f"{i}.txt"
        if part.exists(): continue
        time.sleep(.1)
        part.write_text(str(i))
print(load_or_compute("slow", {"x": 1}, compute))
"""


@pytest.fixture
def slow(own_cache, tmp_path):
    env = {**os.environ, "LOG": str(tmp_path/"log")}
    start = lambda: subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, text=True, env=env)
    return start, tmp_path/"log"


def test_killed_work_is_continued_and_appears_whole(slow, own_cache):
    start, log = slow
    first = start()
    while not list(own_cache.glob("slow/*.partial/3.txt")): time.sleep(.02)
    first.send_signal(signal.SIGKILL); first.wait()
    kept = len(list(own_cache.glob("slow/*.partial/*.txt")))
    assert 3 <= kept < 20 and not [p for p in own_cache.glob("slow/*") if p.is_dir() and p.suffix != ".partial"]
    second = start()
    folder = Path(second.communicate()[0].strip())
    assert sorted(int(p.stem) for p in folder.glob("*.txt")) == list(range(20))
    assert not list(own_cache.glob("slow/*.partial"))


def test_two_processes_do_the_work_once(slow):
    start, log = slow
    both = [start(), start()]
    outputs = {p.communicate()[0] for p in both}
    assert len(outputs) == 1 and log.read_text() == "start\n"


def test_a_damaged_wheel_is_fetched_again_and_a_wrong_one_refused(own_cache, tmp_path, monkeypatch):
    good = fetch("chatterbot")
    stick = tmp_path/"stick"; stick.mkdir()
    shutil.copy(good, stick)
    good.write_bytes(good.read_bytes()[:1000])
    assert sha256(fetch("chatterbot", source=stick)) == WHEELS["chatterbot"][1]
    next(stick.glob("*.whl")).write_bytes(good.read_bytes()[:-10] + b"0123456789")
    fetch("chatterbot").unlink()
    with pytest.raises(SparseCodingError, match="hash is not the pinned one"): fetch("chatterbot", source=stick)


def test_without_pip_there_is_one_clear_sentence(own_cache, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SparseCodingError, match="no pip"): fetch("chatterbot")


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path/"file").write_text("in the way")
    monkeypatch.setenv("SPARSE_CODING_CACHE", str(tmp_path/"file"/"cache"))
    with pytest.raises(SparseCodingError, match="SPARSE_CODING_CACHE"): cache_dir()


@pytest.mark.parametrize("name", ["gpu", "cuda:77", "meta", "9 3"])
def test_a_device_that_is_not_here_is_refused(monkeypatch, name):
    monkeypatch.setenv("SPARSE_CODING_DEVICE", name)
    with pytest.raises(SparseCodingError, match=f"SPARSE_CODING_DEVICE={name} cannot") as e: runs.device()
    assert "\n" not in str(e.value)


def test_a_device_that_is_here_is_taken(monkeypatch):
    monkeypatch.setenv("SPARSE_CODING_DEVICE", "cpu")
    assert runs.device() == torch.device("cpu")


def test_what_is_kept_of_a_result_does_not_need_git(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert runs.commit.__wrapped__() is None


LOGS = {"resume", "train"}         # of the trainer: JSON in ASCII; their text is part of the name under which dictionaries are kept


def without_encoding(tree):
    "Calls that open a text file or a text pipe in the locale's encoding."
    tree.body = [n for n in tree.body if getattr(n, "name", None) not in LOGS]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call): continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        mode = given.get("mode", next((a.value for a in node.args[1:2] if isinstance(a, ast.Constant)), "r"))
        text = name in ("read_text", "write_text") or (name == "open" and "b" not in str(mode)) or given.get("text") or given.get("universal_newlines")
        if text and "encoding" not in given and not (name == "read_text" and node.args): yield ast.unparse(node)


def test_text_is_utf8_whatever_the_locale():
    found = {m.name: list(without_encoding(ast.parse(m.read_text(encoding="utf-8")))) for m in Path(runs.__file__).parent.rglob("*.py")}
    git = found.pop("runs.py")                                                       # answers of git: a hash, and whether there is something
    assert len(git) == 1 and "git" in git[0] and not {m: f for m,f in found.items() if f}
    assert len(list(without_encoding(ast.parse("open(a); open(a, 'rb'); b.read_text(); open(a, encoding='utf-8'); run(c, text=True)")))) == 3


def test_compiled_loops_are_kept_in_the_cache_folder(own_cache, tmp_path):
    "Neither the folder of the library nor the home folder may be writable: the first is on a shared disk, the second full or none."
    show = "from sparse_coding.engine import add_rows; print(add_rows._cache.cache_path)"
    ask = lambda **env: subprocess.run([sys.executable, "-c", show], stdout=subprocess.PIPE, encoding="utf-8", env={**os.environ, "HOME": "/proc/none", **env})
    assert str(own_cache) in ask().stdout
    assert str(tmp_path/"mine") in ask(NUMBA_CACHE_DIR=str(tmp_path/"mine")).stdout


def test_unknown_preset_is_refused(monkeypatch):
    monkeypatch.setenv("SPARSE_CODING_PRESET", "huge")
    with pytest.raises(SparseCodingError, match="quick, laptop, paper"): preset()


@pytest.mark.parametrize("changes, says", [
    (dict(steps=0), "steps = 0 .* greater than or equal to 1"), (dict(steps="200"), "steps = '200' .* integer"),
    (dict(steps=2.5), "steps = 2.5 .* integer"), (dict(steps=True), "steps = True .* integer"), (dict(steps=None), "steps"),
    (dict(lr=0), "lr = 0 .* greater than 0"), (dict(lr=float("nan")), "lr = nan .* finite"), (dict(fold=1), "fold = 1 .* boolean"),
    (dict(layers=[]), r"layers = \(\) .* at least 1"), (dict(layers=3), "layers = 3 .* tuple"), (dict(layers=["9"]), "layers.*'9'.*integer"),
    (dict(layers=[3, -1]), "-1 is negative"), (dict(layer=-1), "-1 is negative"), (dict(layers=[3, 3]), "3 twice"),
    (dict(mlp_layers=[]), "mlp_layers"), (dict(attn_layers=[5, 5]), "attn_layers .* 5 twice"), (dict(alphas=[-1]), "-1 is negative"),
    (dict(ratios=[0., 2.]), "ratios"), (dict(ratio=1e400, ratios=[1e400]), "finite"), (dict(attn_k=0), "attn_k = 0"),
    (dict(corpus=""), "corpus = ''"), (dict(model=3), "model = 3 .* string"), (dict(dtype="float8"), "dtype = 'float8' .* 'float16'"),
    (dict(size="huge"), "size = 'huge'"), (dict(alpha_unit="x"), "alpha_unit"), (dict(max_norm=0.), "max_norm"), (dict(seed=-1), "-1 is negative"),
    (dict(seed=2**40), "seed"), (dict(n_tokens=100), "n_tokens = 100 .* row_len = 256"), (dict(attn_tokens=100), "attn_row_len"),
    (dict(row_len=1), "row_len = 1"), (dict(alpha=.5), "not in the sweep"), (dict(ratio=3.), "not in the sweep"), (dict(layerz=1), "layerz")],
    ids=lambda a: next(iter(a)) if isinstance(a, dict) else "")
def test_settings_that_cannot_work_are_refused(changes, says):
    with pytest.raises(SparseCodingError, match=says) as e: preset(**changes)
    assert "\n" not in str(e.value)


def test_settings_may_come_as_lists_arrays_and_paths(tmp_path):
    "And the presets themselves come through as they are, to the letter: their text is part of names in the cache."
    import numpy as np
    p = preset(layers=np.array([3, 9]), layer=np.int64(3), ratios=range(1, 3), model=tmp_path, attn_k=None, max_norm=None)
    assert (p.layers, p.layer, p.ratios, p.model, p.attn_k) == ((3, 9), 3, (1., 2.), str(tmp_path), None)
    for name,q in PRESETS.items(): assert repr(preset(name)) == repr(q)


@pytest.mark.parametrize("text", ["steps=3", "[1]", "3", "null", "{", '{"name": "laptop"}'])
def test_changes_from_outside_that_are_no_object(monkeypatch, text):
    monkeypatch.setenv("SPARSE_CODING_SET", text)
    with pytest.raises(SparseCodingError, match="SPARSE_CODING_SET=") as e: preset()
    assert "\n" not in str(e.value)


def test_the_hash_of_code_follows_helpers_methods_and_constants(tmp_path, monkeypatch):
    "Against a module written to disk in variants; only those that compute something else may differ."
    base = ("SIZE = 3\nclass A:\n    def go(self, x): return helper(x)\ndef helper(x): return x + SIZE\n"
            "def job(x): return A().go(x)\n")
    variants = {"same": base.replace("def job(x): return", "def job(x:int)->int:\n    'Words.'\n    # more\n    return"),
                "constant": base.replace("SIZE = 3", "SIZE = 4"), "helper": base.replace("x + SIZE", "x - SIZE"),
                "method": base.replace("return helper(x)", "return helper(x) + 0"), "base": base}
    hashes = {}
    for name,text in variants.items():
        path = tmp_path/f"{name}.py"; path.write_text(text)
        spec = importlib.util.spec_from_file_location(f"sparse_coding.{name}", path)
        module = importlib.util.module_from_spec(spec); sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        hashes[name] = code_hash(module.job)
        del sys.modules[spec.name]
    assert hashes["same"] == hashes["base"]
    assert len(set(hashes.values())) == 4


def test_two_helpers_of_one_name_are_both_hashed_and_moving_changes_nothing(tmp_path):
    "A function that calls helpers of the same name from two modules sees both; the modules' own names do not count."
    def load(name, text, **scope):
        path = tmp_path/f"{name}.py"; path.write_text(text)
        spec = importlib.util.spec_from_file_location(f"sparse_coding.{name}", path)
        module = importlib.util.module_from_spec(spec); vars(module).update(scope)
        spec.loader.exec_module(module)
        return module
    def job(first, second, names=("a", "b", "c")):
        one, two = load(names[0], f"def helper(x): return x + {first}\n"), load(names[1], f"def helper(x): return x*{second}\n")
        user = load(names[2], "def other(x): return two(x)\ndef job(x): return one(x) + other(x)\n", one=one.helper, two=two.helper)
        return code_hash(user.job)
    assert job(1, 2) != job(3, 2) and job(1, 2) != job(1, 3)
    assert job(1, 2) == job(1, 2, names=("moved", "elsewhere", "here"))


def test_records_keep_each_other_and_verdicts_follow(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_CODING_LEDGER", str(tmp_path/"claims.json"))
    record("P1-fig1", "drawn")
    record("P1-recover", .97, (.95, .99), n=5, random=.6)
    record("P1-recover", .95, (.85, .99), n=5, random=.6)
    rows = {r["id"]: r for r in report(tmp_path/"claims.json")}
    assert rows["P1-fig1"]["verdict"] == "not comparable" and rows["P1-recover"]["verdict"] == "partly"
    assert {"id", "paper", "section", "figure", "claim", "paper_value", "rule", "measured", "ci95", "n", "seed", "preset", "model",
            "verdict", "seconds", "commit"} <= set(rows["P1-recover"])
    assert {r["verdict"] for r in rows.values()} == {"not comparable", "partly", "not measured"}
    record("P1-fig3l", {}, working="SAE")                                       # as an older version may have written it
    with pytest.raises(SparseCodingError, match="P1-fig3l has no 'intervals'"): report(tmp_path/"claims.json")


@pytest.mark.parametrize("medium, error, choice", [
    (.5, 4e-7, "medium"), (1.05, 4e-7, "medium"), (1.3, 4e-7, "highest"), (.2, 3e-3, "highest")])
def test_the_product_is_chosen_by_accuracy_and_not_by_a_busy_moment(monkeypatch, medium, error, choice):
    "Twice as fast; about equal; clearly slower; fast because it is bfloat16."
    monkeypatch.setattr(runs, "probe_matmul", lambda: {"highest": (1., 3e-7), "high": (1., 3e-7), "medium": (medium, error)})
    assert runs.best_matmul.__wrapped__() == choice


def test_a_run_is_told_what_it_needed_and_what_each_part_cost(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_CODING_CACHE", str(tmp_path/"cache"))
    monkeypatch.setenv("SPARSE_CODING_USED", str(tmp_path/"used.txt"))
    def inner(folder): time.sleep(.3)
    def outer(folder):
        load_or_compute("inner", {}, inner)
        time.sleep(.1)
    def breaks(folder): raise ValueError
    load_or_compute("outer", {}, outer)
    with pytest.raises(ValueError): load_or_compute("breaks", {}, breaks)
    load_or_compute("inner", {}, inner)
    found = [(line.split("/")[0], float(line.split()[1])) for line in (tmp_path/"used.txt").read_text().splitlines()]
    assert [kind for kind, _ in found] == ["inner", "outer", "inner"]
    assert .3 <= found[0][1] < 2 and .1 <= found[1][1] < .3 and found[2][1] == 0


def test_a_key_is_the_same_in_another_process_and_folder(tmp_path):
    "Else a cache could not be handed round, and what is kept would be computed anew each time."
    from sparse_coding.corpora import _write_rows
    from sparse_coding.paper2.recursive import trace, trace_back
    shutil.copytree(Path(__file__).parent.parent/"sparse_coding", tmp_path/"sparse_coding", ignore=shutil.ignore_patterns("__pycache__"))
    show = ("from sparse_coding.corpora import _write_rows\nfrom sparse_coding.paper2.recursive import trace, trace_back\n"
            "from sparse_coding.runs import code_hash\nprint(code_hash(_write_rows), code_hash(trace, trace_back))")
    done = subprocess.run([sys.executable, "-c", show], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONHASHSEED": "7"},
                          capture_output=True, text=True)
    assert done.stdout.split() == [code_hash(_write_rows), code_hash(trace, trace_back)], done.stderr[-2000:]
