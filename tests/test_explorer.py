"The explorer's page: its numbers on tiny random models, and the page itself in a browser without a head."
import json, re, shutil

import pytest
import torch

from sparse_coding.presets import Site, SparseCodingError, preset
from sparse_coding.models import load_model
from sparse_coding.dictionaries import TopKSAE
from sparse_coding.splicing import Placed
from sparse_coding.paper2.recursive import Node, trace, trace_back
from sparse_coding.tools.explorer import (PART_KINDS, UNIT, _beginning, contexts_of, embed_json, explore,
    features_at, page, page_data, promotes)
from tiny import tiny_model

PROMPT = " Mary <script>alert(1)</script> & </script><b>John</b> gave <script>alert(1)"
LAYERS = (1, 3, 4)
NOTES = {(l, j): [[["</script><script>bad()", "<img src=x onerror=bad()>", "\u2028 &amp;"]], ["<i>", " und"]] for l in LAYERS for j in range(96)}


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt_neox"])
def model(request, tmp_path_factory):
    return load_model(str(tiny_model(tmp_path_factory.mktemp("m")/"x", request.param)), device="cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory): return load_model(str(tiny_model(tmp_path_factory.mktemp("m")/"x", "llama")), device="cpu")


def dictionaries(model):
    out = {}
    for l in LAYERS:
        sae = TopKSAE(d := model.d_in(Site(l, "attn_z")), 3*d, 6, seed=l).requires_grad_(False)
        sae.b_enc.copy_(.1*torch.randn(3*d, generator=torch.Generator().manual_seed(l)))
        out[l] = sae
    return out


def entry(row): return dict(zip("feature activation encoder bias start heads sources cells parts rest".split(), row))


def test_every_step_adds_up_in_two_ways(model):
    t = trace(model, dictionaries(model), PROMPT)
    for layer in LAYERS:
        rows = [entry(r) for token in features_at(t, layer, chunk=7) for r in token]
        assert len(rows) == int((t.active[layer].codes[1:] > 0).sum())
        for e in rows:
            room = 2e-3*UNIT + .02*UNIT*(abs(e["bias"]) + abs(e["start"]) > 50*UNIT)       # a tiny activation beside huge terms
            assert sum(e["heads"]) + e["encoder"] == pytest.approx(UNIT, abs=room)
            assert sum(v for _,v in e["sources"]) == pytest.approx(sum(e["heads"]), abs=room)
            assert sum(r[-1] for r in e["parts"]) + sum(e["rest"]) + e["bias"] + e["start"] == pytest.approx(UNIT, abs=room)


def test_a_step_is_that_of_recursive_attribution(model):
    t = trace(model, dictionaries(model), PROMPT)
    position = len(t.words) - 2
    e = entry(features_at(t, 4)[position][0])
    g = trace_back(t, Node("feature", 4, position, e["feature"]), depth=1)
    shares = {n: float(v)/g.activation for n,v in zip(g.nodes, g.values)}
    assert e["activation"] == pytest.approx(g.activation, rel=1e-3)
    assert len(e["parts"]) >= 14
    for kind,l,s,j,v in e["parts"]: assert v/UNIT == pytest.approx(shares[Node(PART_KINDS[kind], l, s, j)], abs=2e-4 + 1e-3*abs(v/UNIT))
    largest = max(shares, key=lambda n: abs(shares[n]))
    assert e["parts"][0][1:4] == [largest.layer, largest.position, largest.feature]
    listed = {(PART_KINDS[k], l, s, j) for k,l,s,j,_ in e["parts"]}
    for k,kind in enumerate(PART_KINDS):
        left = sum(v for n,v in shares.items() if n.kind == kind and (n.kind, n.layer, n.position, n.feature) not in listed)
        assert e["rest"][k]/UNIT == pytest.approx(left, abs=2e-3)
    assert (e["bias"]/UNIT, e["start"]/UNIT) == pytest.approx((g.bias/g.activation, g.start/g.activation), rel=1e-3, abs=2e-4)


def test_only_the_strongest_features_when_asked(llama):
    t = trace(llama, dictionaries(llama), PROMPT)
    some, every = features_at(t, 3, most=2), features_at(t, 3)
    assert some[0] == every[0] == [] and all([r[0] for r in a] == [r[0] for r in b[:2]] for a,b in zip(some, every))


def test_the_page_begins_at_a_feature_that_can_be_opened(llama):
    t = trace(llama, dictionaries(llama), PROMPT)
    for most in (1, 2, None):
        start = _beginning(t, most)
        assert start["feature"] in [n.feature for n in t.at(start["layer"], start["position"])[:most]]


def test_where_a_feature_fires_most(llama):
    sae, g = dictionaries(llama)[3], torch.Generator().manual_seed(0)
    class Store:
        row_len, tokens = 12, torch.randint(1, 300, (5, 12), generator=g).numpy()
        x, kept = torch.randn(60, sae.d_in, generator=g), torch.arange(60) % 12 > 0
        def check(self, model): return self
        def keep(self, site): return self.kept
        def read(self, site, a, b): return self.x[a:b]
    store, codes = Store(), None
    codes = (sae.encode(store.x)*store.kept[:, None]).view(5, 12, -1)
    ids = codes.amax((0, 1)).argsort(descending=True)[:4].tolist()
    found = contexts_of(Placed(llama, sae, store, Site(3, "attn_z")), ids, n=2)
    for j in ids:
        row, s = divmod(int(codes[..., j].argmax()), 12)
        assert found[j][0][1] == llama.str_tokens(store.tokens[row])[s]
        assert len(found[j]) == min(2, int((codes[..., j].amax(1) > 0).sum()))


def test_promoted_tokens_are_those_of_the_unembedding(llama):
    w = torch.randn(70, llama.d_model, generator=torch.Generator().manual_seed(0))
    logits = (w*llama.hf.model.norm.weight) @ llama.hf.lm_head.weight.T
    assert promotes(llama, w, 3)[69] == llama.str_tokens(logits[69].topk(3).indices)


def test_json_cannot_end_its_element():
    nasty = {"a</script>": ["<!--<script>", "&amp;", "\u2028\u2029", "é\n\"\\"]}
    assert not set("<>&\u2028\u2029") & set(embed_json(nasty)) and json.loads(embed_json(nasty)) == nasty


def test_refusals(llama, tmp_path):
    saes = dictionaries(llama)
    with pytest.raises(SparseCodingError, match="room for 128"): explore(preset(), llama, "abc def"*200, tmp_path/"x.html", saes=saes, about=False)
    with pytest.raises(SparseCodingError, match="empty text"): explore(preset(), llama, "", tmp_path/"x.html", saes=saes, about=False)
    assert not (tmp_path/"x.html").exists()


def test_the_file_is_small_and_whole(llama, tmp_path):
    shown = explore(preset(), llama, PROMPT, tmp_path/"deep"/"x.html", saes=dictionaries(llama), about=False)
    text = shown.path.read_text(encoding="utf-8")
    assert len(text) < 3e6 and text.count("<script") == text.count("</script") == 2
    assert [p.name for p in shown.path.parent.iterdir()] == ["x.html"]
    assert not re.search(r"(src|href)\s*=\s*[\"']?https?:|@import|url\(", text)
    assert "<script>alert" not in shown._repr_html_().split("srcdoc=")[0] and "</script" not in shown._repr_html_()


# ---- in a browser

@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None: pytest.skip("no Chromium here to open the explorer in: install the package chromium")
    with api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=path)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def file(llama, tmp_path_factory):
    "A page with hostile notes on every feature."
    t = trace(llama, dictionaries(llama), PROMPT)
    position = max(s for s in range(len(t.words)) if t.at(4, s))
    data = page_data(preset(), llama, t, about=NOTES) | {"start": dict(layer=4, position=position, feature=t.at(4, position)[0].feature)}
    path = tmp_path_factory.mktemp("page")/"x.html"
    path.write_text(page(data), encoding="utf-8")
    return path, t, position


