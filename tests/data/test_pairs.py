"""Readers: every schema, every fault by name, ids, splits. Files are made by hand in tmp_path."""

import copy
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxrlhf.data import pairs as P
from jaxrlhf.data.pairs import DataError, Pair, dataset_hash, read_demonstrations, read_pairs, read_prompts, split_by_prompt
from jaxrlhf.data.schemas import cut_prompt
from jaxrlhf.data.sources import iter_rows
from jaxrlhf.data.tokenizer import train_tokenizer

GOOD = {"prompt": "p", "chosen": " c", "rejected": " r"}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def lines(path, *rows):
    path.write_bytes(b"".join(r if isinstance(r, bytes) else (json.dumps(r) + "\n").encode() for r in rows))
    return path


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = train_tokenizer(["hello"], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def say(*contents, roles=("user", "assistant")):
    return [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


def test_explicit_pairs_are_kept_to_the_letter(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"id": 7, "prompt": " p\n", "chosen": " c {} ", "rejected": "\tr", "margin": 2, "extra": [1]})
    (pair,), report = read_pairs(path)
    assert pair == Pair("7", " p\n", " c {} ", "\tr", f"{path}:1", 2.0)
    assert report.kept == 1 and not report.dropped


def test_frames_put_bare_instructions_into_a_dialogue(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"prompt": "a {} b", "chosen": "c", "rejected": "r"})
    (pair,), _ = read_pairs(path, prompt_format="\n\nHuman: {}\n\nAssistant:", response_format=" {}")
    assert (pair.prompt, pair.chosen, pair.rejected) == ("\n\nHuman: a {} b\n\nAssistant:", " c", " r")
    with pytest.raises(DataError, match="prompt_format"):
        read_pairs(path, prompt_format="no place")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("\n\nHuman: q\n\nAssistant: yes", "\n\nHuman: q\n\nAssistant: no", "\n\nHuman: q\n\nAssistant:"),
        # a response that contains the marker: each side's own last marker would give two prompts
        ("\n\nHuman: q\n\nAssistant: wait\n\nAssistant: yes", "\n\nHuman: q\n\nAssistant: no", "\n\nHuman: q\n\nAssistant:"),
        # responses that begin alike
        ("\n\nHuman: q\n\nAssistant: It is", "\n\nHuman: q\n\nAssistant: It was", "\n\nHuman: q\n\nAssistant:"),
        # one response is the beginning of the other
        ("\n\nHuman: q\n\nAssistant: a b", "\n\nHuman: q\n\nAssistant: a", "\n\nHuman: q\n\nAssistant:"),
        # an empty turn inside the dialogue is part of the prompt
        (
            "\n\nAssistant: \n\nHuman: q\n\nAssistant: 1",
            "\n\nAssistant: \n\nHuman: q\n\nAssistant: 2",
            "\n\nAssistant: \n\nHuman: q\n\nAssistant:",
        ),
        # the prefix ends in the middle of a marker that only one side completes
        ("\n\nHuman: q\n\nAssistant: x\n\nAssist", "\n\nHuman: q\n\nAssistant: x\n\nAssistant: y", "\n\nHuman: q\n\nAssistant:"),
    ],
)
def test_implicit_prompt_is_the_common_prefix_up_to_its_last_marker(chosen, rejected, prompt):
    assert cut_prompt(chosen, rejected) == (prompt, chosen[len(prompt) :], rejected[len(prompt) :])


def test_implicit_prompt_without_the_marker_is_refused_unless_asked_for(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"chosen": "The sky is blue.", "rejected": "The sky is green."}, GOOD)
    (pair,), report = read_pairs(path)
    assert pair.prompt == "p" and report.reasons() == {"no prompt": 1}
    rows, _ = read_pairs(path, implicit_prompt="common_prefix")
    assert (rows[0].prompt, rows[0].chosen, rows[0].rejected) == ("The sky is", " blue.", " green.")


