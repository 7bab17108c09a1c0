"""The exact gold reward of the embedded task: facts are read from the post, terms are counted in the response.

    gold = main·#main + detail·#detail − foreign·#foreign − repeat·#repeat − grammar·#grammar − binding·#binding
           − overlong·max(0, len − turn)²

Weights and what each counts: `jaxrlhf.data.toy.ToyTask`.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from jaxrlhf.data.toy import CLASS_OF, FACT, STOP, ToyTask, read_post
from jaxrlhf.scorers import Scorer
from jaxrlhf.storage.blocks import NOWHERE, Blocks

TERMS = ("main", "detail", "foreign", "repeat", "grammar", "binding", "overlong")

# Steps a sentence `S V O [P] [T] .` takes. START and END stand before the first and after the last word.
START, END = "start", "end"
_STEPS = frozenset(
    {(START, "subject"), (STOP, "subject"), (STOP, END), ("subject", "verb"), ("verb", "object")}
    | {("object", after) for after in ("place", "time", STOP)}
    | {("place", "time"), ("place", STOP), ("time", STOP)}
)


def toy_gold(task: ToyTask | None = None) -> Scorer:
    """The gold scorer of a task. Its calls raise ValueError for prompts that are no posts of it; any response has a score, "" has 0."""
    task = ToyTask() if task is None else task

    def score(prompts: Sequence[str], responses: Sequence[str], blocks: Blocks = NOWHERE) -> np.ndarray:
        del blocks
        return (_counts(task, prompts, responses) @ _weights(task)).astype(np.float32)

    return score


def _weights(task: ToyTask) -> np.ndarray:
    """Reward per unit of each term of `TERMS`."""
    penalties = (task.foreign_penalty, task.repeat_penalty, task.grammar_penalty, task.binding_penalty, task.overlong_penalty)
    return np.array((task.main_reward, task.detail_reward, *(-p for p in penalties)), np.float64)


def _counts(task: ToyTask, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """Units of each term, float64 [N, 7]. A prompt is read once however often it occurs."""
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts but {len(responses)} responses; give one response a prompt.")
    worlds = {prompt: _read_world(prompt) for prompt in dict.fromkeys(prompts)}
    rows = [_count(task, *worlds[prompt], response.split()) for prompt, response in zip(prompts, responses, strict=True)]
    return np.array(rows, np.float64).reshape(len(rows), len(TERMS))


def _read_world(prompt: str) -> tuple[dict[str, tuple[int, str]], frozenset[str]]:
    """word of a fact -> (number of its fact, its class); and all the post's words."""
    post = read_post(prompt)
    facts = {word: (side, name) for side, fact in enumerate(post.facts) for word, name in zip(fact, FACT, strict=True)}
    return facts, frozenset((*facts, *post.filler, STOP))


def _count(task: ToyTask, facts: dict[str, tuple[int, str]], in_post: frozenset[str], words: list[str]) -> tuple[float, ...]:
    """Units of each term in one response, in the order of `TERMS`."""
    if not words:
        return (0.0,) * len(TERMS)
    said = set(words)
    recalled = [facts[word][1] for word in said if word in facts]
    main = sum(name in FACT[:3] for name in recalled)
    foreign = sum(word not in in_post for word in words)
    repeat = len(words) - words.count(STOP) - len(said - {STOP})
    classes = [START, *(CLASS_OF.get(word, "unknown") for word in words), END]
    grammar = sum(step not in _STEPS for step in pairwise(classes))
    sides = [facts[word][0] if word in facts else None for word in words]
    binding = sum(a is not None and b is not None and a != b for a, b in pairwise(sides))
    overlong = max(0, len(words) - task.length_turn) ** 2
    return main, len(recalled) - main, foreign, repeat, grammar, binding, overlong