@pytest.fixture
def opened(browser, file):
    "The page, and whatever went wrong on it."
    tab, wrong = browser.new_page(viewport=dict(width=1200, height=900)), []
    for event in ("pageerror", "dialog"): tab.on(event, lambda e, event=event: wrong.append((event, str(e))))
    tab.on("console", lambda m: wrong.append(("console", m.text)))
    tab.on("request", lambda r: None if r.url.startswith("file:") and r.url.endswith("x.html") else wrong.append(("request", r.url)))
    tab.goto(file[0].as_uri())
    tab.wait_for_selector("#sum")
    yield tab, wrong
    assert wrong == []
    tab.close()


def percents(tab, rows): return [float(s.replace("−", "-").rstrip("%")) for s in tab.locator(f"{rows} .share").all_inner_texts()]


def check_sums(tab):
    "What is written on the page adds up, and to what is written as the sum."
    *shares, total = percents(tab, "#parts .row[data-share]")
    assert sum(shares) == pytest.approx(100, abs=.6) and total == pytest.approx(sum(shares), abs=.6)
    number = lambda text: float(text.replace("−", "-"))
    *parts, whole = map(number, tab.locator("#parts .row[data-share] > :last-child").all_inner_texts())
    activation = number(tab.locator("#title").inner_text().rpartition("activation ")[2])
    assert sum(parts) == pytest.approx(activation, rel=.01) and whole == pytest.approx(activation, rel=.01)