FAULTS = {
    b'{"prompt": "p", "chosen"\n': "not JSON",
    b"[1, 2]\n": "not a JSON object",
    b'"text"\n': "not a JSON object",
    b'{"prompt": "\xff", "chosen": "c", "rejected": "r"}\n': "not UTF-8",
    b'{"prompt": "\\ud83d", "chosen": "c", "rejected": "r"}\n': "not valid Unicode",
    b'{"prompt": "p", "chosen": "c"}\n': "unknown schema",
    b'{"question": "p", "good": "c"}\n': "unknown schema",
    b"{}\n": "unknown schema",
    b'{"prompt": null, "chosen": "c", "rejected": "r"}\n': "no prompt",  # a null column is an absent one
    b'{"prompt": "p", "chosen": 3, "rejected": "r"}\n': "mistyped field",
    b'{"prompt": ["p"], "chosen": "c", "rejected": "r"}\n': "mistyped field",
    b'{"prompt": "p", "chosen": "c", "rejected": "r", "margin": "big"}\n': "mistyped field",
    b'{"prompt": "p", "chosen": "c", "rejected": "r", "margin": NaN}\n': "mistyped field",
    b'{"prompt": "p", "chosen": "c", "rejected": "r", "margin": 1e39}\n': "mistyped field",
    b'{"prompt": "p", "chosen": "c", "rejected": "r", "margin": 1' + b"0" * 400 + b"}\n": "mistyped field",
    b'{"id": [1], "prompt": "p", "chosen": "c", "rejected": "r"}\n': "mistyped field",
    b'{"prompt": "p", "chosen": "c", "rejected": ""}\n': "empty response",
    b'{"prompt": "p", "chosen": " \\n", "rejected": "r"}\n': "empty response",
    b'{"prompt": "p", "chosen": "c", "rejected": "c"}\n': "identical sides",
    b'{"chosen": "\\n\\nHuman: q\\n\\nAssistant: c", "rejected": "\\n\\nHuman: q\\n\\nAssistant: "}\n': "empty response",
}


def test_every_fault_is_named_with_file_and_line_and_the_rest_is_kept(tmp_path):
    path = lines(tmp_path / "a.jsonl", GOOD, b"\n", *FAULTS, GOOD)  # line 2 is blank and no row
    rows, report = read_pairs(path)
    assert [r.source for r in rows] == [f"{path}:1", f"{path}:{len(FAULTS) + 3}"]
    assert [(s, reason.split(":")[0]) for s, reason in report.dropped] == [
        (f"{path}:{i}", r) for i, r in enumerate(FAULTS.values(), start=3)
    ]


@pytest.mark.parametrize("fault", FAULTS)
def test_on_bad_row_error_stops_at_the_row(tmp_path, fault):
    path = lines(tmp_path / "a.jsonl", GOOD, fault)
    with pytest.raises(DataError, match=rf"a\.jsonl:2: {FAULTS[fault]}.*on_bad_row"):
        read_pairs(path, on_bad_row="error")


def test_a_source_without_a_usable_row_always_raises(tmp_path):
    with pytest.raises(DataError, match=r"no usable row(.|\n)*identical sides"):
        read_pairs(lines(tmp_path / "a.jsonl", GOOD | {"chosen": " r"}))


def test_the_report_names_all_in_the_file_and_caps_the_screen(tmp_path):
    _, report = read_pairs(lines(tmp_path / "a.jsonl", GOOD, *[{"x": i} for i in range(9)]))
    assert report.summary(limit=2).count("a.jsonl:") == 2 and "7 more" in report.summary(limit=2)
    report.write(tmp_path / "dropped.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert [r["source"] for r in rows] == [f"{tmp_path / 'a.jsonl'}:{i}" for i in range(2, 11)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "dropped.jsonl"]


def test_truncated_gzip_keeps_what_can_be_read_and_says_where_it_broke(tmp_path):
    whole = b"".join(json.dumps(GOOD | {"prompt": f"{i * 7919**3}"}).encode() + b"\n" for i in range(2000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(whole))
    assert len(read_pairs(tmp_path / "a.jsonl.gz", on_bad_row="error")[0]) == 2000
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(whole)[:-3000])
    rows, report = read_pairs(tmp_path / "b.jsonl.gz")
    assert 0 < len(rows) < 2000
    ((where, reason),) = report.dropped
    assert where == f"{tmp_path / 'b.jsonl.gz'}:{len(rows) + 1}" and reason.startswith("damaged gzip")
    with pytest.raises(DataError, match="damaged gzip"):
        read_pairs(tmp_path / "b.jsonl.gz", on_bad_row="error")


def test_gzip_is_recognised_by_content_and_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(GOOD).encode()))
    assert len(read_pairs(tmp_path / "a.jsonl")[0]) == 1


