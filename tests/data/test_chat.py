"""Conversations become text: the user's own to the letter, every schema of TRL's, and nothing of a row lost in silence."""

import argparse
import copy
import datetime
import json
import re
import string

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrlhf.commands import embed, evaluate, generate, nearest
from jaxrlhf.data.chat import around
from jaxrlhf.data.pairs import DataError, read_demonstrations, read_pairs, read_prompts, text_id
from jaxrlhf.data.stored_responses import read_generations
from jaxrlhf.data.tokenizer import train_tokenizer
from jaxrlhf.models.hub import read_tokenizer
from jaxrlhf.models.hub.tokenizer import SAVED_IDS
from jaxrlhf.monitoring.runlog import RunLog
from jaxrlhf.pipeline import inputs
from jaxrlhf.pipeline.stages.context import RunContext
from jaxrlhf.pipeline.stages.sft import given_tokenizer, tokenizer_stage
from jaxrlhf.recipe import to_mapping
from jaxrlhf.storage.stage import Stage
from jaxrlhf.storage.store import Store

ASKED = "{% if add_generation_prompt %}"
# name → (template as its models publish it, EOS, further special tokens)
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        + ASKED + "{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|endoftext|>",
        ["<|im_start|>", "<|im_end|>"],
    ),
    "mistral": (  # Llama-2's kind: turns in brackets that are plain text, and </s>
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token + ' ' }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
        "</s>",
        ["<s>"],
    ),
    "llama3": (
        "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + "
        "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
        + ASKED + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        "<|end_of_text|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        + ASKED + "{{'<start_of_turn>model\n'}}{% endif %}",
        "<eos>",
        ["<start_of_turn>", "<end_of_turn>"],
    ),
    "zephyr": (  # reads past every role that it does not know
        "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
        "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
        "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + m['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        "</s>",
        [],
    ),
    "thinking": (  # Qwen3's kind: an empty thought before the last reply, tools, calls
        "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}{% for c in m.tool_calls %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
        + ASKED + "<|im_start|>assistant\n{% endif %}",
        "<|endoftext|>",
        ["<|im_start|>", "<|im_end|>"],
    ),
}  # fmt: skip


def built(config, root):
    """The hash of the run's tokenizer, which must have the config's template and go on having it when it is read back."""
    setting = RunContext(config, Store(root / ".stages"), root / "log", RunLog(root / "log", tensorboard=False), None)
    done = tokenizer_stage(setting)
    assert read_tokenizer(done.folder).chat_template == TEMPLATES["zephyr"][0]
    return done.hash


@pytest.fixture(scope="module")
def tokenizers():
    """One a template, all of bytes."""

    def make(template, eos, specials):
        tokenizer = train_tokenizer(["hello"], 300)
        tokenizer.add_special_tokens({"eos_token": eos, "bos_token": "<s>", "additional_special_tokens": specials})
        tokenizer.chat_template = template
        return tokenizer

    return {name: make(*parts) for name, parts in TEMPLATES.items()}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def say(*contents, roles=("user", "assistant")):
    return [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


def pieces(text):
    """Every part of a text: what a search for the reply could take for it."""
    return {text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1)}


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "thinking"])
def test_a_reply_is_what_the_user_wrote(name, tokenizers, tmp_path):
    """All one-character answers, the template's own words, and every part of what it writes around a reply."""
    template, eos, specials = TEMPLATES[name]
    around = {"chatml": "<|im_end|>\n", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>\n"}.get(name, f"{eos} \n")
    words = set(re.findall(r"\w+|<[^>]*>|\[[^\]]*\]", template)) | pieces(around) | set(string.printable)
    answers = sorted(w for w in words if w == w.strip() != "" and not any(s in w for s in (eos, *specials, "<s>")))
    assert len(answers) > 110
    rows = [{"messages": say("zqprobe assistant d", "hello", "zqprobe", answer)} for answer in [*answers, "zqprobe", "a\nb zqprobe c"]]
    read, _ = read_demonstrations(lines(tmp_path / "a.jsonl", rows), tokenizer=tokenizers[name], on_bad_row="error")
    wrong = {row["messages"][-1]["content"]: got.response for row, got in zip(rows, read, strict=True)}
    assert {wrote: got for wrote, got in wrong.items() if wrote != got} == {}


def test_pairs_and_what_the_template_writes_before_a_reply(tokenizers, tmp_path):
    """A thought or a space that the template puts before the reply belongs to the response; a template that rewrites it is refused."""
    row = {"chosen": say("q", "d"), "rejected": say("q", "_")}
    path = lines(tmp_path / "a.jsonl", [row])
    ((pair,), _) = read_pairs(path, tokenizer=tokenizers["thinking"])
    assert (pair.chosen, pair.rejected) == ("<think>\n\n</think>\n\nd", "<think>\n\n</think>\n\n_")
    tokenizer = train_tokenizer(["hello"], 300)
    refused = ("m.content | upper", "''", "m.content | replace('d', '')", "m.content + ('!' if m.content == 'd' else '')")
    refused += ("m.content + (';' if m.content == 'd' else ',')",)  # an end that depends on the reply
    for written, expected in (("' ' + m.content | trim + ' '", " d"), *((one, None) for one in refused)):
        frame = "{% for m in messages %}{{ m.role + ':' }}{{ " + written + " }}.{% endfor %}"
        tokenizer.chat_template = frame + ASKED + "assistant:{% endif %}"
        if expected:
            assert read_pairs(path, tokenizer=tokenizer)[0][0].chosen == expected
        else:
            with pytest.raises(DataError, match="chat template changed the reply"):
                read_pairs(path, tokenizer=tokenizer)


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "of a city"}}]


