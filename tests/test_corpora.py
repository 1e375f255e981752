"""Documents in, rows out, against plain Python on texts small enough to see through."""
import json
import random
import resource
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sparse_coding.presets import SparseCodingError
from sparse_coding.models import load_model
from sparse_coding.corpora import Document, Rows, documents, interleave, load_rows, split_of
from sparse_coding import corpora
from tiny import tiny_model, tiny_tokenizer

WORDS = "the river runs from mountains to sea and people of valley have always lived by it".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(tiny_model(tmp_path_factory.mktemp("neox")/"tiny"), device="cpu")


def make(n, seed=0):
    "Sentences of different lengths, all different."
    r = random.Random(seed)
    return [f"{i}: " + " ".join(r.choices(WORDS, k=r.randint(3, 60))) for i in range(n)]


def jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


@pytest.fixture
def mixed(tmp_path):
    "Sixty documents in two domains, alternating irregularly."
    rows = [{"text": t, "domain": "water" if i % 3 else "stone", "topic": f"t{i % 5}", "title": f"n{i}"}
            for i, t in enumerate(make(60))]
    return jsonl(tmp_path/"mixed.jsonl", rows), rows


def plain_rows(model, texts, row_len):
    "What packing should give: the texts end to end, each closed by token 0, cut by slices."
    stream = [t for text in texts for t in [*model.tokenizer.backend_tokenizer.encode(text).ids, 0]]
    return [stream[i:i+row_len] for i in range(0, len(stream) - row_len + 1, row_len)]


def by_domain(model, rows, row_len):
    "What `plain_rows` gives for each of the two domains."
    texts = lambda domain: [x["text"] for x in rows if x["domain"] == domain]
    return plain_rows(model, texts("water"), row_len) + plain_rows(model, texts("stone"), row_len)


@pytest.mark.parametrize("row_len", [16, 64, 256])
def test_rows_are_slices_of_each_domain(model, mixed, row_len):
    path, rows = mixed
    made = load_rows(path, model, row_len=row_len, heldout=0)
    assert sorted(made.tokens.tolist()) == sorted(by_domain(model, rows, row_len))
    assert made.tokens.dtype == made.docs.dtype == np.int32 and made.row_len == row_len


def test_every_token_knows_its_document(model, mixed):
    path, source = mixed
    made = load_rows(path, model, row_len=16, heldout=0)
    whole = {x["title"]: x for x in source}
    for tokens, docs in zip(made.tokens, made.docs):
        assert len({made.domain[k] for k in docs}) == 1              # a row stays within one domain
        for k in set(docs.tolist()):
            piece = model.tokenizer.decode(tokens[docs == k], skip_special_tokens=True)
            original = whole[made.title[k]]
            assert piece in original["text"]
            assert (made.domain[k], made.topic[k]) == (original["domain"], original["topic"])
    assert [made.row_domain(i) for i in range(len(made))] == [made.domain[d[0]] for d in made.docs]


def test_bos_begins_every_row_and_loses_no_token(model, mixed):
    path, rows = mixed
    made = load_rows(path, model, row_len=17, bos=True, heldout=0)
    assert (made.tokens[:, 0] == model.bos_id).all() and (made.docs[:, 0] == made.docs[:, 1]).all()
    assert sorted(made.tokens[:, 1:].tolist()) == sorted(by_domain(model, rows, 16))


def test_split_by_document(model, tmp_path):
    texts = make(400)
    path = jsonl(tmp_path/"many.jsonl", [{"text": t, "title": t[:12]} for t in texts + texts[:50]])  # fifty copies
    train, held = (load_rows(path, model, s, row_len=32, heldout=.2) for s in ("train", "heldout"))
    sides = [set(r.title) for r in (train, held)]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == {t[:12] for t in texts}
    assert 50 < len(sides[1]) < 110                                  # 80 expected, standard deviation 8
    assert len(train.documents) + len(held.documents) == 450
    assert [split_of(t, .2) for t in texts] == ["heldout" if t[:12] in sides[1] else "train" for t in texts]
    assert set(load_rows(path, model, "heldout", row_len=32, heldout=.2, seed=1).title) != sides[1]


