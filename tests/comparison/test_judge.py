"""The judge's client against a real server on loopback that is busy, broken, silent, or talks nonsense; and against kills."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openai", reason="the judge's client library is not installed: pip install 'jaxrlhf[judge]'")

from jaxrlhf.comparison import judge_client
from jaxrlhf.comparison.judge import combine, judge_pairs
from jaxrlhf.comparison.judge_answers import AnswerError, AnswerFile
from jaxrlhf.comparison.judge_client import Judge, JudgeError, backoff_seconds
from jaxrlhf.comparison.judge_replies import FIRST, SECOND, TIE, parse
from jaxrlhf.evaluation.winrate import score

sys.path.insert(0, str(Path(__file__).parent))
from faulty_server import FAULTS, MALFORMED, FaultyServer

SECRET = "sk-very-secret-0123456789"
TEMPLATE = "Which is longer?\nQ: {prompt}\nA: {first}\nB: {second}\n"
NEVER = 600.0  # seconds: longer than any client waits. An honest answer, in contrast, comes in time on a busy machine too
FAST = {"template": TEMPLATE, "backoff": 0.001, "timeout": 5.0, "api_key_env": "TEST_JUDGE_KEY"}


def longer(content: str) -> str:
    """A judge that prefers the longer response, and ties equal lengths."""
    a, b = (len(found) for found in re.search(r"\nA: (.*)\nB: (.*)\n", content).groups())  # type: ignore[union-attr]
    return "tie" if a == b else "A" if a > b else " **B**.\n"


def rows(n: int):
    """n prompts with responses of 0 to 2 letters: wins, losses and ties."""
    return (
        [f"p{i}" for i in range(n)],
        ["x" * (i % 3) + f" {i % 7}" for i in range(n)],
        ["y" * (i // 3 % 3) + f" {i % 5}" for i in range(n)],
    )


def expected(a, b):
    return [float(np.sign(len(x) - len(y)) + 1) / 2 for x, y in zip(a, b, strict=True)]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_JUDGE_KEY", SECRET)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", FIRST),
        ("b", SECOND),
        ("Tie.", TIE),
        (' "B"\n', SECOND),
        ("**A**", FIRST),
        ("[[B]]", SECOND),
        ("<think>B? no</think>\nA", FIRST),
    ]
    + [(nonsense, None) for nonsense in ("", "A or B", "Answer: A", "Both", "AB", "C", "<think>A", "tie A")],
)
def test_an_answer_is_one_word_or_none(text, verdict):
    assert parse(text) == verdict


def test_only_both_orders_together_decide():
    table = {(FIRST, SECOND): 1.0, (SECOND, FIRST): 0.0, (FIRST, FIRST): 0.5, (SECOND, SECOND): 0.5, (TIE, TIE): 0.5}
    table |= {(FIRST, TIE): 0.5, (TIE, FIRST): 0.5, (None, FIRST): None, (SECOND, None): None, (None, None): None}
    assert {orders: combine(*orders) for orders in table} == table


def test_a_judge_that_always_prefers_the_first_scores_one_half(tmp_path):
    prompts, a, b = rows(40)
    with FaultyServer(lambda _: "A") as server:
        judged = judge_pairs(prompts, a, b, Judge("m", server.url, **FAST), tmp_path / "answers.jsonl")
    won = score(np.array([v.outcome for v in judged.verdicts]))
    assert (won.value, won.n) == (0.5, 40) and (won.low, won.high) == pytest.approx((0.35200, 0.64800), abs=1e-5)  # Wilson's of 20 in 40
    assert judged.usage["first_rate"] == 1.0 and judged.usage["consistency"] == 0.0


def test_verdicts_through_every_fault_in_the_order_of_the_pairs(tmp_path):
    prompts, a, b = rows(60)
    with FaultyServer(longer, FAULTS, silence=NEVER) as server:
        judge = Judge("m", server.url, **FAST | {"timeout": 3.0, "attempts": 12, "asks": 12}, price_in=2.0, price_out=10.0)
        shown = []
        judged = judge_pairs(prompts, a, b, judge, tmp_path / "answers.jsonl", progress=lambda *now: shown.append(now))
    assert [v.outcome for v in judged.verdicts] == expected(a, b)
    assert set(server.fates) == {"honest", *FAULTS}  # all of it happened
    usage = judged.usage
    identical = sum(x == y for x, y in zip(a, b, strict=True))
    questions = 2 * (60 - identical)
    assert usage["identical"] == identical > 0 and usage["answers"] == questions and shown[-1] == (questions, questions)
    assert {"pairs": 60, "judged": 60, "no_verdict": 0}.items() <= usage.items() and usage["consistency"] == 1.0
    # every request that was sent stands in the account, the nonsense with its tokens
    assert usage["requests"] == sum(server.fates.values())
    answered = server.fates["honest"] + server.fates["nonsense"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (100 * answered, 3 * answered)
    assert usage["cost"] == pytest.approx((200 * answered + 30 * answered) / 1e6)
    stored = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(stored) == questions == len({row["key"] for row in stored})
    assert any("I would rather not say." in row["answers"] and row["verdict"] for row in stored)  # the raw answers are there to audit
    assert {row["answer"] for row in stored} == {"A", "tie", " **B**.\n"}
    assert server.keys == {f"Bearer {SECRET}"}
    for path in tmp_path.rglob("*"):
        assert SECRET.encode() not in path.read_bytes()


def test_a_finished_evaluation_asks_nothing_again_and_another_question_does(tmp_path):
    prompts, a, b = rows(6)
    with FaultyServer(longer) as server:
        judge = Judge("m", server.url, **FAST)
        first = judge_pairs(prompts, a, b, judge, tmp_path / "answers.jsonl")
        asked = sum(server.fates.values())
        again = judge_pairs(prompts, a, b, replace(judge, concurrency=1), tmp_path / "answers.jsonl")
        assert again.verdicts == first.verdicts and sum(server.fates.values()) == asked
        assert again.usage == first.usage | {"asked_now": 0}
        for change in ({"model": "n"}, {"template": TEMPLATE + "!"}, {"request": {"max_tokens": 5}}):
            before = sum(server.fates.values())
            judge_pairs(prompts[:1], ["long one"], b[:1], replace(judge, **change), tmp_path / "answers.jsonl")
            assert sum(server.fates.values()) == before + 2, change
        # the other way round the same two questions are asked: nothing new, and the outcome turns
        turned = judge_pairs(prompts, b, a, judge, tmp_path / "answers.jsonl")
        assert [v.outcome for v in turned.verdicts] == [1 - v.outcome for v in first.verdicts] and turned.usage["asked_now"] == 0


def test_what_a_request_carries(tmp_path):
    with FaultyServer(lambda _: "A") as server:
        judge = Judge(
            "m", server.url, **FAST | {"template": judge_client.TEMPLATE}, request={"max_tokens": None, "max_completion_tokens": 99}
        )
        judge_pairs(["{first} of {second}"], ["one {prompt}"], ["two"], judge, tmp_path / "answers.jsonl")
    body = server.bodies[0]
    assert body["model"] == "m" and body["temperature"] == 0 and body["max_completion_tokens"] == 99 and "max_tokens" not in body
    text = body["messages"][0]["content"]
    assert text.index("{first} of {second}") < text.index("one {prompt}") < text.index("two") or text.index("two") < text.index(
        "one {prompt}"
    )
    assert text.count("one {prompt}") == 1  # a text that spells a field is not filled


@pytest.mark.parametrize("limit", [1, 3])
def test_so_many_at_a_time_and_no_more(tmp_path, limit):
    prompts, a, b = rows(12)
    with FaultyServer(longer, delay=0.04) as server:
        judge_pairs(prompts, a, b, Judge("m", server.url, **FAST, concurrency=limit), tmp_path / "answers.jsonl")
    assert server.most_in_flight == limit


def test_nonsense_is_asked_again_and_then_leaves_the_pair_out(tmp_path):
    def odd(content):
        return f"who knows {SECRET}" if "Q: p1" in content else longer(content)

    with FaultyServer(odd) as server:
        judge = Judge("m", server.url, **FAST, asks=4)
        judged = judge_pairs(["p0", "p1"], ["aaa", "aaa"], ["b", "b"], judge, tmp_path / "answers.jsonl")
        assert sum(server.fates.values()) == 2 + 2 * 4
        assert [v.outcome for v in judged.verdicts] == [1.0, None]
        usage = {"judged": 1, "no_verdict": 1, "nonsense": 2, "refused": 0, "unanswered": 0, "requests": 10, "prompt_tokens": 1000}
        assert usage.items() <= judged.usage.items() and judged.usage["cost"] is None
        judge_pairs(["p0", "p1"], ["aaa", "aaa"], ["b", "b"], judge, tmp_path / "answers.jsonl")
        assert sum(server.fates.values()) == 10  # its answer is known: none
    text = (tmp_path / "answers.jsonl").read_text()
    assert text.count("who knows [key]") == 2 * 5 and SECRET not in text  # four asks and the last of them


def test_one_silent_question_is_counted_and_asked_again_next_time(tmp_path):
    class Sometimes(FaultyServer):
        stuck = True

    def verdict(content):
        if server.stuck and "Q: p1" in content:
            time.sleep(NEVER)
        return longer(content)

    with Sometimes(verdict) as server:
        judge = Judge("m", server.url, **FAST | {"timeout": 3.0}, attempts=2, concurrency=2)
        texts = ["p0", "p1", "p2", "p3"], ["aaa"] * 4, ["b"] * 4
        judged = judge_pairs(*texts, judge, tmp_path / "answers.jsonl")
        assert [v.outcome for v in judged.verdicts] == [1.0, None, 1.0, 1.0]
        assert judged.usage["unanswered"] == 2 and "no answer in 3 s, 2 times" in judged.usage["failures"]
        server.stuck = False
        judged = judge_pairs(*texts, judge, tmp_path / "answers.jsonl")
        assert [v.outcome for v in judged.verdicts] == [1.0] * 4 and judged.usage["asked_now"] == 2


@pytest.mark.parametrize(("status", "says"), [("401", "status 401.*TEST_JUDGE_KEY"), ("404", "judge 'm'"), ("400", "3 questions in a row")])
def test_an_endpoint_that_will_never_answer_stops_it_at_once(tmp_path, status, says):
    prompts, a, b = rows(30)
    with FaultyServer(longer, {status: 1.0}) as server:
        with pytest.raises(JudgeError, match=says) as caught:
            judge_pairs(prompts, a, b, Judge("m", server.url, **FAST, concurrency=2), tmp_path / "answers.jsonl")
        assert sum(server.fates.values()) <= 6
    assert SECRET not in str(caught.value) and "[key]" in str(caught.value)  # the server repeats it, the message does not


def test_a_dead_endpoint_stops_it_and_one_refused_text_does_not(tmp_path):
    prompts, a, b = rows(30)
    with FaultyServer(longer) as server:
        url = server.url
    judge = Judge("m", url, **FAST, concurrency=2, attempts=2)
    with pytest.raises(JudgeError, match=r"no answer to 3 questions in a row; the last: no connection.*the same command goes on"):
        judge_pairs(prompts, a, b, judge, tmp_path / "answers.jsonl")
    with FaultyServer(longer, {"422": 0.3}) as server:
        judge = replace(judge, base_url=server.url)
        judged = judge_pairs(prompts, a, b, judge, tmp_path / "answers.jsonl")
        refused = server.fates["422"]
        assert judged.usage["refused"] == refused > 3  # sent once each, not again
        server.faults = {"422": 1.0}  # what is left is refused again, one after the other: no outage
        again = judge_pairs(prompts, a, b, judge, tmp_path / "answers.jsonl")
        assert again.verdicts == judged.verdicts and again.usage["refused"] == refused == server.fates["422"] - refused
        assert again.usage["requests"] == sum(server.fates.values())
    assert judged.usage["unanswered"] == 0 and judged.usage["judged"] + judged.usage["no_verdict"] == 30


def test_a_reply_that_trickles_is_cut_off_in_time(tmp_path):
    with FaultyServer(longer, {"trickle": 1.0}) as server:
        with pytest.raises(JudgeError, match=r"no answer in 0.3 s, 1 times"):
            judge_pairs(["p"], ["aa"], ["b"], Judge("m", server.url, **FAST | {"timeout": 0.3}, attempts=1), tmp_path / "answers.jsonl")
        assert server.trickled < 1000  # the whole reply, which would take fifty seconds


def test_failures_that_are_not_in_a_row_do_not_stop_it(tmp_path):
    def even_fail(content):
        if int(content.split("Q: p")[1].split()[0]) % 2:
            raise BrokenPipeError  # the connection drops
        return longer(content)

    texts = [f"p{i}" for i in range(8)], ["aaa"] * 8, ["b"] * 8
    with FaultyServer(even_fail) as server:
        judge = Judge("m", server.url, **FAST, attempts=1, concurrency=1)
        judged = judge_pairs(*texts, judge, tmp_path / "answers.jsonl")
        assert [v.outcome for v in judged.verdicts] == [1.0, None] * 4 and judged.usage["unanswered"] == 8
        # only those are asked again, one after the other: an outage, unless told to go on
        with pytest.raises(JudgeError, match=r"3 questions in a row.*--judge_keep_going"):
            judge_pairs(*texts, judge, tmp_path / "answers.jsonl")
        judged = judge_pairs(*texts, replace(judge, keep_going=True), tmp_path / "answers.jsonl")
        assert judged.usage["unanswered"] == 8 and judged.usage["judged"] == 4


@pytest.mark.parametrize("name", MALFORMED)
def test_a_reply_that_is_no_completion_is_tried_again_and_never_an_answer(tmp_path, name):
    texts = ["p0", "p1"], ["aaa", "b"], ["b", "aaa"]
    with FaultyServer(longer, {name: 1.0}) as server:
        judge = Judge("m", server.url, **FAST, attempts=2, concurrency=1)
        with pytest.raises(JudgeError, match=r"no answer to 3 questions in a row; the last: no completion: .*, 2 times"):
            judge_pairs(*texts, judge, tmp_path / "answers.jsonl")
        assert server.fates[name] == 3 * 2
        server.faults = {}
        judged = judge_pairs(*texts, judge, tmp_path / "answers.jsonl")
    assert [v.outcome for v in judged.verdicts] == [1.0, 0.0] and judged.usage["asked_now"] == 4 and judged.usage["nonsense"] == 0
    assert judged.usage["requests"] == 3 * 2 + 4 and judged.usage["prompt_tokens"] == 400


@pytest.mark.parametrize(
    "usage", [{}, None, "x", [1], {"prompt_tokens": None, "completion_tokens": 3}, {"prompt_tokens": "9", "completion_tokens": True}]
)
def test_token_counts_that_are_none_leave_the_answers_and_no_cost(tmp_path, usage):
    with FaultyServer(longer) as server:
        server.odd = {"usage": usage}
        judge = Judge("m", server.url, **FAST, price_in=1.0, price_out=1.0)
        judged = judge_pairs(["p"], ["aaa"], ["b"], judge, tmp_path / "answers.jsonl")
    assert judged.verdicts[0].outcome == 1.0 and judged.usage["cost"] is None and judged.usage["answers_without_token_count"] == 2


@pytest.mark.parametrize(
    ("content", "answer"),
    [
        ([{"type": "text", "text": "ti"}, {"type": "text", "text": "e"}], "tie"),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "A?"}]}, {"type": "text", "text": "tie"}], "tie"),
        (None, ""),  # a refusal, or thoughts that used up the tokens
    ],
)
def test_content_in_parts_is_joined_and_null_is_an_answer_of_no_words(tmp_path, content, answer):
    with FaultyServer(longer) as server:
        server.odd = {"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}]}
        judged = judge_pairs(["p"], ["aaa"], ["b"], Judge("m", server.url, **FAST), tmp_path / "answers.jsonl")
    assert judged.verdicts[0].outcome == (0.5 if answer else None)
    assert {json.loads(line)["answer"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()} == {answer}


def test_another_endpoint_is_another_judge(tmp_path, monkeypatch):
    asked = "p", "aaa", "b"
    here = Judge("m", "http://here/v1")
    assert here.key(*asked) != Judge("m", "http://there/v1").key(*asked) != Judge("m").key(*asked)
    # what is no address does not matter, and no secret stands in a key
    assert here.key(*asked) == Judge("m", "http://user:pass@here/v1/?token=1").key(*asked)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://here/v1")
    assert Judge("m").key(*asked) == here.key(*asked)
    with FaultyServer(lambda _: "tie") as one, FaultyServer(longer) as other:
        for server, outcome in ((one, 0.5), (other, 1.0), (one, 0.5)):
            judge = Judge("m", server.url, **FAST)
            assert judge_pairs(["p"], ["aaa"], ["b"], judge, tmp_path / "answers.jsonl").verdicts[0].outcome == outcome
        assert one.fates["honest"] == other.fates["honest"] == 2


@pytest.mark.parametrize("status", ["503", "422", "401"])
def test_what_a_question_took_before_it_failed_is_kept(tmp_path, status):
    class Failing(FaultyServer):
        works = False

    def verdict(content):
        if "Q: p1" in content and not server.works:
            server.faults = {status: 1.0}
            return "hm"
        return longer(content)

    def ask():
        return judge_pairs(["p0", "p1"], ["aaa"] * 2, ["b"] * 2, judge, tmp_path / "answers.jsonl")

    with Failing(verdict) as server:
        judge = Judge("m", server.url, **FAST, attempts=2, concurrency=1, price_in=1.0, price_out=1.0)
        if status == "401":
            with pytest.raises(JudgeError, match="status 401"):
                ask()
        else:
            usage = ask().usage
            sent = sum(server.fates.values())
            assert usage["answers"] == 2 and usage["requests"] == sent > 4
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (300, 9) and usage["cost"] == pytest.approx(309 / 1e6)
        lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
        kept = next(line for line in lines if line.get("answers") == ["hm"])
        assert f"status {status}" in kept["failed"] and kept["prompt_tokens"] == 100 and "verdict" not in kept
        server.works, server.faults = True, {}
        judged = ask()
        assert [v.outcome for v in judged.verdicts] == [1.0, 1.0] and judged.usage["asked_now"] == 2
        assert judged.usage["requests"] == sum(server.fates.values()) and judged.usage["prompt_tokens"] == 500


def test_refusals_do_not_add_up_to_an_outage(tmp_path):
    def verdict(content):
        if "Q: p5" in content:
            raise BrokenPipeError  # the connection drops
        return longer(content)

    texts = [f"p{i}" for i in range(8)], ["aaa"] * 8, ["b"] * 8
    with FaultyServer(verdict) as server:
        judge = Judge("m", server.url, **FAST, attempts=1, concurrency=1)
        judge_pairs(["p9"], ["aaa"], ["b"], judge, tmp_path / "answers.jsonl")
        refusing = server.RequestHandlerClass.answer

        def answer(self, fate, content):
            refusing(self, "422" if re.search("Q: p[0-4]", content) else fate, content)

        server.RequestHandlerClass = type("Refusing", (server.RequestHandlerClass,), {"answer": answer})
        judged = judge_pairs(*texts, judge, tmp_path / "answers.jsonl")  # ten refusals, then two lost connections: no three in a row
    assert [v.outcome for v in judged.verdicts] == [None] * 6 + [1.0] * 2
    assert judged.usage["refused"] == 10 and judged.usage["unanswered"] == 2


def test_the_key_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("TEST_JUDGE_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(JudgeError, match="TEST_JUDGE_KEY is not set"):
        judge_pairs(["p"], ["a"], ["b"], Judge("m", **FAST), tmp_path / "answers.jsonl")
    with FaultyServer(lambda _: "B") as server:  # an address of one's own may need none
        url = server.url.replace("//", "//user:pass@")
        judged = judge_pairs(["p"], ["a"], ["b"], Judge("m", server.url, **FAST), tmp_path / "answers.jsonl")
        assert judged.verdicts[0].outcome == 0.5
        assert Judge("m", url + "?token=1").identity()["base_url"] == server.url


def test_settings_that_cannot_work():
    with pytest.raises(ValueError, match=r"contains \{second\} 0 times"):
        Judge("m", template="{prompt} {first}")
    with pytest.raises(ValueError, match=r"concurrency is 0"):
        Judge("m", concurrency=0)


def test_pauses_grow_with_jitter_and_heed_the_endpoint():
    judge = Judge("m", backoff=1.0, backoff_max=10.0)
    for failures, step in ((0, 1.0), (2, 4.0), (9, 10.0)):
        drawn = [backoff_seconds(judge, failures, None) for _ in range(50)]
        assert min(drawn) >= step / 2 and max(drawn) <= step and len(set(drawn)) > 1
    assert backoff_seconds(judge, 0, "7") == 7.0 and backoff_seconds(judge, 0, "99999") == 300.0
    assert backoff_seconds(judge, 0, "Wed, 21 Oct 2026 07:28:00 GMT") <= 1.0


def test_a_torn_line_is_cut_off_and_a_whole_one_gets_its_end(tmp_path):
    path = tmp_path / "answers.jsonl"
    for written, found in ((b'{"key": "a"}\n{"key": "b', ["a"]), (b'{"key": "a"}\n{"key": "b"}', ["a", "b"]), (b'{"ke', []), (b"", [])):
        path.write_bytes(written)
        with AnswerFile(path) as answers:
            assert list(answers.found) == found
            answers.add({"key": "c", "answer": "ä\ud800"})
        lines = path.read_bytes().split(b"\n")
        assert [json.loads(line)["key"] for line in lines[:-1]] == [*found, "c"] and lines[-1] == b""


def test_other_damage_is_an_error_that_names_the_line(tmp_path):
    path = tmp_path / "answers.jsonl"
    for written, says in (
        (b'{"key": "a"}\n{"ke\n{"key": "b"}\n', ":2 is no stored answer"),
        (b'{"key": "a"}\n{"key": "a"}\n', ":2 answers a question a second time"),
    ):
        path.write_bytes(written)
        with pytest.raises(AnswerError, match=says), AnswerFile(path):
            pass
        assert path.read_bytes() == written
    path.unlink()
    with AnswerFile(path), pytest.raises(AnswerError, match="written by another process"), AnswerFile(path):
        pass


CHILD = """
import os, sys, json
from pathlib import Path
import openai
from jaxrlhf.comparison.judge import judge_pairs
from jaxrlhf.comparison.judge_client import Judge
out, url, data = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
patient = {"timeout": 3.0, "attempts": 20, "asks": 20, "backoff": 0.005, "concurrency": 4}
judge = Judge("m", url, template=data["template"], api_key_env="TEST_JUDGE_KEY", **patient)
for line in sys.stdin:  # one life a line: the library is imported once
    child = os.fork()
    if child == 0:
        judged = judge_pairs(data["prompts"], data["a"], data["b"], judge, out / "answers.jsonl")
        (out / "done.json").write_text(json.dumps([[v.outcome for v in judged.verdicts], judged.usage]))
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("over", flush=True)
"""


def test_ten_kills_lose_nothing_and_count_nothing_twice(tmp_path):
    prompts, a, b = rows(90)
    chance = random.Random(1)
    faults = {name: share for name, share in FAULTS.items() if name != "silent"} | {"silent": 0.01}
    questions = 2 * sum(x != y for x, y in zip(a, b, strict=True))
    path = tmp_path / "answers.jsonl"
    with FaultyServer(longer, faults, silence=NEVER, delay=0.004) as server:
        data = json.dumps({"template": TEMPLATE, "prompts": prompts, "a": a, "b": b})
        parent = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path), server.url, data], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert parent.stdin and parent.stdout
        for life in range(11):
            before = path.read_bytes().count(b"\n") if path.exists() else 0
            parent.stdin.write("live\n")
            parent.stdin.flush()
            child = int(parent.stdout.readline())
            if life < 10:
                deadline = time.monotonic() + 300
                while (path.read_bytes().count(b"\n") if path.exists() else 0) < before + chance.randint(1, questions // 14):
                    assert time.monotonic() < deadline
                    time.sleep(0.002)
                time.sleep(chance.random() * 0.02)
                os.kill(child, signal.SIGKILL)
            assert parent.stdout.readline() == "over\n"
            if life < 10:
                assert not (tmp_path / "done.json").exists()
        parent.communicate(timeout=300)
    outcomes, usage = json.loads((tmp_path / "done.json").read_text())
    assert outcomes == expected(a, b)
    stored = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len(stored) == questions == len({row["key"] for row in stored}) == usage["answers"]
    assert all(row["verdict"] for row in stored) and usage["no_verdict"] == 0
    # asked twice is only what was in flight at a kill, or sent and silently dropped
    repeated = sum(server.asked.values()) - questions
    assert 0 <= repeated <= 10 * 4 + server.fates["silent"], repeated