def called(**content):
    return [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "tool_calls": [CALL], **content},
        {"role": "tool", "name": "weather", "content": "dry"},
        {"role": "assistant", "content": "No."},
    ]


def test_tool_calls_stand_beside_no_content(tokenizers, tmp_path):
    """`content: null`, no content and "" are the same; a reply may be a call; tools may be spelled as JSON."""
    rows = [
        {"messages": called(**c), "tools": tools}
        for c, tools in (({"content": None}, TOOLS), ({}, json.dumps(TOOLS)), ({"content": ""}, TOOLS))
    ]
    read, report = read_demonstrations(lines(tmp_path / "a.jsonl", rows), tokenizer=tokenizers["thinking"])
    call = '<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call>'
    assert report.dropped == []
    assert (
        {row.prompt.count(call) for row in read} == {1}
        and {row.response[-3:] for row in read} == {"No."}
        and len({r.prompt for r in read}) == 1
    )
    pair = {"prompt": say("Rain?"), "chosen": called(content=None)[1:2], "rejected": say("No.", roles=("assistant",))}
    ((pair,), _) = read_pairs(lines(tmp_path / "b.jsonl", [pair]), tokenizer=tokenizers["thinking"])
    assert (pair.chosen[-len(call) :], pair.rejected[-3:]) == (call, "No.")
    other = copy.deepcopy(tokenizers["thinking"])  # calls end otherwise than what is said: where the reply ends is not known
    other.chat_template = other.chat_template.replace(
        "<|im_end|>\n{% endfor %}", "{{ '!' if m.tool_calls else '<|im_end|>' }}\n{% endfor %}"
    )
    with pytest.raises(DataError, match="chat template changed the reply"):
        read_pairs(tmp_path / "b.jsonl", tokenizer=other)


def test_a_call_and_the_content_beside_it_are_both_looked_for(tokenizers, tmp_path):
    """Templates that write one of the two lose the other; one that writes both may have a reply of both."""
    both, writes = called(content="Let me look."), tokenizers["thinking"].chat_template
    pair = {"prompt": both[:1], "chosen": both[1:2], "rejected": say("No.", roles=("assistant",))}
    call = '<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call>'
    for template, lost in (
        (writes, None),
        (writes.replace("{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}"), "content"),
        (writes.replace("for c in m.tool_calls", "for c in []"), "tool_calls"),
    ):
        tokenizer = copy.deepcopy(tokenizers["thinking"])
        tokenizer.chat_template = template
        for read, row in ((read_demonstrations, {"messages": both}), (read_pairs, pair)):
            path = lines(tmp_path / "a.jsonl", [row, {"prompt": "p", "chosen": "c", "rejected": "r"}])
            rows, report = read(path, tokenizer=tokenizer)
            reasons = [reason.partition(";")[0] for _, reason in report.dropped]
            assert reasons == ([f"lost in the chat template: it writes nothing of the {lost} of role 'assistant'"] if lost else []), (
                template
            )
            written = getattr(rows[0], "chosen" if read is read_pairs else "prompt")
            assert lost or f"Let me look.{call}" in written, written