def test_json_arrays_parquet_and_several_files(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([GOOD, 3]))
    pq.write_table(
        pa.table({"prompt": ["p", "q"], "chosen": ["c", None], "rejected": ["r", "s"], "margin": [None, 1.0]}), tmp_path / "b.parquet"
    )
    rows, report = read_pairs([tmp_path / "a.json", tmp_path / "b.parquet"])
    assert [r.source for r in rows] == [f"{tmp_path / 'a.json'}:1", f"{tmp_path / 'b.parquet'}:1"]
    assert report.dropped[0][0].endswith("a.json:2") and report.dropped[1] == (
        f"{tmp_path / 'b.parquet'}:2",
        "mistyped field: chosen must be text, not null",
    )
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"c\.parquet is not a readable Parquet"):
        read_pairs(tmp_path / "c.parquet")


def test_a_folder_is_read_only_as_the_shards_of_one_set(tmp_path):
    for i in (1, 0):
        lines(tmp_path / f"train-0000{i}-of-00002.jsonl", GOOD | {"id": f"x{i}"})
    assert [r.id for r in read_pairs(tmp_path)[0]] == ["x0", "x1"]
    lines(tmp_path / "test-00000.jsonl", GOOD)
    with pytest.raises(DataError, match="Name the file"):
        read_pairs(tmp_path)


