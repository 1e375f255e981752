"""Stores of activations: what is written, what is refused, what survives, and in which order it comes out again."""
import errno, json, os, subprocess, sys, textwrap, warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

import sparse_coding.activations as A
from sparse_coding.presets import Site, SparseCodingError
from sparse_coding.runs import sha256
from sparse_coding.models import load_model
from sparse_coding.activations import ActivationStore, batches, estimate_harvest, harvest, load_store
sys.path.insert(0, str(Path(__file__).parent))
from tiny import tiny_model

SITE = Site(0)


class Fake:
    "A model whose activation at token t is (t, t/2, ...): every activation can be told from every other."
    name, fingerprint, device = "fake", "fake", torch.device("cpu")
    def __init__(self, d=2, edit=lambda x: x): self.d, self.edit, self.calls = d, edit, 0
    def d_in(self, site): return self.d
    def run_to(self, tokens, sites):
        self.calls += 1
        return {s: self.edit(torch.stack([tokens.float()/2**i for i in range(self.d)], -1)) for s in sites}


class FakeRows:
    "Rows of tokens in memory."
    def __init__(self, tokens):
        self.tokens = np.asarray(tokens, np.int32)
        self.row_len, self.fingerprint = self.tokens.shape[1], str(hash(self.tokens.tobytes()))
    def __len__(self): return len(self.tokens)


def numbered(n_rows=60, row_len=16, first=1): return FakeRows(np.arange(first, first + n_rows*row_len).reshape(n_rows, row_len))
def files(folder): return {f.name: sha256(f) for f in Path(folder).glob("shard-*")}
SMALL = dict(n_batch=2, shard_bytes=1)                                           # a shard is two rows


@pytest.fixture(scope="module")
def tiny(tmp_path_factory): return load_model(str(tiny_model(tmp_path_factory.mktemp("neox"))), device="cpu")


@pytest.fixture
def text(): return FakeRows(np.random.default_rng(0).integers(0, 300, (11, 24)))


# What is stored