def test_split_limits():
    assert {split_of(t, 0.) for t in make(50)} == {"train"}
    assert split_of("a lone \ud800 surrogate") in ("train", "heldout")


@pytest.mark.parametrize("counts", [[50, 7, 1], [3], [0, 4, 9]])
def test_any_prefix_has_the_same_mix(counts):
    domain, row = interleave(counts, seed=3)
    for k, n in enumerate(counts):
        assert sorted(row[domain == k]) == list(range(n))
        for end in range(len(domain) + 1): assert abs((domain[:end] == k).sum() - end*n/len(domain)) <= 1
    assert not np.array_equal(interleave([50], 0)[1], interleave([50], 1)[1])


def test_n_tokens_takes_a_prefix(model, mixed):
    path, _ = mixed
    whole = load_rows(path, model, row_len=16, heldout=0)
    some = load_rows(path, model, n_tokens=100, row_len=16, heldout=0)
    assert len(some) == 6 and np.array_equal(some.tokens, whole.tokens[:6]) and some.folder == whole.folder
    assert some.fingerprint != whole.fingerprint
    assert some.fingerprint == load_rows(path, model, n_tokens=100, row_len=16, heldout=0).fingerprint
    assert len(load_rows(path, model, n_tokens=10**9, row_len=16, heldout=0)) == len(whole)  # all there is


def test_changed_file_is_read_again(model, tmp_path):
    first = load_rows(jsonl(tmp_path/"a.jsonl", [{"text": t} for t in make(20)]), model, row_len=16, heldout=0)
    second = load_rows(jsonl(tmp_path/"a.jsonl", [{"text": t} for t in make(25, seed=1)]), model, row_len=16, heldout=0)
    assert len(second.documents) == 25 and first.fingerprint != second.fingerprint


def test_txt_jsonl_parquet_and_folders_agree(tmp_path):
    texts = make(9)
    (tmp_path/"a.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8-sig")
    (tmp_path/"crlf.txt").write_bytes("\r\n\r\n".join(texts).encode())
    pq.write_table(pa.table({"text": texts, "topic": ["x"]*9, "n": list(range(9))}), tmp_path/"a.parquet")
    jsonl(tmp_path/"a.jsonl", [{"text": t, "topic": "x"} for t in texts])
    (tmp_path/"folder"/"deeper").mkdir(parents=True)
    for i, t in enumerate(texts):
        (tmp_path/"folder"/("deeper" if i > 4 else ".")/f"{i}.txt").write_text(f"\n\n{t}\n\n", encoding="utf-8")
    (tmp_path/"folder"/"ignored.png").write_bytes(b"\x89PNG")
    for name in ("a.txt", "crlf.txt", "a.parquet", "a.jsonl", "folder"):
        got = list(documents(str(tmp_path/name)))
        assert sorted(d.text.strip() for d in got) == sorted(texts), name
        assert {d.domain for d in got} == {name.split(".")[0]}
    assert {d.topic for d in documents(str(tmp_path/"a.parquet"))} == {"x"}


def test_text_that_spells_a_special_token(model, tmp_path):
    made = load_rows(jsonl(tmp_path/"a.jsonl", [{"text": "a <|endoftext|> b"*9}]*9), model, row_len=16, heldout=0)
    assert (made.tokens == 0).sum() <= 9  # only the joints


def test_null_text_is_passed_over_and_counted(model, tmp_path):
    rows = [{"text": t} for t in make(300)]
    rows[77]["text"], rows[78]["text"], rows[79]["text"] = None, float("nan"), "  "
    made = load_rows(jsonl(tmp_path/"a.jsonl", rows), model, row_len=16, heldout=0)
    assert len(made.documents) == 297 and made.n_blank == 3
    table = pa.table({"text": ["one", None, "two"], "domain": [None, "d", "d"]})
    pq.write_table(table, tmp_path/"a.parquet")
    assert [(d.text, d.domain) for d in documents(str(tmp_path/"a.parquet"))] == [("one", "a"), ("two", "d")]