def test_content_parts_of_text_are_joined_and_others_named(tokenizers, tmp_path):
    part = {"type": "text", "text": "q"}
    rows = [
        {"prompt": [{"role": "user", "content": content}]}
        for content in ("q", [part, {**part, "text": "r"}], [part, {"type": "image"}], [part, "r"], [])
    ]
    read, report = read_prompts(lines(tmp_path / "a.jsonl", rows), tokenizer=tokenizers["chatml"])
    assert [row.prompt for row in read] == [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in ("q", "qr")]
    assert report.dropped[0][1].startswith("mistyped field: prompt[0].content has a part of type 'image'")


def test_roles_are_the_templates_to_write(tokenizers, tmp_path):
    """A role that the template writes is kept, whichever it is; one that it reads past, or calls that it reads past, are named."""
    rows = [{"prompt": [{"role": role, "content": "be brief"}, *say("q")]} for role in ("system", "developer", "tool")]
    rows += [{"messages": called(content="")}]
    path, dropped = lines(tmp_path / "a.jsonl", rows), {}
    for name in ("chatml", "zephyr", "gemma"):
        read, report = read_prompts(path, tokenizer=tokenizers[name])
        dropped[name] = [reason.split(":")[0] for _, reason in report.dropped]
        assert len(read) + len(dropped[name]) == 4 and all("be brief" in row.prompt for row in read if "Rain" not in row.prompt)
    past = "lost in the chat template"
    assert dropped == {"chatml": [past], "zephyr": [past] * 3, "gemma": ["chat template refused the row", past]}


def test_no_text_of_a_row_acts_as_a_control_token(tokenizers, tmp_path):
    """Not in a call, its arguments' names, a tool or an option of the template either."""
    bad = "x<|im_end|>"
    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ({"city": bad}, {bad: 1}, f'{{"city": "{bad}"}}')]
    rows = [{"messages": [*say("q"), {"role": "assistant", "tool_calls": [call]}, *say("a", "b")]} for call in calls]
    good = {"messages": say("q", "a")}
    rows += [good | {"tools": [{"name": bad}]}, good | {"chat_template_kwargs": {"mood": bad}}, good]
    _, report = read_demonstrations(lines(tmp_path / "a.jsonl", rows), tokenizer=tokenizers["thinking"])
    assert [reason.split(":")[0] for _, reason in report.dropped] == ["control token in a message"] * 5


def test_rows_of_other_trainers_are_named_with_the_way_to_convert(tmp_path):
    kto, steps = {"prompt": "p", "completion": " c", "label": True}, {"prompt": "p", "completions": ["a", "b"], "labels": [True, False]}
    good = {"prompt": "p", "chosen": "c", "rejected": "r"}
    _, report = read_pairs(lines(tmp_path / "a.jsonl", [kto, steps, good]))
    reasons = [reason for _, reason in report.dropped]
    assert [reason.split(":")[0] for reason in reasons] == ["unpaired preference (KTO)", "stepwise supervision"]
    assert "labelled true and one labelled false" in reasons[0] and "{prompt, chosen, rejected}" in reasons[0]
    read, report = read_demonstrations(lines(tmp_path / "b.jsonl", [kto, kto | {"label": 0}, steps, {"text": "t", "label": 0}]))
    assert [row.response for row in read] == [" c", "t"]
    assert [reason.split(":")[0] for _, reason in report.dropped] == ["labelled false", "stepwise supervision"]


def test_an_id_of_any_kind_is_spelled(tmp_path):
    """Floats and times as a data frame writes them; what is no number is no id. Stored responses are read by the same rule."""
    when = datetime.datetime(2024, 5, 1, 12, 30)
    columns, found, stored = {"f": [1.5, float("nan"), None], "t": [when, None, None], "d": [when.date(), None, None]}, [], []
    for name, ids in columns.items():
        pq.write_table(pa.table({"id": ids, "prompt": ["p", "q", "r"], "completion": ["c"] * 3}), tmp_path / f"{name}.parquet")
        found.append([row.id for row in read_prompts(tmp_path / f"{name}.parquet")[0]])
        stored.append([row.id for row in read_generations(tmp_path / f"{name}.parquet")])
    spelled = ["1.5", "2024-05-01T12:30:00", "2024-05-01"]
    assert found == stored == [[one, text_id("q"), text_id("r")] for one in spelled]
    with pytest.raises(DataError, match=r"mistyped field: id must be .* not \[1\]"):
        read_prompts(lines(tmp_path / "a.jsonl", [{"id": [1], "prompt": "p"}]))


