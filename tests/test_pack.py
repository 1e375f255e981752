"""A pack made on one machine and taken on another: whole, altered, cut short, of another version, and with names that lead astray."""
import json
import os
import time

import pytest

from sparse_coding.presets import SparseCodingError
from sparse_coding.runs import cache_dir, load_or_compute
from sparse_coding.tools import pack as packing


@pytest.fixture
def machines(tmp_path, monkeypatch):
    "A function that moves to another machine: another cache."
    monkeypatch.setattr(packing, "WHEELS", {})
    def go(name): monkeypatch.setenv("SPARSE_CODING_CACHE", str(tmp_path/name))
    go("first")
    return go


def result(kind, name, n=100):
    def compute(folder):
        (folder/"weights.bin").write_bytes(os.urandom(n))
        (folder/"more").mkdir()
        (folder/"more"/"text.json").write_text("{}")
    return load_or_compute(kind, {"name": name}, compute)


def a_run(tmp_path, monkeypatch):
    "A run that used three results, one of them twice, beside one that it did not use."
    (run := tmp_path/"run").mkdir(), (run/"used").mkdir()
    result("dictionaries", "not used")
    monkeypatch.setenv("SPARSE_CODING_USED", str(run/"used"/"page.txt"))
    for kind, name in (("dictionaries", "a"), ("evidence", "b"), ("activations", "c"), ("dictionaries", "a")): result(kind, name)
    monkeypatch.delenv("SPARSE_CODING_USED")
    (run/"figures").mkdir()
    (run/"figures"/"fig1.png").write_bytes(b"picture")
    return run


def everything(root): return {f.relative_to(root).as_posix(): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file() and f.suffix != ".lock"}


def test_a_run_notes_what_it_asks_for_and_a_pack_holds_no_more(tmp_path, machines, monkeypatch):
    run = a_run(tmp_path, monkeypatch)
    assert [kind for kind, _ in packing.used_by(run)] == ["activations", "dictionaries", "evidence"]
    names = packing.contents(run)
    assert len({n.split("/")[2] for n in names if n.startswith("cache/")}) == 3 and "run/figures/fig1.png" in names
    assert not any("activations" in n for n in packing.contents(run, small=True))
    with pytest.raises(SparseCodingError, match="no finished run"): packing.used_by(tmp_path)


def test_another_machine_has_the_same_files(tmp_path, machines, monkeypatch):
    run = a_run(tmp_path, monkeypatch)
    stick = packing.pack(tmp_path/"stick", run, "quick")
    mine = everything(cache_dir())
    machines("second")
    found = packing.take_pack(stick)
    assert found == {"wheels": 0, "taken": 3, "here before": 0, "differ": []}
    theirs = everything(cache_dir())
    assert theirs.items() <= mine.items() and len(theirs) == 9
    assert packing.take_pack(stick)["here before"] == 3
    before = packing.cache_items()
    result("dictionaries", "a")
    assert {i.key for i in packing.cache_items()} == {i.key for i in before}                  # warm: nothing was computed


def test_an_interrupted_taking_goes_on(tmp_path, machines, monkeypatch):
    stick = packing.pack(tmp_path/"stick", a_run(tmp_path, monkeypatch), "quick")
    machines("second")
    whole, calls = packing.copied, []
    def stops(source, target):
        calls.append(target)
        if len(calls) == 5: raise KeyboardInterrupt
        whole(source, target)
    monkeypatch.setattr(packing, "copied", stops)
    with pytest.raises(KeyboardInterrupt): packing.take_pack(stick)
    monkeypatch.setattr(packing, "copied", whole)
    found = packing.take_pack(stick)
    assert found["taken"] == 2 and found["here before"] == 1
    assert not [i for i in cache_dir().rglob("*") if i.suffix in (".taking", ".part")]


@pytest.mark.parametrize("harm, says", [
    (lambda f: f.write_bytes(b"x" + f.read_bytes()[1:]), "hash differs"),
    (lambda f: f.write_bytes(f.read_bytes()[:-1]), "hash differs"),
    (lambda f: f.unlink(), "missing from the pack")])
def test_an_altered_file_is_named_and_its_result_refused(tmp_path, machines, monkeypatch, harm, says):
    stick = packing.pack(tmp_path/"stick", a_run(tmp_path, monkeypatch), "quick")
    bad = next((stick/"cache"/"evidence").rglob("weights.bin"))
    harm(bad)
    machines("second")
    with pytest.raises(SparseCodingError, match=says) as e: packing.take_pack(stick)
    assert str(bad) in str(e.value) and not [i for i in packing.cache_items() if i.kind == "evidence"]


def test_names_that_lead_out_of_the_pack_are_refused(tmp_path, machines, monkeypatch):
    stick = packing.pack(tmp_path/"stick", a_run(tmp_path, monkeypatch), "quick")
    about = json.loads((stick/"pack.json").read_text())
    entry = next(iter(about["files"].values()))
    for name in ("cache/evidence/../../../../etc/x", "cache/evidence/key/../../../../../x", "/etc/passwd", "elsewhere/x", "cache/../cache/../../x"):
        (stick/"pack.json").write_text(json.dumps(about | {"files": {name: entry}}))
        machines("second")
        with pytest.raises(SparseCodingError, match="outside of the pack"): packing.take_pack(stick)
    assert not (tmp_path.parent/"x").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2, "files": {}}', '{"format": 1, "files": []}', '{"format": 1}',
                                  '{"format": 1, "files": {"cache/a": 3}}', '{"format": 1, "files": {"cache/a/b/c": {"bytes": "x"}}}'])
def test_what_is_no_pack_is_said_in_a_sentence(tmp_path, machines, text):
    (tmp_path/"pack.json").write_text(text)
    with pytest.raises(SparseCodingError): packing.take_pack(tmp_path)


def test_a_pack_of_another_version_is_used_as_far_as_it_fits(tmp_path, machines, monkeypatch):
    stick = packing.pack(tmp_path/"stick", a_run(tmp_path, monkeypatch), "quick")
    about = json.loads((stick/"pack.json").read_text())
    about["library"]["engine.py"] = "0"*64
    about["version"] = "0.0.1"
    (stick/"pack.json").write_text(json.dumps(about))
    machines("second")
    found = packing.take_pack(stick)
    assert found["differ"] == ["engine.py"] and found["taken"] == 3


def test_pruning_by_kind_and_by_age(machines):
    old, new = result("activations", "old"), result("dictionaries", "new")
    os.utime(old, (time.time() - 40*86400,)*2)
    os.utime(new, (time.time() - 40*86400,)*2)
    result("dictionaries", "new")                                             # asked for: young again
    assert packing.prune(unused_days=30)[0] == 1 and not old.exists() and new.exists()
    assert packing.prune(["dictionaries"])[0] == 1 and not new.exists()
    with pytest.raises(SparseCodingError, match="no 'stores'"): packing.prune(["stores"])