@pytest.mark.parametrize("field", ["text", "title", "domain", "topic"])
def test_half_a_character(model, tmp_path, field):
    rows = [{"text": t} for t in make(9)]
    rows[4][field] = "cut \ud83d here, and \udc00" + rows[4].get(field, "")
    made = load_rows(jsonl(tmp_path/"a.jsonl", rows), model, row_len=8, heldout=0)
    found = made.documents[4][field] if field != "text" else next(d.text for i, d in enumerate(documents(made.corpus)) if i == 4)
    assert found.startswith("cut \ufffd here, and \ufffd") and len(made.documents) == 9


def test_many_domains_need_few_files_and_lose_little(model, tmp_path):
    "A host per two documents: more of them than a process may have open files, and each shorter than a row."
    rows = [{"text": t, "domain": f"www.site-{i//2}.example"} for i, t in enumerate(make(800))]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try: made = load_rows(jsonl(tmp_path/"a.jsonl", rows), model, row_len=64, heldout=0)
    finally: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    possible = sum(d["tokens"] for d in made.documents)//64
    assert possible - 1 <= len(made) <= possible
    assert len(set(map(tuple, made.tokens.tolist()))) == len(made)
    tokens = {i: made.tokens[made.docs == i] for i in np.unique(made.docs)}
    ids = lambda i: [*model.tokenizer.backend_tokenizer.encode(rows[i]["text"]).ids, 0]
    for i, found in tokens.items(): assert set(found.tolist()) <= set(ids(i)) and len(found) <= made.documents[i]["tokens"]


def test_streaming_domains_that_never_fill_a_row_ends(model, monkeypatch):
    def endless(name, split, streaming):
        for i in range(10**9): yield {"text": f"{i} " + " ".join(WORDS*2), "domain": f"host {i}"}
    monkeypatch.setattr("sparse_coding.corpora.hub_reachable", lambda: True)
    monkeypatch.setattr("datasets.load_dataset", endless)
    assert len(load_rows("somebody/web", model, n_tokens=64*256, row_len=256)) == 64


def test_a_stream_that_breaks_off_is_told(model, monkeypatch):
    def broken(name, split, streaming):
        yield {"text": "a"}
        raise ConnectionError("peer went away\nat length")
    monkeypatch.setattr("sparse_coding.corpora.hub_reachable", lambda: True)
    monkeypatch.setattr("datasets.load_dataset", broken)
    with pytest.raises(SparseCodingError, match=r"cannot be read \(peer went away\)"): load_rows("somebody/web", model, n_tokens=1000, row_len=16)


def test_few_documents_are_told_before_and_at_the_rows(model, tmp_path):
    for i in range(3): (tmp_path/f"book {i}.txt").write_text("\n\n".join(make(40, seed=i)), encoding="utf-8")
    side = split_of((tmp_path/"book 0.txt").read_text(encoding="utf-8"))
    assert side == "train"
    with pytest.raises(SparseCodingError, match=r"3 documents, and all fall into the train part.*one \.txt file.*blank lines"): corpora.check_corpus(str(tmp_path))
    with pytest.raises(SparseCodingError, match=r"heldout part of .*, 0 of 3 documents, .*fewer than one row.*blank lines"): load_rows(str(tmp_path), model, "heldout", row_len=16)
    whole = tmp_path/"whole.txt"
    whole.write_text("\n\n".join(make(120)), encoding="utf-8")
    corpora.check_corpus(str(whole)), corpora.check_corpus("code")
    assert len(load_rows(str(whole), model, "heldout", row_len=16))