@pytest.mark.parametrize("arch", ["gpt_neox", "gpt2", "llama"])
def test_several_sites_in_one_pass_are_what_plain_hooks_see(arch, tmp_path, text):
    model = load_model(str(tiny_model(tmp_path/"model", arch)), device="cpu")
    sites = [Site(3), Site(1, "mlp_out"), Site(2, "attn_z"), Site(0)]
    store = harvest(model, text, sites, tmp_path/"store", "float32", n_batch=3, shard_bytes=1)
    seen, handles = {}, []
    for s in sites:
        module, is_input = model.where(s)
        def grab(m, args, out, s=s, is_input=is_input): seen[s] = args[0] if is_input else out[0] if isinstance(out, tuple) else out
        handles.append(module.register_forward_hook(grab))
    model.hf(torch.tensor(text.tokens).long())
    for h in handles: h.remove()
    assert store.sites == sorted(sites) and store.n == text.tokens.size
    for s in sites:
        torch.testing.assert_close(store.read(s, 0, store.n), seen[s].flatten(0, 1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(store.norms(s), seen[s].flatten(0, 1).norm(dim=1), rtol=1e-4, atol=1e-4)


def test_every_range_reads_the_same_across_shards(tmp_path):
    rows = numbered(7, 5)
    store = harvest(Fake(), rows, SITE, tmp_path, **SMALL)
    assert len(store.shards) == 4
    for a in range(0, 36):
        for b in range(a, 36): assert store.read(SITE, a, b)[:, 0].tolist() == list(range(a + 1, b + 1))
    assert np.array_equal(store.tokens, rows.tokens)
    for a, b in ((-1, 3), (3, 2), (0, 36)):
        with pytest.raises(SparseCodingError, match="were asked for"): store.read(SITE, a, b)


def test_numbers_do_not_depend_on_shard_size(tiny, text, tmp_path):
    one, many = (harvest(tiny, text, [Site(2)], tmp_path/str(b), n_batch=2, shard_bytes=b) for b in (1, 2**25))
    assert len(one.shards) == 6 and len(many.shards) == 1
    assert torch.equal(one.read(Site(2), 0, one.n), many.read(Site(2), 0, many.n))


@pytest.mark.parametrize("dtype,step", [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8)])
def test_rounding_of_each_storage_format(dtype, step, tmp_path):
    store = harvest(Fake(1), FakeRows(np.arange(1, 4097).reshape(64, 64)), SITE, tmp_path, dtype)
    exact = torch.arange(1., 4097)
    assert ((store.read(SITE, 0, store.n)[:, 0] - exact).abs()/exact).max() <= step


def test_only_the_shard_that_overflows_is_stored_in_float32(tmp_path):
    big = np.full((6, 4), 3); big[2, 1] = 65_000; big[4, 2] = 70_001
    with pytest.warns(UserWarning, match="70,001 in shard-00002.*stored in float32"):
        store = harvest(Fake(1), FakeRows(big), SITE, tmp_path, max_norm=None, drop_first=False, **SMALL)
    kinds = [e["dtype"][str(SITE)] for f, e in sorted(store.meta["files"].items()) if f.startswith("shard")]
    assert kinds[0] == "float16" and kinds[2] == "float32"
    got = store.read(SITE, 0, 24)
    assert torch.isfinite(got).all() and got[18] == 70_001
    assert sorted(torch.cat(list(batches(store, SITE, 4, steps=6))).flatten().tolist()) == sorted(got.flatten().tolist())


def test_bfloat16_harvest_reports_its_error(tiny, text, tmp_path):
    exact = harvest(tiny, text, Site(2), tmp_path/"a", "float32", n_batch=4)
    hasty = harvest(tiny, text, Site(2), tmp_path/"b", "float32", n_batch=4, compute="bfloat16")
    x, y = (s.read(Site(2), 0, 11*24).view(11, 24, -1)[:, 1:] for s in (hasty, exact))
    assert hasty.meta["compute_error"][str(Site(2))] == pytest.approx(float((x - y).norm()/y.norm()), rel=1e-4)
    assert 1e-4 < hasty.meta["compute_error"][str(Site(2))] < .1 and "compute_error" not in exact.meta


# What counts

def test_keep_and_threshold_by_brute_force(tmp_path):
    rows = FakeRows(np.random.default_rng(1).pareto(1., (40, 9))*10 + 1)
    store = harvest(Fake(1), rows, SITE, tmp_path, "float32", max_norm=4., **SMALL)
    norms = rows.tokens.astype(float)
    expected = norms <= 4*np.median(norms[:, 1:]); expected[:, 0] = False
    assert 0 < (~expected[:, 1:]).sum() and store.threshold(SITE) == 4*np.median(norms[:, 1:])
    assert np.array_equal(store.keep(SITE).numpy().reshape(40, 9), expected)
    for a, b in ((0, 5), (9, 18), (13, 100), (359, 360)): assert torch.equal(store.keep(SITE, a, b), store.keep(SITE)[a:b])
    assert store.threshold(SITE, first=20) == 4*np.median(norms[:, 1:].ravel()[:20])
    assert store.mean_square(SITE) == pytest.approx((norms[expected]**2).mean())
    everything = ActivationStore(tmp_path, drop_first=False, max_norm=None)
    assert everything.keep(SITE).all() and everything.mean_square(SITE) == pytest.approx((norms**2).mean())
    first = ActivationStore(tmp_path, drop_first=False)
    assert np.array_equal(first.keep(SITE).numpy().reshape(40, 9), norms <= 4*np.median(norms[:, 1:]))


def test_report_of_what_was_dropped_by_brute_force(tmp_path):
    rows = FakeRows(np.random.default_rng(2).choice([1, 2, 3, 50, 60], (30, 8), p=[.4, .3, .2, .05, .05]))
    report = harvest(Fake(1), rows, SITE, tmp_path).dropped(SITE)
    inner = rows.tokens[:, 1:]
    assert report[0]["count"] == 30 and report[0]["of its kind"] == 1
    assert report[1]["count"] == (inner >= 50).sum() == sum(r["count"] for r in report[2:])
    assert {r["dropped"]: r["count"] for r in report[2:]} == {t: (inner == t).sum() for t in (50, 60)}


# The order of batches

def test_an_epoch_has_every_kept_activation_once_whatever_the_sizes(tmp_path):
    store = harvest(Fake(), numbered(), SITE, tmp_path, max_norm=3., **SMALL)
    kept = set((torch.arange(960)[store.keep(SITE)] + 1).tolist())
    for batch, block, group in ((7, 8, 32), (64, 8, 16), (50, 1000, 1), (100, 33, 99), (256, 16, 960)):
        epoch = len(kept)//batch
        drawn = torch.cat(list(batches(store, SITE, batch, block=block, group=group, steps=2*epoch)))[:, 0].int()
        for half in drawn.view(2, -1).tolist(): assert len(half) == len(set(half)) == epoch*batch and set(half) <= kept
        assert not torch.equal(*drawn.view(2, -1))


@pytest.mark.parametrize("batch,block,group", [(7, 8, 32), (50, 16, 64), (128, 1024, 2**17)])
def test_same_batches_from_other_shards_and_other_seeds_differ(batch, block, group, tmp_path):
    stores = [harvest(Fake(), numbered(), SITE, tmp_path/str(b), n_batch=1, shard_bytes=b) for b in (1, 700, 2**25)]
    assert len({len(s.shards) for s in stores}) == 3
    draw = lambda store, seed=0: torch.cat(list(batches(store, SITE, batch, seed, block=block, group=group, steps=30)))
    assert torch.equal(draw(stores[0]), draw(stores[1])) and torch.equal(draw(stores[0]), draw(stores[2]))
    assert torch.equal(draw(stores[0]), draw(stores[0])) and not torch.equal(draw(stores[0]), draw(stores[0], 1))


def test_starting_late_gives_the_same_batches_and_reads_nothing_before(tmp_path, monkeypatch):
    store = harvest(Fake(), numbered(), SITE, tmp_path, **SMALL)
    everything = list(batches(store, SITE, 30, block=8, group=64, steps=90))
    for start in (0, 1, 5, 29, 30, 31, 64):
        for got, want in zip(batches(store, SITE, 30, start=start, block=8, group=64, steps=10), everything[start:], strict=False): assert torch.equal(got, want)
    read, plain = [], A._read_group
    monkeypatch.setattr(A, "_read_group", lambda *args: read.append(args[2]) or plain(*args))
    next(batches(store, SITE, 30, start=28, block=8, group=64))
    assert len(read) <= 2                                                        # of fifteen groups


def test_batches_are_shuffled_across_the_store(tmp_path):
    store = harvest(Fake(), numbered(256, 16), SITE, tmp_path, "float32", drop_first=False, max_norm=None)
    order = torch.cat(list(batches(store, SITE, 64, block=8, group=1024, steps=64)))[:, 0]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < .15
    assert (order.diff() == 1).float().mean() < .05


def test_too_few_activations_and_negative_starts_are_refused(tmp_path):
    store = harvest(Fake(), numbered(2, 4), SITE, tmp_path)
    for how in (dict(batch_size=7), dict(batch_size=0), dict(batch_size=2, start=-1)):
        with pytest.raises(SparseCodingError, match="harvest more tokens"): batches(store, SITE, **how)


# What is refused

def test_another_harvest_in_the_folder_is_refused_and_nothing_lost(tmp_path):
    harvest(Fake(), numbered(), SITE, tmp_path, **SMALL)
    before, other = files(tmp_path), Fake()
    other.fingerprint = "other"
    for model, rows, site, dtype, what in ((other, numbered(), SITE, "float16", "model is"), (Fake(), numbered(first=2), SITE, "float16", "rows is"),
            (Fake(), numbered(), Site(1), "float16", "sites is"), (Fake(), numbered(), SITE, "float32", "dtype is"), (Fake(3), numbered(), SITE, "float16", "sites is")):
        with pytest.raises(SparseCodingError, match=what): harvest(model, rows, site, tmp_path, dtype, **SMALL)
    with pytest.raises(SparseCodingError, match="was made with fake"): ActivationStore(tmp_path).check(other)
    assert files(tmp_path) == before


def test_bad_options_are_refused_before_anything_is_written(tmp_path, tiny, text):
    for kw, what in ((dict(dtype="float8"), "Unknown dtype"), (dict(compute="int8"), "Unknown compute")):
        with pytest.raises(SparseCodingError, match=what): harvest(tiny, text, Site(1), tmp_path/"s", **kw)
    with pytest.raises(SparseCodingError, match="out of range"): harvest(tiny, text, Site(6), tmp_path/"s")
    with pytest.raises(SparseCodingError, match="No site"): harvest(tiny, text, [], tmp_path/"s")
    assert not (tmp_path/"s").exists()
    with pytest.raises(SparseCodingError, match="no activation store"): ActivationStore(tmp_path/"s")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_activations_names_site_row_and_position(bad, tmp_path):
    def edit(x):
        x[x == 70] = bad                                                         # the token 70 is row 4, position 5
        return x
    with pytest.raises(SparseCodingError, match=r"resid_post.0, row 4, position 5"):
        harvest(Fake(1, edit), numbered(), SITE, tmp_path, **SMALL)
    assert torch.isfinite(harvest(Fake(1), numbered(), SITE, tmp_path, **SMALL).norms(SITE)).all()


def test_wrong_width_is_refused(tmp_path):
    with pytest.raises(SparseCodingError, match="vectors of 2 numbers where the model declares 3"):
        harvest(Fake(3, lambda x: x[..., :2]), numbered(), SITE, tmp_path)


# What survives

class Stop(BaseException): pass


def test_stopped_anywhere_it_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    whole = files(harvest(Fake(), numbered(10), SITE, tmp_path/"whole", **SMALL).folder)
    for target in ("save_file", "sha256", "write_json", "_run_batch"):
        for k in range(4):
            folder, plain, count = tmp_path/f"{target}{k}", getattr(A, target), iter(range(99))
            def stops(*args, **kwargs):
                if next(count) == k: raise Stop
                return plain(*args, **kwargs)
            with monkeypatch.context() as m, pytest.raises(Stop):
                m.setattr(A, target, stops)
                harvest(Fake(), numbered(10), SITE, folder, **SMALL)
            model = Fake()
            assert files(harvest(model, numbered(10), SITE, folder, **SMALL).folder) == whole, (target, k)
            assert not list(folder.glob("shard*.tmp"))
    assert len(whole) == 5


def test_killed_process_resumes_to_the_same_bytes(tmp_path):
    "A real kill -9 once two shards are listed."
    code = f"""
        import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_activations import *
        slow = Fake(edit=lambda x: time.sleep(.2) or x)
        harvest(slow, numbered(40), SITE, {str(tmp_path/"killed")!r}, **SMALL)"""
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "PYTHONHASHSEED": "0"})
    meta = tmp_path/"killed"/"meta.json"
    for _ in range(1200):
        if meta.exists() and sum(f.startswith("shard") for f in json.loads(meta.read_text())["files"]) >= 2: break
        assert process.poll() is None
        __import__("time").sleep(.05)
    process.kill(); process.wait()
    rows = numbered(40)
    rows.fingerprint = json.loads(meta.read_text())["rows"]
    with pytest.raises(SparseCodingError, match="not harvested yet"): ActivationStore(tmp_path/"killed")
    model = Fake()
    store = harvest(model, rows, SITE, tmp_path/"killed", **SMALL)
    assert model.calls <= 18                                                     # of twenty
    assert files(store.folder) == files(harvest(Fake(), rows, SITE, tmp_path/"whole", **SMALL).folder)