def test_sources_that_are_no_file(monkeypatch):
    import datasets

    asked = []

    def load(name, subset, split):
        asked.append((name, subset, split))
        if name == "org/gone":
            raise ConnectionError("offline")
        return datasets.Dataset.from_list([{**GOOD, "prompt_token": [1, 2]}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    for missing in ("data/train.jsonl", "org/x.parquet"):  # looks like a hub id but is a file that is not there
        with pytest.raises(FileNotFoundError, match=missing):
            read_pairs(missing)
    for wrong in ("plain", "a/b/c", "../x", ""):
        with pytest.raises((DataError, FileNotFoundError)):
            read_pairs(wrong)
    assert asked == []
    (pair,), _ = read_pairs("org/name", split="test", subset="s")
    assert pair.source == "org/name[test]:1" and asked == [("org/name", "s", "test")]
    asked.clear()
    (pair,), _ = read_pairs(["org/name[validation]"])
    assert pair.source == "org/name[validation]:1" and asked == [("org/name", None, "validation")]
    with pytest.raises(DataError, match=r"org/gone.*offline"):
        read_pairs("org/gone")


def test_local_paths_never_reach_the_hub(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("network"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    lines(tmp_path / "org" / "name-0.jsonl", GOOD)
    assert len(read_pairs("org")[0]) == 1 and len(read_pairs("org/name-0.jsonl")[0]) == 1


def test_ids_are_given_or_hashed_and_always_unique(tmp_path):
    rows = [GOOD, GOOD, GOOD | {"chosen": "z"}, GOOD, GOOD | {"id": "a"}, GOOD | {"id": "a-1"}, GOOD | {"id": "a"}, GOOD | {"id": "a"}]
    read, report = read_pairs(lines(tmp_path / "a.jsonl", *rows))
    h = P.text_id("p", " c", " r")
    assert [r.id for r in read] == [h, f"{h}-1", P.text_id("p", "z", " r"), f"{h}-2", "a", "a-1", "a-2", "a-3"]
    assert len(h) == 16 and report.counts["duplicate ids renamed"] == 4
    assert P.text_id("ab", "c") != P.text_id("a", "bc")


def test_split_by_prompt_leaks_no_prompt_and_ignores_order():
    rows = [Pair(f"{p}-{k}", f"prompt {p}", f"c{k}", "r", "x") for p in range(40) for k in range(1 + p % 3)]
    train, valid = split_by_prompt(rows, 0.2, seed=1)
    assert not {r.prompt for r in train} & {r.prompt for r in valid}
    assert len(train) + len(valid) == len(rows) and abs(len(valid) - 0.2 * len(rows)) <= 3
    again = split_by_prompt(rows[::-1], 0.2, seed=1)[1]
    assert {r.id for r in again} == {r.id for r in valid} != {r.id for r in split_by_prompt(rows, 0.2, seed=2)[1]}
    assert split_by_prompt(rows, 0.0, seed=1) == (rows, [])
    both = split_by_prompt([Pair(p, p, "c", "r", "x") for p in "ab"], 0.9, seed=1)
    assert [[row.prompt for row in side] for side in both] == [["b"], ["a"]]  # two prompts: one a side
    with pytest.raises(DataError, match="distinct prompt"):
        split_by_prompt(rows[:1], 0.5, seed=1)
    for fraction in (-0.1, 1.0):
        with pytest.raises(DataError, match=rf"the validation fraction is {fraction}; it must be in \[0, 1\)"):
            split_by_prompt(rows, fraction, seed=1)


def test_dataset_hash_sees_texts_and_ids_but_not_order_or_file():
    rows = [Pair("a", "p", "c", "r", "f:1"), Pair("b", "p", "c", "s", "f:2")]
    base = dataset_hash(rows)
    assert base == dataset_hash([Pair("b", "p", "c", "s", "g:9"), rows[0]])
    assert len({base, dataset_hash(rows[:1]), dataset_hash([rows[0], Pair("b", "p", "s", "c", "f:2")])}) == 3
    assert dataset_hash([Pair("ü", "p", "ja ✓", "nein", "f:1")]) == "7554a0e9dad54d62de20b58668c737a3"  # columns that lie on disk name it


def test_a_report_names_the_first_five(capsys):
    report = P.ReadReport(1, [(f"f:{i}", "empty chosen") for i in range(7)])
    report.say("pairs: ")
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("pairs: rows: 1 kept, 7 dropped (7 empty chosen)\n")
    assert "f:4: empty chosen" in said.err and "f:5" not in said.err and "… and 2 more; the reasons count them" in said.err


def test_write_pairs_reads_back(tmp_path):
    rows = [Pair("a", "p\n", "c 🙂", "r", "x", 1.5), Pair("b", "p", "c", "r", "x", None, True)]
    P.write_pairs(tmp_path / "a.jsonl", rows)
    read, _ = read_pairs(tmp_path / "a.jsonl")
    assert [(r.id, r.prompt, r.chosen, r.rejected, r.margin, r.templated) for r in read] == [
        (r.id, r.prompt, r.chosen, r.rejected, r.margin, r.templated) for r in rows
    ]


# ---- demonstrations and prompts


def test_demonstrations_of_every_schema(tmp_path, chat_tokenizer):
    rows = [
        {"prompt": "p", "completion": " c"},
        {"prompt": "p", "response": " d"},
        {"prompt": "p", "chosen": " e"},
        GOOD,
        {"text": "just text"},
        {"messages": say("q", "a")},
        {"prompt": "p", "completion": "bad", "label": False},
        {"prompt": "p"},
        {"prompt": "p", "completion": "  "},
    ]
    read, report = read_demonstrations(lines(tmp_path / "a.jsonl", *rows), tokenizer=chat_tokenizer)
    head = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert [(r.prompt, r.response, r.templated) for r in read] == [
        *[("p", f" {x}", False) for x in "cdec"],
        ("", "just text", False),
        (head, "a", True),
    ]
    assert list(report.reasons()) == ["labelled false", "unknown schema", "empty response"]


def test_foreign_fields_are_told_the_names_that_are_read_and_the_ways_to_them(tmp_path):
    with pytest.raises(DataError) as error:
        read_prompts(lines(tmp_path / "a.jsonl", *[{"question": "q"}] * 7))
    assert "fields question; expected {prompt}, {prompt, completion}, {prompt, chosen}, {chosen, rejected} or {messages} (" in str(
        error.value
    )
    assert "data.rename" in str(error.value) and "rename=" in str(error.value) and "for a command in the file itself" in str(error.value)
    # What is not shown has no list that a command could print: the reasons count it.
    assert str(error.value).endswith("… and 2 more; the reasons count them, and mending these names the next")


def test_rename_maps_foreign_fields(tmp_path):
    (row,), _ = read_demonstrations(
        lines(tmp_path / "a.jsonl", {"question": "q", "answer": "a"}), rename={"question": "prompt", "answer": "completion"}
    )
    assert (row.prompt, row.response) == ("q", "a")


def test_prompts_of_every_schema_keep_a_good_reference(tmp_path, chat_tokenizer):
    hh = {"chosen": "\n\nHuman: q\n\nAssistant: c", "rejected": "\n\nHuman: q\n\nAssistant: r"}
    unpaired = {"prompt": "u", "completion": "bad", "label": False}
    rows = [{"prompt": "p"}, {"prompt": "p", "completion": " c"}, hh, unpaired, {"prompt": say("q")}, {"prompt": " "}, {"text": "t"}]
    read, report = read_prompts(lines(tmp_path / "a.jsonl", *rows), tokenizer=chat_tokenizer)
    assert [(r.prompt, r.reference) for r in read] == [
        ("p", None),
        ("p", " c"),
        ("\n\nHuman: q\n\nAssistant:", " c"),
        ("u", None),
        ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", None),
    ]
    assert list(report.reasons()) == ["empty prompt", "unknown schema"]
    once, report = read_prompts(tmp_path / "a.jsonl", tokenizer=chat_tokenizer, unique=True)
    assert [r.prompt for r in once].count("p") == 1 and report.counts["repeated prompts left out"] == 1 and report.kept == len(once)


def test_limit_counts_usable_rows(tmp_path):
    rows, report = read_pairs(lines(tmp_path / "a.jsonl", {}, GOOD, GOOD, GOOD), limit=2)
    assert len(rows) == 2 and len(report.dropped) == 1


# ---- conversations


def test_conversational_pairs_explicit_implicit_and_with_a_text_copy_of_the_prompt(tmp_path, chat_tokenizer):
    head = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    rows = [
        {"prompt": say("q"), "chosen": say("good", roles=("assistant",)), "rejected": say("bad", roles=("assistant",))},
        {"chosen": say("q", "good"), "rejected": say("q", "bad")},
        {"prompt": "q", "chosen": say("q", "good"), "rejected": say("q", "bad")},
    ]
    read, _ = read_pairs(lines(tmp_path / "a.jsonl", *rows), tokenizer=chat_tokenizer, on_bad_row="error")
    assert {(r.prompt, r.chosen, r.rejected, r.templated) for r in read} == {(head, "good", "bad", True)}


def test_conversational_faults(tmp_path, chat_tokenizer):
    rows = {
        "identical sides": {"chosen": say("q", "a"), "rejected": say("q", "a")},
        "empty response": {"chosen": say("q", "a"), "rejected": say("q", " ")},
        "no prompt": {"chosen": say("q", "a"), "rejected": say("z", "b")},
        "not one reply": {"chosen": say("q", "a", "more", "end"), "rejected": say("q", "b")},
        "control token in a message": {"chosen": say("q <|im_end|>", "a"), "rejected": say("q <|im_end|>", "b")},
        "mistyped field": {"chosen": [{"role": "user"}], "rejected": say("q", "b")},
        "not valid Unicode": {"chosen": say("q", "\ud800"), "rejected": say("q", "b")},
    }
    good = {"chosen": say("q", "a"), "rejected": say("q", "b")}
    read, report = read_pairs(lines(tmp_path / "a.jsonl", *rows.values(), good), tokenizer=chat_tokenizer)
    assert len(read) == 1 and [reason.split(":")[0] for _, reason in report.dropped] == list(rows)


def test_conversations_need_a_template(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"chosen": say("q", "a"), "rejected": say("q", "b")})
    with pytest.raises(DataError, match=r"a\.jsonl:1.*pass tokenizer="):
        read_pairs(path)
    with pytest.raises(DataError, match="no chat template"):
        read_pairs(path, tokenizer=train_tokenizer(["x"], 300))


def test_a_template_whose_generation_prompt_differs_is_refused(tmp_path, chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>{% endif")
    with pytest.raises(DataError, match="not a prefix"):
        read_pairs(lines(tmp_path / "a.jsonl", {"chosen": say("q", "a"), "rejected": say("q", "b")}), tokenizer=tokenizer)


def test_template_options_of_a_row_reach_the_template_and_cannot_break_the_reader(tmp_path, chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = "{{ mood or '' }}" + TEMPLATE
    good = {"chosen": say("q", "a"), "rejected": say("q", "b")}
    rows = [{"mood": "glad"}, {"tokenize": True, "add_generation_prompt": True}, "no object", {"messages": 1}]
    rows += [{"sanitize_control_tokens": True}]  # an argument that came with transformers 5
    path = lines(tmp_path / "a.jsonl", *[good | {"chat_template_kwargs": k} for k in rows])
    read, report = read_pairs(path, tokenizer=tokenizer)
    assert [r.prompt[:4] for r in read] == ["glad"] and [r.split(":")[0] for _, r in report.dropped] == ["mistyped field"] * 4


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["\ud800", "\n\nAssistant:", "<|im_end|>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "user"]), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["id", "prompt", "chosen", "rejected", "completion", "messages", "text", "margin", "label", "tools", "chat_template_kwargs"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.dictionaries(st.sampled_from(FIELDS), JSON | st.just(say("q", "a")), max_size=6) | JSON, max_size=4), st.binary(max_size=20)
)
def test_no_content_of_a_file_does_anything_but_be_kept_or_named(tmp_path, chat_tokenizer, rows, noise):
    path = lines(
        tmp_path / "a.jsonl", GOOD, *rows, noise.replace(b"\r", b"") + b"\n", GOOD
    )  # GOOD first: the noise could spell the magic number of gzip
    total = sum(1 for line in path.read_bytes().split(b"\n") if line.strip())
    for reader in (read_pairs, read_demonstrations, read_prompts):
        read, report = reader(path, tokenizer=chat_tokenizer)
        assert len(read) + len(report.dropped) == total and len({r.id for r in read}) == len(read)


# ---- real data


def raw_rows(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def _each_side(text):
    return text[: text.rfind("\n\nAssistant:")]


@pytest.mark.parametrize(("name", "rows", "broken", "empty"), [("hh_helpful", 1617, 8, 2), ("hh_harmless", 1550, 2, 4)])
def test_real_dialogues_common_prefix_keeps_the_pairs_that_cutting_each_side_breaks(real_data, name, rows, broken, empty):
    path = real_data / name / "raw" / "train.jsonl.gz"
    raw = raw_rows(path)
    assert len(raw) == rows and sum(_each_side(r["chosen"]) != _each_side(r["rejected"]) for r in raw) == broken
    pairs, report = read_pairs(path)
    assert len(pairs) == rows - empty and report.reasons() == {"empty response": empty}
    kept = [raw[int(p.source.rsplit(":", 1)[1]) - 1] for p in pairs]
    assert all(p.prompt + p.chosen == r["chosen"] and p.prompt + p.rejected == r["rejected"] for p, r in zip(pairs, kept, strict=True))
    assert all(p.prompt.endswith("\n\nAssistant:") for p in pairs)


@pytest.mark.parametrize("name", ["hh_helpful", "hh_harmless"])
def test_real_edge_cases_are_dropped_exactly_where_a_side_is_empty(real_data, name):
    path = real_data / name / "raw" / "edge_cases.jsonl.gz"
    raw = raw_rows(path)
    pairs, report = read_pairs(path)
    assert [p.id for p in pairs] == [r["id"] for r in raw if r["why"] == ["last Assistant marker differs between chosen and rejected"]]
    assert report.dropped == [(s, r) for s, r in report.dropped if r.startswith("empty response: ")]
    assert [s for s, _ in report.dropped] == [f"{path}:{i}" for i, r in enumerate(raw, start=1) if r["why"] == ["empty response"]]


def test_real_implicit_and_explicit_forms_agree(real_data):
    files = [real_data / "hh_helpful" / f for f in ("train.jsonl.gz", "raw/train.jsonl.gz")]
    texts = [{(p.prompt, p.chosen, p.rejected) for p in read_pairs(f)[0]} for f in files]
    print(len(texts[0]), len(texts[1]), len(texts[0] & texts[1]))
    assert texts[0] == texts[1]


def test_patterns_and_precomputed_token_columns(tmp_path):
    """A pattern reads its matches by name; a pattern without a match is a missing file; columns of token ids are not read."""
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(GOOD | {"prompt": name}) + "\n")
    rows, _ = read_pairs(f"{tmp_path}/[ab].jsonl")
    assert [row.prompt for row in rows] == ["a", "b"]
    with pytest.raises(FileNotFoundError, match=r"c\*\.jsonl: no file matches"):
        read_pairs(tmp_path / "c*.jsonl")
    table = pa.table({"query": ["p"], "query_token": [[1, 2]], "chosen": ["c"], "rejected": ["r"], "votes": [[1, 0]]})
    pq.write_table(table, tmp_path / "t.parquet")
    assert [set(row) for _, row in iter_rows(tmp_path / "t.parquet")] == [{"query", "chosen", "rejected"}]
    rows, _ = read_pairs(tmp_path / "t.parquet", rename={"query": "prompt"})
    assert rows[0].prompt == "p"
