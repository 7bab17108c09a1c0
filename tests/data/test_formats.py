"""A row means the same in JSONL, in Parquet and as `datasets` loads it, today and tomorrow, and a hub data set is its content."""

import json
import random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers.utils import get_json_schema

from jaxrlhf.data.chat import render
from jaxrlhf.data.pairs import read_demonstrations, read_pairs, read_prompts
from jaxrlhf.data.sources import iter_rows, plain
from jaxrlhf.data.stored_responses import read_generations
from jaxrlhf.data.tokenizer import train_tokenizer
from jaxrlhf.pipeline import inputs
from jaxrlhf.recipe import ConfigError, from_mapping, load_config, to_mapping

TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}{{ call['function']['name'] }}({{ call['function']['arguments'] | tojson }}){% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LOAD = datasets.load_dataset
DATED = "{{ strftime_now('%d %b %Y') }}\n" + TEMPLATE


def chat(template=TEMPLATE):
    tokenizer = train_tokenizer(["hello"], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def hub(monkeypatch):
    """What the hub serves is what this dict holds. A name is loaded once a process: give each test its own."""
    held = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split: held[name])
    return held


def table(rows):
    """All columns, null in the rows that lack one."""
    return pa.table({name: [row.get(name) for row in rows] for name in dict.fromkeys(name for row in rows for name in row)})


def some(random, **values):
    """Some of the values, in any order."""
    return {name: values[name] for name in random.sample(list(values), random.randint(0, len(values)))}


def conversation(random):
    """A question, a call of a tool with whatever arguments, its answer and a reply; sometimes without all that."""
    word = lambda: random.choice(["Oslo", "Rome", "null", "né", "{}", "None"])  # noqa: E731
    number = lambda: random.choice([0, 1, -3, 7.0, 0.5, -2.25, 1e16, 2**53])  # noqa: E731
    arguments = some(
        random, city=word(), days=number(), where=some(random, lat=number(), zone=word()), stops=[some(random, at=number(), by=word())]
    )
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    parameters = {"type": "object", "properties": some(random, city={"type": "string"}, days=some(random, type="integer", minimum=1))}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    called = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": word()}]
    messages = [{"role": "user", "content": word()}, *random.choice([called, []]), {"role": "assistant", "content": word()}]
    return {"messages": messages} | random.choice([{}, {"tools": [tool]}])


def test_a_thousand_conversations_are_the_same_in_every_format(tmp_path, hub):
    rows = [conversation(chosen) for chosen in [random.Random(0)] for _ in range(1000)]
    (tmp_path / "json").mkdir(), (tmp_path / "parquet").mkdir()
    jsonl, parquet = tmp_path / "json" / "train.jsonl", tmp_path / "parquet" / "train.parquet"
    jsonl.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    pq.write_table(table(rows), parquet)
    for kind in ("json", "parquet"):
        hub[f"org/thousand-{kind}"] = LOAD(str(tmp_path / kind), split="train", cache_dir=str(tmp_path / "cache"))
    places = (jsonl, parquet, "org/thousand-json", "org/thousand-parquet")
    said, *others = ([json.dumps({k: v for k, v in row.items() if v is not None}) for _, row in iter_rows(place)] for place in places)
    assert len(said) == 1000
    for other in others:
        differ = [pair for pair in zip(said, other, strict=True) if pair[0] != pair[1]]
        assert not differ, f"{len(differ)} of 1000 differ, first {differ[0]}"
    tokenizer = chat()
    (one, report), *others = (read_demonstrations(place, tokenizer=tokenizer, limit=100) for place in places)
    assert not report.dropped and any('weather({"days": ' in row.prompt and "properties" in row.prompt for row in one)
    for other, _ in others:
        assert [(row.id, row.prompt, row.response) for row in one] == [(row.id, row.prompt, row.response) for row in other]


def test_a_row_does_not_depend_on_the_rows_before_it(tmp_path):
    """Or the same conversation is one row in data.train and another in data.valid, and what is held out is trained on."""
    messages = [{"role": role, "content": role} for role in ("user", "assistant")]
    orders = [{"b": {"y": 1, "x": [{"q": 1, "p": 2}]}, "a": 2}, {"a": 2, "b": {"x": [{"p": 2, "q": 1}], "y": 1}}]
    tables = []
    for n, first in enumerate(orders):
        rows = [{"messages": messages, "tools": [{"name": "f", "parameters": one}]} for one in (first, orders[0])]
        jsonl, parquet = tmp_path / f"{n}.jsonl", tmp_path / f"{n}.parquet"
        jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
        pq.write_table(table(rows), parquet)
        tables += [read_demonstrations(file, tokenizer=chat())[0][1] for file in (jsonl, parquet)]
    assert len({(row.id.removesuffix("-1"), row.prompt) for row in tables}) == 1, [row.prompt for row in tables]


def test_a_whole_number_is_spelled_alike_in_every_format(tmp_path):
    """A column that holds a fraction has floats only, in Parquet; an id is one too. What a double cannot hold stays as it is."""
    rows = [
        {"id": 7, "prompt": "p", "x": {"n": 1}},
        {"id": 0.5, "prompt": "q", "x": {"n": 2.5}},
        {"id": 8.0, "prompt": "r", "x": {"n": -3.0}},
    ]
    jsonl, parquet = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(table(rows), parquet)
    one, other = ([json.dumps(row["x"]) for _, row in iter_rows(file)] for file in (jsonl, parquet))
    assert one == other == ['{"n": 1}', '{"n": 2.5}', '{"n": -3}']
    assert [row.id for row in read_prompts(jsonl)[0]] == [row.id for row in read_prompts(parquet)[0]] == ["7", "0.5", "8"]
    jsonl.write_text('{"big": 9007199254740993, "huge": 1e300, "not": true}\n')
    ((_, row),) = iter_rows(jsonl)
    assert json.dumps(row) == '{"big": 9007199254740993, "huge": 1e+300, "not": true}'


def test_a_null_column_is_an_absent_one(tmp_path):
    """A table has all columns in every row; a row of JSON has its own."""
    pair, dialogue = {"prompt": "p", "chosen": "c", "rejected": "r"}, "\n\nHuman: q\n\nAssistant: "
    kinds = {
        read_pairs: [pair, {"chosen": dialogue + "c", "rejected": dialogue + "r"}, pair | {"margin": 1.0}],
        read_demonstrations: [{"prompt": "p", "completion": "c"}, {"prompt": "p", "response": "d"}, {"text": "t"}, pair],
        read_prompts: [{"prompt": "p", "completion": "c"}, {"prompt": "q"}, {"prompt": "s", "response": "r"}, pair],
        read_generations: [{"prompt": "p", "completion": "c"}, {"prompt": "p", "response": "d", "reference": "r"}],
    }
    for read, rows in kinds.items():
        jsonl, parquet = tmp_path / f"{read.__name__}.jsonl", tmp_path / f"{read.__name__}.parquet"
        jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
        pq.write_table(table(rows), parquet)
        one, other = ([repr(row).replace(str(file), "") for row in rows_of(read, file)] for file in (jsonl, parquet))
        assert len(one) == len(rows) and one == other, read.__name__


def rows_of(read, file):
    found = read(file)
    return found[0] if isinstance(found, tuple) else found


def test_a_template_that_asks_for_the_date_is_given_the_one_of_the_config(tmp_path, capsys):
    question, answer, other = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
    file, recipe, tokenizer = tmp_path / "a.jsonl", tmp_path / "r.yaml", chat(DATED)
    rows = [{"prompt": [question] * turns, "chosen": [answer], "rejected": [other]} for turns in (1, 3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first_line = lambda rows: [row.prompt.split("\n")[0] for row in rows]  # noqa: E731
    assert first_line(read_pairs(file, tokenizer=tokenizer)[0]) == ["26 Jul 2024"] * 2  # whatever day it is
    recipe.write_text(f"data: {{train: {file}, template_date: 2031-02-03}}\n")
    config = load_config(recipe)
    assert from_mapping(to_mapping(config)) == config
    capsys.readouterr()
    for _ in range(2):
        assert first_line(inputs.pairs_of(config, tokenizer)[0]) == ["03 Feb 2031"]  # and one held out
    said = capsys.readouterr().err
    assert said.count("2031-02-03") == 1 and "data.template_date" in said
    assert inputs.data_identity(config)["template_date"] == "2031-02-03"
    with pytest.raises(ConfigError, match=r"template_date 'today' is no date; give one like 2024-07-26"):
        from_mapping({"data": {"template_date": "today"}})


def test_the_date_is_written_as_any_template_asks_and_its_other_text_is_as_it_was():
    """Conditions on `strftime_now`, several formats, white space at the start of the template, a call inside of a macro."""
    for template, text in (
        ("{% if strftime_now is defined %}{{ strftime_now('%Y-%m-%d %A %-d %B %H:%M') }}{% endif %}", "2024-07-26 Friday 26 July 00:00"),
        ("\n  {{ strftime_now('%y') }}\n\n{{ '%d' }}", "\n  24\n\n%d"),
        ("  {% macro day() %}\n{{ strftime_now('%d') }}\n{% endmacro %}\n {{ day() }}!", " 26\n!"),
    ):
        assert render(chat(template), [{"role": "user", "content": "q"}]) == (text,)


def test_a_hub_data_set_is_its_content_and_not_its_name(hub):
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    hub |= {f"org/identity-{n}": datasets.Dataset.from_list([row | {"chosen": text}]) for n, text in enumerate("ccd")}
    same, again, other = (inputs.data_identity(from_mapping({"data": {"train": name}}))["train"] for name in hub)
    assert same == again != other, "the rows decide, whatever the name"
    hub["org/identity-0"] = hub["org/identity-2"]  # published anew while a run reads it: the run goes on with what it began with
    assert read_pairs("org/identity-0")[0][0].chosen == "c"


def test_tools_keep_the_order_in_which_transformers_writes_them():
    """What models were trained on: a template's `tool | tojson` writes the keys as they stand."""

    def weather(city: str, days: int = 1):
        """The weather of a city.

        Args:
            city: Its name
            days: How many
        """

    schema, call = get_json_schema(weather), {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    assert [json.dumps(plain(one)) for one in (schema, call)] == [json.dumps(schema), json.dumps(call)]


def test_whole_numbers_end_before_64_bits_do():
    """2⁶³ is one more than a table's integers hold: it stays the float that it is."""
    assert [type(one) for one in plain([2.0**63, -(2.0**63), 2.0**62, 0.5])] == [float, float, int, float]