def test_damaged_files_are_named_and_redone_and_nothing_else(tmp_path):
    store = harvest(Fake(), numbered(), SITE, tmp_path, **SMALL)
    before = files(tmp_path)
    def flip(name):
        data = bytearray((tmp_path/name).read_bytes()); data[-1] ^= 1; (tmp_path/name).write_bytes(data)
    os.truncate(tmp_path/"shard-00001.safetensors", 40)
    (tmp_path/"shard-00003.safetensors").unlink()
    flip("shard-00005.safetensors"), flip("tokens.npy")
    with pytest.raises(SparseCodingError, match="shard-00001.safetensors is truncated"): ActivationStore(tmp_path)
    model = Fake()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        store = harvest(model, numbered(), SITE, tmp_path, **SMALL)
    said = sorted(str(w.message).split(os.sep)[-1].split(":")[0] for w in said)
    assert [s.split()[0] for s in said] == ["shard-00001.safetensors", "shard-00003.safetensors", "shard-00005.safetensors", "tokens.npy"]
    assert "truncated" in said[0] and "missing" in said[1] and "altered" in said[2] and "altered" in said[3]
    assert model.calls == 3 and files(tmp_path) == before and store.verify() is store


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")])
@pytest.mark.parametrize("target,k", [("save_file", 0), ("save_file", 3), ("write_json", 2)])
def test_full_disk_is_one_clear_error_and_resumes(error, target, k, tmp_path, monkeypatch):
    plain, count = getattr(A, target), iter(range(99))
    def full(*args, **kwargs):
        if next(count) == k:
            if target == "save_file": Path(args[1]).write_bytes(b"half")
            raise error
        return plain(*args, **kwargs)
    with monkeypatch.context() as m, pytest.raises(SparseCodingError, match="is full: free some space"):
        m.setattr(A, target, full)
        harvest(Fake(), numbered(), SITE, tmp_path/"s", **SMALL)
    assert not list((tmp_path/"s").glob("shard*.tmp"))
    model = Fake()
    assert files(harvest(model, numbered(), SITE, tmp_path/"s", **SMALL).folder) == files(harvest(Fake(), numbered(), SITE, tmp_path/"w", **SMALL).folder)
    if (target, k) == ("save_file", 3): assert model.calls == 27                 # three of thirty shards were done