def test_leavings_are_passed_over_and_suffixes_may_be_large(tmp_path):
    for name in ("._a.txt", ".hidden/b.txt", ".DS_Store", "__MACOSX/._c.jsonl", ".git/x.txt"):
        (tmp_path/"in"/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/"in"/name).write_bytes(b"\x00\x05\x16\xff")
    (tmp_path/"in"/"a.txt").write_text("one", encoding="utf-8")
    jsonl(tmp_path/"in"/"BIG.JSONL", [{"text": "two"}])
    (tmp_path/"in"/"folder.txt").mkdir()
    (tmp_path/"in"/"gone.txt").symlink_to(tmp_path/"nowhere.txt")
    assert [d.text for d in documents(str(tmp_path/"in"))] == ["two", "one"]
    assert [d.text for d in documents(str(tmp_path/"in"/"BIG.JSONL"))] == ["two"]
    assert corpora.corpus_kind("nowhere/BIG.Parquet")[0] == "local"
    with pytest.raises(SparseCodingError, match="is no .txt, .jsonl, .parquet file"): next(documents(str(tmp_path/"in"/"folder.txt")))
    with pytest.raises(SparseCodingError, match="no file here"): corpora.check_corpus("x"*5000)


def test_embedded_names_win_over_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("code", "encyclopedia", "embedded", "mine"):
        (tmp_path/name).mkdir()
        (tmp_path/name/"a.txt").write_text("mine", encoding="utf-8")
    assert next(documents("code")).domain == "code" and next(documents("./code")).text == "mine"
    assert [corpora.corpus_kind(c)[0] for c in ("code", "code+encyclopedia", "embedded", "./code", "mine")] == ["embedded"]*3 + ["local"]*2


