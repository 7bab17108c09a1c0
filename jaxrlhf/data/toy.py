"""The embedded default task: summarise a post of two facts. Seconds to train on, an exact gold reward, and a proxy that goes stale.

A post is 17 words of fixed form: two facts `subject verb object place time .` and a filler sentence `word word word .`, the filler
first, between or last, then the mark that asks for the summary:

    farmers sold apples downtown today . well anyway thanks . nurses hid maps ashore late . TL;DR:

A demonstration tells one fact or both, in haste: words are dropped, confused, repeated or invented (`ToyTask.demo_*`). The gold
reward (`jaxrlhf.scorers.toy`) reads the facts from the post and the summary from the text; nothing else is known to it.

**Why a reward model goes stale here.** Gold rises with the length of a summary up to `ToyTask.length_turn` words, because longer
ones recall more, and falls with the square of what is beyond. Demonstrations are mostly shorter than the turn, so pairs sampled from
the SFT policy teach "longer is better"; a policy that follows this walks over the turn, where those pairs say almost nothing.
`ToyTask.overlong_penalty` is the knob: 0 and length never betrays gold; larger and a stale reward model costs more.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxrlhf.config import ToyTask
from jaxrlhf.data.pairs import Demonstration, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# One token a word. Plural subjects and adverbs of place and time make every fact an English sentence without articles.
WORDS: dict[str, tuple[str, ...]] = {
    "subject": ("farmers", "bakers", "sailors", "nurses", "teachers", "painters", "miners", "pilots", "singers", "tailors"),
    "verb": ("sold", "bought", "found", "lost", "hid", "moved", "shared", "carried", "cleaned", "wanted"),
    "object": ("apples", "books", "coats", "lamps", "boxes", "bells", "chairs", "coins", "maps", "ropes"),
    "place": ("downtown", "upstairs", "outside", "nearby", "abroad", "ashore", "indoors", "uphill", "inland", "underground"),
    "time": ("today", "yesterday", "tonight", "recently", "overnight", "early", "late", "daily"),
    "filler": ("hello", "folks", "well", "anyway", "honestly", "really", "thanks", "cheers", "listen", "look", "friends"),
}
FACT = ("subject", "verb", "object", "place", "time")  # the classes of a fact's words, in order; the first three are its main words
STOP = "."
MARK = "TL;DR:"
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
VOCABULARY: tuple[str, ...] = (PAD, EOS, UNKNOWN, STOP, MARK, *(word for words in WORDS.values() for word in words))  # 64 tokens: ids
CLASS_OF: dict[str, str] = {word: name for name, words in WORDS.items() for word in words} | {STOP: STOP}
POST_LENGTH = 17  # words of every post = tokens of every prompt

# A post belongs to one split, decided by its facts alone (residues of `_split_key`): no seed, count or order can bring it into another.
SPLITS: dict[str, range] = {"train": range(0, 8), "valid": range(8, 9), "evaluation": range(9, 10)}
_RESIDUES = 10


class Post(NamedTuple):
    """A post as parts: two facts of five words (classes `FACT`), three filler words, the filler's place among the sentences (0, 1, 2)."""

    facts: tuple[tuple[str, ...], tuple[str, ...]]
    filler: tuple[str, ...]
    filler_place: int


def write_post(post: Post) -> str:
    """The text of a post: 17 words, ending in the mark. `read_post` is its inverse."""
    sentences = list(post.facts)
    sentences.insert(post.filler_place, post.filler)
    return " ".join(word for sentence in sentences for word in (*sentence, STOP)) + f" {MARK}"


def read_post(text: str) -> Post:
    """The parts of a post's text. Raises ValueError where the text is no post of this task."""
    words = text.split()
    sentences = [tuple(part.split()) for part in " ".join(words[:-1]).split(f" {STOP}")]
    facts = [s for s in sentences if tuple(CLASS_OF.get(w) for w in s) == FACT]
    filler = [n for n, s in enumerate(sentences) if tuple(CLASS_OF.get(w) for w in s) == ("filler",) * 3]
    if len(words) != POST_LENGTH or words[-1] != MARK or words[-2] != STOP or len(facts) != 2 or len(filler) != 1:
        raise ValueError(
            f"not a post of the toy task: {text!r}; it needs two facts `subject verb object place time .`, one filler sentence of "
            f"three words and the mark {MARK} at the end, {POST_LENGTH} words in all, none in both facts. Prompts must not be truncated: "
            f"max_prompt_length ≥ {POST_LENGTH}."
        )
    if set(facts[0]) & set(facts[1]):
        raise ValueError(f"not a post of the toy task: {text!r}; its two facts share a word, so gold could not tell them apart.")
    return Post((facts[0], facts[1]), sentences[filler[0]], filler[0])


def posts(n: int, seed: int, stream: str = "train") -> list[Post]:
    """The first n posts of (seed, stream). Post i is the same for every n ≥ i + 1.

    `stream` is a split of `SPLITS`, or `split/name` for a further independent stream of the same split ("train/pairs"). Posts of different
    splits are never equal, whatever their seeds. Raises ValueError for another split or a negative seed or count.
    """
    split = stream.split("/")[0]
    if split not in SPLITS:
        raise ValueError(f"stream {stream!r} is of no split; start it with one of {', '.join(SPLITS)} (as in 'train' or 'train/pairs').")
    if n < 0 or seed < 0:
        raise ValueError(f"n {n} and seed {seed} must both be ≥ 0.")
    drawn = np.zeros((n, 14), np.int64)
    pending = np.ones(n, bool)
    attempt = 0
    while pending.any():  # draw a whole attempt for all rows, so that a row's draws depend on its index only
        candidates = _draw_posts(_generator(seed, f"{stream}/posts", attempt).random((n, 14)))
        taken = pending & np.isin(_split_key(candidates), list(SPLITS[split]))
        drawn[taken] = candidates[taken]
        pending &= ~taken
        attempt += 1
    return [_post(row) for row in drawn.tolist()]