# ---- what a config says of it


def advised(error):
    """The keys of a config that a message names."""
    return re.findall(r"\b(?:data|tokenizer)\.\w+", str(error))


def test_the_message_about_implicit_prompts_names_a_key_that_reads_them(tiny_config, tmp_path):
    rows = [{"chosen": f"The sky {n} is blue.", "rejected": f"The sky {n} is green."} for n in range(4)]
    path = str(lines(tmp_path / "a.jsonl", rows))
    base = {"data__train": path, "gold__kind": "none", "pairs__source": "data", "data__valid_fraction": 0.5}
    config = tiny_config(tmp_path, **base)
    with pytest.raises(DataError, match="no prompt: ") as caught:
        inputs.pairs_of(config)
    known = to_mapping(config)["data"]
    assert [key for key in advised(caught.value) if key.removeprefix("data.") in known] == ["data.implicit_prompt"] * 4
    train, valid, _ = inputs.pairs_of(tiny_config(tmp_path, **base, data__implicit_prompt="common_prefix"))
    assert sorted((p.prompt, p.chosen, p.rejected) for p in train + valid) == [(f"The sky {n} is", " blue.", " green.") for n in range(4)]


def test_a_message_advises_what_there_is_where_it_is_read(tmp_path):
    """In a config, in the commands that read rows without one, and in Python."""
    kinds = {
        "conversation": {"prompt": say("q", roles=("user",))},
        "no prompt": {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    }
    said = {}
    for name, row in kinds.items():
        with pytest.raises(DataError, match=name) as caught:
            read_prompts(lines(tmp_path / "a.jsonl", [row]))
        said[name] = str(caught.value)
    for name, key, option, argument in (
        ("conversation", "tokenizer.chat_template", "--tokenizer", "tokenizer="),
        ("no prompt", "data.implicit_prompt", "--implicit_prompt", "implicit_prompt="),
    ):
        assert f"in a config {key}" in said[name] and f"of a command {option}" in said[name] and f"in Python pass {argument}" in said[name]
    for command in (evaluate, embed, nearest, generate):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        there = set(parser._option_string_actions)  # generate's tokenizer is the policy's
        assert {"--tokenizer", "--implicit_prompt", "--template_date"} - there == ({"--tokenizer"} if command is generate else set())


def test_a_template_that_is_no_jinja_is_refused_where_it_is_given(tiny_config, tmp_path, tokenizers):
    """By file or key and in Jinja's words; not once a row, as if the rows were at fault."""
    broken, rows = "{% for m in messages %}\n{{ m.content }", lines(tmp_path / "a.jsonl", [{"messages": say("q", "a")}])
    (tmp_path / "b.jinja").write_text(broken)
    inside, beside = tmp_path / "inside", tmp_path / "beside"
    for folder in (inside, beside):
        tokenizers["zephyr"].save_pretrained(str(folder))
        (folder / "chat_template.jinja").unlink()
    (beside / "chat_template.jinja").write_text(broken)
    stated = json.loads((inside / "tokenizer_config.json").read_text())
    (inside / "tokenizer_config.json").write_text(json.dumps(stated | {"chat_template": broken}))
    base = {"data__train": str(rows), "gold__kind": "none", "pairs__source": "data"}
    for where, of in (
        ("tokenizer.chat_template", {"chat_template": broken}),
        (f"tokenizer.chat_template, {tmp_path / 'b.jinja'},", {"chat_template": str(tmp_path / "b.jinja")}),
        (f"{beside / 'chat_template.jinja'}", {"source": str(beside)}),
        (f"chat_template of {inside / 'tokenizer_config.json'}", {"source": str(inside)}),
    ):
        with pytest.raises(ValueError) as error:
            config = tiny_config(tmp_path, **base, **{f"tokenizer__{name}": value for name, value in of.items()})
            inputs.check(config, given_tokenizer(config))
        said = f"{where} is no valid Jinja template: unexpected '}}' (line 2); mend or remove it."
        assert str(error.value) == said, error.value


def test_a_tokenizer_from_before_its_ids_were_kept_is_made_again(tiny_config, tmp_path):
    """Nothing holds what is read from there to what was saved: stages of version 1 may have no ids."""
    setting = RunContext(tiny_config(tmp_path), Store(tmp_path / ".stages"), tmp_path / "log", RunLog(tmp_path / "log"), None)
    folder = tokenizer_stage(setting).folder
    record = json.loads((folder / "stage.json").read_text())
    old = Stage("tokenizer", "data", "tokenizer", record["config"]).hash
    (folder / SAVED_IDS).unlink()
    (folder / "stage.json").write_text(json.dumps(record | {"hash": old}))
    folder.rename(folder.with_name(old))
    assert (tokenizer_stage(setting).folder / SAVED_IDS).is_file()


def test_a_config_gives_the_chat_template(tiny_config, tmp_path, tokenizers):
    """As text or as a file, for a tokenizer that has one and for one that is trained here; its text and not its path is what counts."""
    rows = [{"chosen": say(f"q{n}", "d"), "rejected": say(f"q{n}", "e")} for n in range(4)]
    base = {
        "data__train": str(lines(tmp_path / "a.jsonl", rows)),
        "gold__kind": "none",
        "pairs__source": "data",
        "data__valid_fraction": 0.5,
    }
    config = tiny_config(tmp_path, **base)
    with pytest.raises(DataError, match="conversation") as caught:
        inputs.pairs_of(config, given_tokenizer(config))
    assert [key for key in advised(caught.value) if key.removeprefix("tokenizer.") not in to_mapping(config)["tokenizer"]] == []
    assert "tokenizer.chat_template" in advised(caught.value)
    (tmp_path / "t.jinja").write_text(TEMPLATES["zephyr"][0])
    tokenizers["chatml"].save_pretrained(tmp_path / "tokenizer")
    for source in (None, str(tmp_path / "tokenizer")):
        hashes = []
        for template in (str(tmp_path / "t.jinja"), TEMPLATES["zephyr"][0]):
            config = tiny_config(tmp_path / "run", **base, tokenizer__source=source, tokenizer__chat_template=template)
            train, valid, _ = inputs.pairs_of(config, given_tokenizer(config))
            assert {p.chosen for p in train + valid} == {"d"} and all(p.prompt.startswith("<|user|>\nq") for p in train)
            hashes.append(built(config, tmp_path))
        assert hashes[0] == hashes[1]
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.chat_template.*gone\.jinja"):
        given_tokenizer(tiny_config(tmp_path, **base, tokenizer__chat_template=str(tmp_path / "gone.jinja")))


def test_around_has_all_messages_before_the_last(tokenizers):
    messages = say("first", "second", "third")
    before, _ = around(tokenizers["chatml"], [*messages, {"role": "assistant"}], {})
    assert [word in before for word in ("first", "second", "third")] == [True] * 3


def test_prompts_of_messages_are_rendered_and_said_to_be(tokenizers, tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"prompt": say("q")}, {"prompt": "plain", "other": None}])
    rows, _ = read_prompts(path, tokenizer=tokenizers["chatml"])
    assert [row.templated for row in rows] == [True, False]


def test_content_that_is_no_text_is_refused_beside_a_call(tokenizers, tmp_path):
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    for content in (3, None):
        message = {"role": "assistant", "content": content} | ({"tool_calls": call} if content is not None else {})
        path = lines(tmp_path / "a.jsonl", [{"messages": [*say("q"), message]}, {"messages": say("q", "d")}])
        rows, report = read_demonstrations(path, tokenizer=tokenizers["chatml"])
        assert len(rows) == 1 and "messages[1].content must be text" in report.dropped[0][1], report.dropped


def test_a_null_field_is_said_to_be_null(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"question": "q", "prompt": None}, {"prompt": "p", "chosen": "c", "rejected": "r"}])
    _, report = read_pairs(path)
    assert "fields question, prompt (null);" in report.dropped[0][1]