def begins(folder, before=None, **names):
    "The tiny model with a tokenizer that has these special tokens, and puts one of them before every text."
    tokenizer = tiny_tokenizer().backend_tokenizer
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if before:
        known = [(t, tokenizer.token_to_id(t)) for t in ("<s>", "</s>")]
        tokenizer.post_processor = TemplateProcessing(single=before, special_tokens=known)
    tiny_model(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return load_model(folder, device="cpu")


def test_rows_begin_as_the_tokenizer_begins(tmp_path, mixed):
    path, _ = mixed
    for before, first in (("<s> $A", True), ("$A </s>", False), (None, False)):
        model = begins(tmp_path/str(len(before or "")), before, bos_token="<s>", eos_token="</s>")
        made = load_rows(path, model, row_len=17, heldout=0)
        bos = model.tokenizer.bos_token_id
        assert (made.tokens[:, 0] == bos).all() if first else (made.tokens != bos).all()
        assert made.first == (bos if first else None) and corpora.first_token(model) == made.first
        assert (load_rows(path, model, row_len=17, heldout=0, bos=False).tokens != bos).all()
        assert corpora.first_token(model, bos=True) is not None


def test_a_tokenizer_without_a_beginning(tmp_path, mixed):
    path, _ = mixed
    model = begins(tmp_path/"none", eos_token="</s>")
    model.bos_id, model.eot_id = model.tokenizer.bos_token_id, model.tokenizer.eos_token_id      # as without <|endoftext|>
    made = load_rows(path, model, row_len=17, bos=True, heldout=0)
    assert model.bos_id is None and (made.tokens[:, 0] == model.eot_id).all()


def test_memory_does_not_grow_with_the_corpus(model, tmp_path):
    peaks = []
    for n in (2_500, 10_000):
        with open(tmp_path/f"{n}.txt", "w", encoding="utf-8") as f:
            for i in range(n): f.write(f"{i} " + " ".join(WORDS*8) + "\n\n")
        tracemalloc.start()
        load_rows(str(tmp_path/f"{n}.txt"), model, row_len=256)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3*peaks[0], peaks


@pytest.mark.parametrize("name, content, says", [
    ("empty.txt", b"", "is empty"), ("blank.jsonl", b"\n\n", "is empty"), ("latin.txt", b"caf\xe9", "not UTF-8"),
    ("latin.jsonl", b'{"text": "caf\xe9"}', "not UTF-8"),
    ("broken.jsonl", b'{"text": "a"}\n{"text"', "Line 2 of .* is not JSON"),
    ("other.jsonl", b'{"body": "a"}', "Line 1 of .* has no field 'text'.*body"),
    ("list.jsonl", b"[1]", "has no field 'text'"), ("null.jsonl", b'{"text": null}\n{"text": ""}', "all of its 2 documents are blank"),
    ("number.jsonl", b'{"text": 5}', "a int in it"), ("deep.jsonl", b"["*100_000, "Line 1 of .* is not JSON"),
    ("nothing.jsonl", b"null", "has no field 'text'"), ("empty.parquet", b"", "not a parquet file"),
    ("fake.parquet", b"not parquet at all", "not a parquet file"),
    ("table.csv", b"text\na", "is no .txt, .jsonl, .parquet file"),
    ("short.txt", b"two words", "fewer than one row of 256")])
def test_bad_files(model, tmp_path, name, content, says):
    (tmp_path/name).write_bytes(content)
    with pytest.raises(SparseCodingError, match=says) as e: load_rows(str(tmp_path/name), model, heldout=0)
    assert "\n" not in str(e.value)


def test_parquet_without_text(model, tmp_path):
    pq.write_table(pa.table({"body": ["a"]}), tmp_path/"a.parquet")
    with pytest.raises(SparseCodingError, match="has no field 'text'.*body"):
        load_rows(str(tmp_path/"a.parquet"), model)


def test_bad_requests(model, mixed):
    path, _ = mixed
    for says, kw in [("Unknown split", dict(split="test")), ("longer than the context", dict(row_len=513)),
                     ("no share", dict(heldout=1.)), ("less than a row", dict(n_tokens=10)),
                     ("heldout part .* fewer than one row", dict(split="heldout", row_len=512, heldout=.03))]:
        with pytest.raises(SparseCodingError, match=says): load_rows(path, model, **kw)
    with pytest.raises(SparseCodingError, match="does not exist"): load_rows("./nothing.jsonl", model)
    with pytest.raises(SparseCodingError, match="with n_tokens"): load_rows("somebody/some-data", model)


def test_hub_name_without_a_hub(model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SparseCodingError, match='use "embedded" or the path'):
        load_rows("somebody/some-data", model, n_tokens=1000)


def test_hub_data_are_streamed_no_further_than_asked(model, monkeypatch):
    taken = []
    def endless(name, split, streaming):
        assert (name, split, streaming) == ("somebody/pile", "train", True)
        for i in range(10**9):
            taken.append(i)
            yield {"text": f"{i} " + " ".join(WORDS*40), "meta": {"pile_set_name": "Books"}}
    monkeypatch.setattr("sparse_coding.corpora.hub_reachable", lambda: True)
    monkeypatch.setattr("datasets.load_dataset", endless)
    made = load_rows("somebody/pile", model, n_tokens=512*64, row_len=64)
    assert len(made) == 512 and set(made.domain) == {"pile"} and set(made.topic) == {"Books"}
    assert len(taken) < 10_000


def test_interrupted_work_is_done_again(model, mixed, monkeypatch):
    path, _ = mixed
    import sparse_coding.corpora as corpora
    whole = corpora._shuffle
    def cut(*args): raise KeyboardInterrupt
    monkeypatch.setattr(corpora, "_shuffle", cut)
    with pytest.raises(KeyboardInterrupt): load_rows(path, model, row_len=24, heldout=0)
    monkeypatch.setattr(corpora, "_shuffle", whole)
    made = load_rows(path, model, row_len=24, heldout=0)
    assert len(made) and not list(made.folder.glob("*.ribbon"))


def test_embedded_domains():
    firsts = {name: next(documents(name)) for name in ("encyclopedia", "code", "conversation")}
    assert all(isinstance(d, Document) and d.domain == name and d.topic and d.title for name, d in firsts.items())
    some = list(documents("conversation+code"))
    assert {d.domain for d in some} == {"conversation", "code"}
    assert not any("/locale/" in d.title or "/migrations/" in d.title for d in some)
    assert len({d.topic for d in some if d.domain == "conversation"}) == 21
