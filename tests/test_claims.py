"""The claims pages: the verdicts of the committed run, one text per rule, and every rule with what a stranger needs to read it."""
import ast, inspect, json
from pathlib import Path

import pytest

from sparse_coding.presets import SparseCodingError
from sparse_coding.ledger import claims, report, verdict
from sparse_coding.paper1.what_held import by_section, losses

ROOT = Path(__file__).parent.parent
LEDGER = json.loads((ROOT/"nbs/claims/laptop.json").read_text(encoding="utf-8"))
PAGES = {
    "paper1": ("10_overview 20_training 21_choices 22_alive 30_baselines 31_explaining 32_scores 33_controls 40_ioi 41_fewest_features "
               "50_what_it_reads 51_what_it_does 52_causes 60_perplexity 61_what_held").split(),
    "paper2": "20_saes 21_recursive 30_quality 31_families 41_heads 42_long_prefix 43_ioi".split()}
SOURCES = {"paper", "abstract", "authors' post", "authors' code", "authors' model card", "review", "one review"}
CHANGED = {"P1-fig9", "P1-fig4r", "P2-prefix", "P2-families", "P2-hyp", "P2-board", "P2-qk"}

# as `sparse-coding report --json` computed them from the committed ledger when every rule stood on the page that measures
BEFORE = {
    "not comparable": (
        "P1-fig1 P1-cost P1-alpha P1-tab1 P1-toponly P2-models P2-release").split(),
    "holds": (
        "P1-superpos P1-recover P1-smooth P1-variance P1-bias P1-active P1-ppl P1-fig2 P1-depth P1-ica P1-basis"
        " P1-blind P1-nfrag P1-fig10 P1-fig3r P1-alpha0 P1-floor P1-poly P1-fig4l P1-others P1-outlier P1-fig4r"
        " P1-failed P2-tab1 P2-attr P2-families P2-board P2-heads P2-hyp").split(),
    "partly": (
        "P1-conv P1-across P1-fig8 P1-fig9 P1-fig17 P1-fig12/13 P1-tree P2-interp P2-rdfa P2-poly P2-prefix"
        " P2-ioigate P2-ioipos P2-and").split(),
    "does not hold": (
        "P1-tied P1-mlpdead P1-tab2 P1-fig18 P1-fig3l P1-notall P1-typical P1-unembed P2-qk").split(),
    "not measured": (
        "P1-limits").split(),
}


def test_the_verdicts_of_the_committed_run_are_what_they_were():
    now = {r["id"]: r["verdict"] for r in report(ROOT/"nbs/claims/laptop.json")}
    before = {i: v for v,ids in BEFORE.items() for i in ids}
    if "P1-limits" in LEDGER: before["P1-limits"] = "not comparable"
    assert now == before and len(before) == 60


@pytest.mark.parametrize("claim", claims().values(), ids=claims())
def test_a_claim_says_what_a_stranger_needs(claim):
    assert all(v.strip() for v in (claim.claim, claim.place, claim.paper_value, claim.rule, claim.what, claim.unit))
    assert claim.source in (SOURCES if claim.paper == "P2" else {"paper"})
    part, page = claim.page.split("/")
    assert page in PAGES[part] and part == f"paper{claim.id[1]}"
    assert bool(claim.changed) == (claim.id in CHANGED)


@pytest.mark.parametrize("claim", claims().values(), ids=claims())
def test_a_rule_reads_what_it_says(claim):
    "The comment beside the name lists every entry of the record that the body reads, and a shown claim is never judged."
    source = inspect.getsource(claim.judge)
    head = next(l for l in source.splitlines() if l.startswith("def "))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == "rec" and isinstance(node.slice, ast.Constant):
            assert node.slice.value in head
    assert head.endswith("# reads nothing") == claim.shown_only
    if claim.shown_only: assert claim.judge({"measured": 1.}) == "not comparable"
    if claim.shown_only or claim.id not in LEDGER: return
    with pytest.raises(SparseCodingError, match=claim.page): verdict(claim, {})


def test_the_page_of_results():
    lost = losses(LEDGER)
    assert set(lost) == {"cross-entropy added", "KL left on IOI"} and losses({}) is None
    found = by_section(report(Path("no such file")))
    assert sum(map(len, found.values())) == 44 and all(found.values())
    assert {v for section in found.values() for _,v in section} == {"not measured"}