def test_text_stays_text(opened, file):
    tab, _ = opened
    labels = tab.locator(".token").evaluate_all("all => all.map(e => e.getAttribute('aria-label'))")
    assert "".join(l.rpartition(", token ")[0] for l in labels[1:]) == PROMPT
    assert "".join(tab.locator(".token").all_inner_texts()[1:]).replace("␣", "") == PROMPT.replace(" ", "")
    assert tab.locator("script").count() == 2 and tab.locator("img, b img, i i, #about i").count() == 0
    assert "<img src=x onerror=bad()>" in tab.locator("#about").inner_text()
    assert "<script>alert(1)</script>" in tab.title()


def test_the_first_page_adds_up_and_is_the_right_feature(opened, file):
    (tab, _), (_, t, position) = opened, file
    root = t.at(4, position)[0]
    assert f"Feature {root}" in tab.locator("#title").inner_text()
    g = trace_back(t, root, depth=1)
    largest = g.order[0]
    assert percents(tab, "#parts .row[data-share]")[0] == pytest.approx(100*float(g.values[largest])/g.activation, abs=.06)
    assert tab.locator("#parts .row[data-share] .name").first.inner_text() == str(g.nodes[largest])
    check_sums(tab)


def test_a_click_walks_one_step_back(opened, file):
    tab, _ = opened
    first = tab.locator("#title").inner_text()
    row = tab.locator("#parts [data-open]").first
    name, share = row.locator(".name").inner_text(), row.locator(".share").inner_text()
    row.click()
    assert f"Feature {name} " in tab.locator("#title").inner_text()
    assert tab.locator("#trail button").count() == 2
    assert share in tab.locator("#carried").inner_text()
    assert tab.evaluate("() => { const f = document.getElementById('features').getBoundingClientRect(), p = document.querySelector('.pick[aria-current=true]').getBoundingClientRect(); return p.top >= f.top && p.bottom <= f.bottom }")
    assert int(name.partition("_")[0]) < 4
    check_sums(tab)
    tab.keyboard.press("Backspace")
    assert tab.locator("#title").inner_text() == first and tab.locator("#trail button").count() == 1
    check_sums(tab)


