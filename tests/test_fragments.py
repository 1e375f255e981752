"""Evidence against brute force, whatever the size of the blocks; interruption; and the score's arithmetic."""
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sparse_coding.presets import Site, SparseCodingError
from sparse_coding.models import load_model
from sparse_coding.corpora import load_rows
from sparse_coding.activations import ActivationStore, load_store
from sparse_coding.dictionaries import TopKSAE, fixed, random_rotation
from sparse_coding.splicing import Placed
from sparse_coding.evidence import (Collector, Evidence, Examples, FragmentStore, collect, ev_correlation_score,
    evidence, fingerprint, first_usable, scores)
from tiny import sparse, tiny_model

SITE = Site(2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fragments")
    texts = [" ".join(f"word{(i*j) % 37}" for j in range(400)) for i in range(12)]
    (folder/"text.txt").write_text("\n".join(texts))
    model = load_model(str(tiny_model(folder/"model", "llama")))
    store = load_store(model, load_rows(str(folder/"text.txt"), model, "train", None, 64, heldout=0.), SITE)
    return model, FragmentStore(store.folder, model.eot_id)


def slow(sae, store):
    "All codes at once, with tokens that do not count set to 0."
    with torch.no_grad(): c = sae.encode(store.read(SITE, 0, store.n)).view(-1, 64, sae.d_sae)
    return c*store.keep(SITE).view(-1, 64, 1)


@pytest.mark.parametrize("sae", [sparse(), sparse(cls=TopKSAE, k=4, bias=0.), fixed(random_rotation(32, 0), signed=True)], ids=["relu", "topk", "signed"])
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_one_pass_is_brute_force(tiny, tmp_path, sae, block):
    model, store = tiny
    c, keep = slow(sae, store), store.keep(SITE).view(-1, 64)
    found = collect(sae, store, SITE, tmp_path, block)
    best = c.masked_fill(~keep[..., None], -torch.inf).amax(1)
    torch.testing.assert_close(found["top_max"], best.sort(0, descending=True)[0][:20], rtol=1e-4, atol=1e-5)
    for f in range(0, sae.d_sae, 5):
        ids = found["top_ids"][:, f]
        torch.testing.assert_close(found["top_acts"][:, f], c[ids, :, f], rtol=1e-4, atol=1e-5)
        fires = ((c[..., f] != 0).any(1)).nonzero()[:20, 0]
        assert found["random_ids"][:len(fires), f].tolist() == fires.tolist()
        torch.testing.assert_close(found["random_acts"][:len(fires), f], c[fires, :, f], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["uniform_acts"][:, f], c[found["uniform_ids"], :, f], rtol=1e-4, atol=1e-5)
    assert found["fires"].tolist() == (c != 0).sum((0, 1)).tolist() and int(found["tokens"]) == int(keep.sum())
    assert found["fragments"].tolist() == (c != 0).any(1).sum(0).tolist()
    assert found["hist"].sum(1).tolist() == (c > 0).sum((0, 1)).tolist()


def test_histogram_bins_are_half_powers_of_two():
    c = Collector(2, 1, torch.tensor([0]), unit=2.)
    c.add(torch.arange(4), torch.tensor([[2., 0], [2.83, 1e-9], [4., 1e9], [0, 0]]).view(4, 1, 2), torch.ones(4, 1).bool())
    assert c.state["hist"].nonzero().tolist() == [[0, 24], [0, 25], [0, 26], [1, 0], [1, 31]]


def test_memory_does_not_grow_with_the_fragments():
    def size(n):
        c = Collector(8, 4, torch.tensor([0]), n=5)
        for a in range(0, n, 10): c.add(torch.arange(a, a + 10), torch.rand(10, 4, 8), torch.ones(10, 4).bool())
        return sum(t.numel()*t.element_size() for t in c.state.values())
    assert size(10) == size(500)


def test_an_interrupted_pass_goes_on(tiny, tmp_path, monkeypatch):
    model, store = tiny
    whole = collect(sparse(), store, SITE, tmp_path, 9)
    real, calls = Collector.add, []
    def add(self, *a):
        calls.append(len(a[0]))
        if len(calls) == 4: raise KeyboardInterrupt
        return real(self, *a)
    monkeypatch.setattr(Collector, "add", add)
    with pytest.raises(KeyboardInterrupt): collect(sparse(), store, SITE, tmp_path, 9, save_every=9)
    assert int(load_file(tmp_path/"unfinished.safetensors")["seen"]) == 27
    before = len(calls)
    again = collect(sparse(), store, SITE, tmp_path, 9, save_every=9)
    assert sum(calls[before:]) == len(store.tokens) - 27 and not (tmp_path/"unfinished.safetensors").exists()
    for k in whole: torch.testing.assert_close(again[k], whole[k], rtol=1e-4, atol=1e-5, msg=k)


def test_the_mark_between_documents_does_not_count(tiny, tmp_path):
    model, store = tiny
    plain, often = ActivationStore(store.folder), int(np.bincount(store.tokens[:, 1:].ravel()).argmax())
    store, mark = FragmentStore(store.folder, often), torch.from_numpy(store.tokens == often)
    keep, before = store.keep(SITE).view(mark.shape), plain.keep(SITE).view(mark.shape)
    assert (before & mark).any() and torch.equal(keep, before & ~mark)
    for a,b in ((0, 64), (10, 70), (63, 64), (5, None), (64, 640)): assert torch.equal(store.keep(SITE, a, b), keep.flatten()[a:b])
    loud = fixed(torch.nn.functional.normalize(store.read(SITE, 0, store.n)[mark.flatten()].mean(0, keepdim=True), dim=1), signed=True)
    assert all((~mark[i, np.abs(e).argmax()]) for i,e in zip(*[collect(loud, store, SITE, tmp_path)[f"top_{k}"][:, 0].numpy() for k in ("ids", "acts")]))


def test_shown_scored_and_spare_are_the_protocols(tiny, own_cache):
    model, store = tiny
    found = evidence(None, Placed(model, sparse(), store, SITE))
    f = first_usable(found, 1)[0]
    top = found.examples("top", f)
    assert found.shown(f).ids.tolist() == top.ids[[0, 4, 8, 12, 16]].tolist()
    assert found.scored_top(f).ids.tolist() == top.ids[[2, 6, 10, 14, 18]].tolist()
    assert sorted([*found.shown(f).ids, *found.scored_top(f).ids, *found.spare(f).ids]) == sorted(top.ids)
    for f in first_usable(found, None):
        random = found.scored_random(f)
        assert len(random) == 5 and (random.acts != 0).any(1).all()
        parts = [found.shown(f), found.scored_top(f), random, found.spare(f)]
        assert len(set(np.concatenate([e.ids for e in parts]))) == sum(map(len, parts))
    torch.testing.assert_close(torch.tensor(top.acts), found.placed.acts([found.shown(f) and first_usable(found, 1)[0]])[top.ids, :, 0],
                               rtol=2e-3, atol=1e-3)
    rare = (~found.usable).nonzero()[:, 0].tolist()
    assert rare and not set(rare) & set(first_usable(found, None))


def test_evidence_is_the_dictionarys_own(tiny, own_cache):
    model, store = tiny
    assert fingerprint(sparse()) == fingerprint(sparse()) != fingerprint(sparse(bias=-.5))
    assert fingerprint(sparse(cls=TopKSAE, k=3)) != fingerprint(sparse(cls=TopKSAE, k=4))
    sae = sparse()
    sae.metadata["model_fingerprint"] = "another"
    with pytest.raises(SparseCodingError, match="another model"): evidence(None, Placed(model, sae, store, SITE))


def test_correlation_is_over_all_counted_tokens():
    rng = np.random.default_rng(0)
    e = Examples(np.arange(6), rng.integers(0, 9, (6, 8)), rng.exponential(size=(6, 8)).astype(np.float32), rng.random((6, 8)) > .2)
    guess = rng.normal(size=(6, 8))
    want = np.corrcoef(guess[e.keep], e.acts[e.keep])[0, 1]
    assert abs(ev_correlation_score(guess, e) - want) < 1e-6
    assert abs(ev_correlation_score(guess*7 + 2, e) - want) < 1e-6
    assert abs(ev_correlation_score(guess*1e-15, e) - want) < 1e-6
    spoilt = guess.copy(); spoilt[~e.keep] = 1e9
    assert abs(ev_correlation_score(spoilt, e) - want) < 1e-6
    assert ev_correlation_score(np.full((6, 8), .1), e) == 0
    with pytest.raises(SparseCodingError): ev_correlation_score(guess[:5], e)


def test_a_simulator_that_peeks_is_caught(tiny, own_cache):
    model, store = tiny
    found = evidence(None, Placed(model, sparse(), store, SITE))
    class Peeks:
        def explain(self, shown): return [""]*len(shown)
        def simulate(self, explanations, blind): return [e.acts for e in blind]
    with pytest.raises(SparseCodingError, match="finite"): scores(Peeks(), found, first_usable(found, 2))