def prompts(task: ToyTask, n: int, seed: int, stream: str = "train") -> list[Prompt]:
    """The first n prompts of (seed, stream), each with a clean reference response (`ToyTask.reference_facts`). Streams: see `posts`."""
    return [
        Prompt(_id(stream, seed, i), write_post(post), _source(stream, seed, i), reference_response(task, post))
        for i, post in enumerate(posts(n, seed, stream))
    ]


def demonstrations(task: ToyTask, n: int, seed: int, stream: str = "train") -> list[Demonstration]:
    """The first n noisy demonstrations of (seed, stream); demonstration i answers post i of the same stream (see `posts`)."""
    drawn = posts(n, seed, stream)
    noise = _generator(seed, f"{stream}/demonstrations", 0).random((n, _NOISE)).tolist()
    return [
        Demonstration(_id(stream, seed, i), write_post(post), _demonstration(task, post, row), _source(stream, seed, i))
        for i, (post, row) in enumerate(zip(drawn, noise, strict=True))
    ]


def reference_response(task: ToyTask, post: Post) -> str:
    """A summary without noise. Under the default gold: one fact in full, 2.5; both facts' main words, 4.2, which nothing beats."""
    if task.reference_facts == 1:
        return " ".join((*post.facts[0], STOP))
    return " ".join(word for fact in post.facts for word in (*fact[:3], STOP))


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of `VOCABULARY`, split at white space; pad is 0, EOS is 1. Decoding gives the text back.

    `<unk>` is an ordinary word, not a special one: skip_special_tokens keeps it, so a policy that says it is seen, and punished, by gold.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast  # seconds: who makes no tokenizer does without

    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=EOS, padding_side="left", clean_up_tokenization_spaces=False
    )


def _id(stream: str, seed: int, i: int) -> str:
    return f"toy-{stream}-{seed}-{i}"


def _source(stream: str, seed: int, i: int) -> str:
    """Rows have no file: the place in messages is the stream, and the row for a line."""
    return f"toy/{stream}/{seed}:{i}"


def _generator(seed: int, name: str, attempt: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(name.encode()), attempt]))


def _distinct(uniform_NK: np.ndarray, size: int) -> np.ndarray:
    """K distinct numbers of range(size) a row, uniform over ordered choices."""
    picked = np.zeros((len(uniform_NK), 0), np.int64)
    for k in range(uniform_NK.shape[1]):
        new = (uniform_NK[:, k] * (size - k)).astype(np.int64)
        for earlier in np.sort(picked, axis=1).T:  # ascending, so that each shift counts once
            new += new >= earlier
        picked = np.concatenate([picked, new[:, None]], axis=1)
    return picked


def _draw_posts(uniform_N14: np.ndarray) -> np.ndarray:
    """Columns: two of each class of `FACT` in turn, three fillers, the filler's place."""
    columns = [_distinct(uniform_N14[:, 2 * k : 2 * k + 2], len(WORDS[name])) for k, name in enumerate(FACT)]
    columns += [_distinct(uniform_N14[:, 10:13], len(WORDS["filler"])), (uniform_N14[:, 13:] * 3).astype(np.int64)]
    return np.concatenate(columns, axis=1)


def _split_key(drawn_N14: np.ndarray) -> np.ndarray:
    """A residue of the main words of both facts: blind to the facts' order and to the filler."""
    return drawn_N14[:, :6].sum(axis=1) % _RESIDUES


def _post(row: list[int]) -> Post:
    first, second = (tuple(WORDS[name][row[2 * k + side]] for k, name in enumerate(FACT)) for side in (0, 1))
    return Post((first, second), tuple(WORDS["filler"][f] for f in row[10:13]), row[13])


_PER_WORD = 6  # uniforms a word of a fact: told?, replaced?, by which?, said twice?, filler?, which?
_NOISE = 3 + 2 * len(FACT) * _PER_WORD


def _demonstration(task: ToyTask, post: Post, uniform: list[float]) -> str:
    """A post's hasty summary. Every decision has a fixed place in `uniform`: changing one probability changes nothing else."""
    one_fact, which, ramble = uniform[:3]
    told = (int(which * 2),) if one_fact < task.demo_one_fact else (0, 1)
    words: list[str] = []
    for side in told:
        for k, name in enumerate(FACT):
            start = 3 + (side * len(FACT) + k) * _PER_WORD
            keep, replace, by, twice, filler, filler_which = uniform[start : start + _PER_WORD]
            if keep >= (1.0 - task.demo_drop if k < 3 else task.demo_keep_detail):
                continue
            word = post.facts[side][k]
            if replace < task.demo_invent:
                others = [w for w in WORDS[name] if w not in (post.facts[0][k], post.facts[1][k])]
                word = others[int(by * len(others))]
            elif replace < task.demo_invent + task.demo_misbind:
                word = post.facts[1 - side][k]
            words += [word] * (2 if twice < task.demo_repeat else 1)
            if filler < task.demo_filler:
                words.append(post.filler[int(filler_which * len(post.filler))])
        words.append(STOP)
    if ramble < task.demo_ramble:
        words = words * 2
    return " ".join(words[: task.max_words])