def test_every_feature_of_a_token_can_be_opened(opened, file):
    (tab, _), (_, t, position) = opened, file
    tab.locator(".token").nth(position - 1).click()
    expected = [str(n) for l in LAYERS[::-1] for n in t.at(l, position - 1)]
    assert tab.locator(".pick").evaluate_all("all => all.map(e => e.dataset.feature)") == expected
    for k in range(0, len(expected), 4):
        tab.locator(".pick").nth(k).click()
        assert f"Feature {expected[k]} " in tab.locator("#title").inner_text()
        check_sums(tab)
    tab.locator(".token").nth(0).click()
    assert tab.locator(".pick").count() == 0 and "beginning of text" in tab.locator("#features").inner_text()


def test_keys(opened, file):
    (tab, _), (_, t, position) = opened, file
    for key in ("t", "ArrowLeft", "ArrowLeft"): tab.keyboard.press(key)
    assert tab.locator(".token[aria-selected=true]").get_attribute("data-i") == str(position - 2)
    for key in ("f", "ArrowDown", "Enter"): tab.keyboard.press(key)
    second = [n for l in LAYERS[::-1] for n in t.at(l, position - 2)][1]
    assert f"Feature {second} " in tab.locator("#title").inner_text()
    for key in ("p", "Enter"): tab.keyboard.press(key)
    assert tab.locator("#trail button").count() == 2
    tab.keyboard.press("Escape")
    assert tab.locator("#trail button").count() == 1


def test_light_and_dark(browser, file):
    for scheme in ("light", "dark"):
        tab = browser.new_page(color_scheme=scheme)
        tab.goto(file[0].as_uri())
        shade = lambda: sum(map(int, re.findall(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]))
        before = shade()
        tab.click("#theme")
        assert (before > 600, shade() > 600) == (scheme == "light", scheme == "dark")
        tab.close()


def test_narrow_screens_do_not_scroll_sideways(browser, file):
    tab = browser.new_page(viewport=dict(width=380, height=800))
    tab.goto(file[0].as_uri())
    tab.wait_for_selector("#sum")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 380
    tab.close()


def test_no_other_script_runs(browser, file):
    tab = browser.new_page()
    tab.goto(file[0].as_uri())
    assert tab.evaluate("() => { const s = document.createElement('script'); s.textContent = 'window.bad = 1'; document.body.append(s); return window.bad ?? 0 }") == 0
    tab.close()


def test_in_a_frame(browser, file, tmp_path):
    "As a notebook shows it: the same page inside srcdoc, without any rights but to run its script."
    from sparse_coding.tools.explorer import Explorer
    (tmp_path/"frame.html").write_text(f"<!DOCTYPE html><meta charset='utf-8'><body>{Explorer(file[0])._repr_html_()}</body>", encoding="utf-8")
    tab, wrong = browser.new_page(), []
    tab.on("dialog", lambda d: wrong.append(str(d)))
    tab.goto((tmp_path/"frame.html").as_uri())
    frame = tab.frame_locator("iframe")
    frame.locator("#parts [data-open]").first.click()
    assert frame.locator("#trail button").count() == 2 and wrong == []
    tab.close()


def test_notes_are_those_of_the_feature(llama, monkeypatch):
    "Of the features that can be opened, each with its own direction."
    from sparse_coding.tools import explorer
    saes = dictionaries(llama)
    t = trace(llama, saes, PROMPT)
    monkeypatch.setattr(explorer, "attention_stores", lambda p, model: (None, None))
    monkeypatch.setattr(explorer, "contexts_of", lambda placed, ids, **how: {j: [["", f"{placed.site.layer}_{j}", ""]] for j in ids})
    some = explorer.feature_notes(preset(), llama, saes, t, most=2)
    assert set(some) == {(n.layer, n.feature) for l in LAYERS for s in range(1, len(t.words)) for n in t.at(l, s)[:2]}
    for (l, j), (texts, up) in some.items():
        assert texts[0][1] == f"{l}_{j}"
        assert up == promotes(llama, (saes[l].W_dec[j] @ llama.W_O(l)[0].flatten(0, 1))[None])[0]