def test_other_errors_are_not_called_a_full_disk(tmp_path, monkeypatch):
    def denied(*args): raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(A, "save_file", denied)
    with pytest.raises(PermissionError): harvest(Fake(), numbered(), SITE, tmp_path)


def test_a_damaged_meta_file_is_refused(tmp_path):
    harvest(Fake(), numbered(), SITE, tmp_path)
    (tmp_path/"meta.json").write_text("{")
    for attempt in (lambda: ActivationStore(tmp_path), lambda: harvest(Fake(), numbered(), SITE, tmp_path)):
        with pytest.raises(SparseCodingError, match="no activation store"): attempt()


def test_load_store_computes_once_mends_and_keeps_the_rule_out_of_the_key(tiny, text, own_cache):
    store = load_store(tiny, text, Site(2), n_batch=2, shard_bytes=1)
    before = files(store.folder)
    other = load_store(tiny, text, [Site(2)], drop_first=False, max_norm=None, n_batch=2, shard_bytes=1)
    assert other.folder == store.folder and other.keep(Site(2)).all() and not store.keep(Site(2)).all()
    (store.folder/"shard-00001.safetensors").unlink()
    with pytest.warns(UserWarning, match="shard-00001.safetensors is missing"): load_store(tiny, text, Site(2), n_batch=2, shard_bytes=1)
    assert files(store.folder) == before


def test_estimate_of_disk_is_what_a_store_takes(tiny, text, tmp_path):
    store = harvest(tiny, text, [Site(2), Site(1)], tmp_path)
    real = sum(f.stat().st_size for f in tmp_path.iterdir())
    cost = estimate_harvest(tiny, store.n, [Site(1), Site(2)], 24)
    assert real == pytest.approx(cost["bytes"], rel=.1) and cost["seconds"] > 0 and cost["free"] > 0


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    "Forty times the text, 160 MB of activations, and the peak of the process grows by less than a fifth of that."
    pytest.importorskip("resource")
    code = f"""
        import resource, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_activations import *
        class Wide(Fake):
            def run_to(self, tokens, sites): return {{s: torch.ones(*tokens.shape, 512) for s in sites}}
        peak = []
        for i, n in enumerate((16, 640)):
            rows = FakeRows(np.ones((n, 256)))
            store = harvest(Wide(512), rows, SITE, "{tmp_path.as_posix()}/" + str(i), n_batch=4, shard_bytes=2**21, progress=False)
            for x in batches(store, SITE, 1024, group=4096, steps=store.n//1024 - 4): pass
            peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        print((peak[1] - peak[0])*(1 if sys.platform == "darwin" else 1024))"""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 34e6
