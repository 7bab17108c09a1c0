"""The sampler on a bigram table, whose distribution over texts can be summed exactly."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxrlhf import sharding
from jaxrlhf.rollouts.generate import check_left_padded, generate, sample, token_uniforms
from jaxrlhf.types import Model

EOS = 2
KEY = jax.random.key(0)


def bigram(trace: list | None = None) -> Model:
    """A language model whose next token depends on the last one; its cache counts positions."""

    def prefill(params, tokens_BL, mask_BL, *, length):
        if trace is not None:
            trace.append(("prefill", tokens_BL.shape, length))
        return params["table"][tokens_BL[:, -1]], {"position": jnp.sum(mask_BL, axis=1), "fed": jnp.int32(0)}

    def decode(params, tokens_B, cache):
        return params["table"][tokens_B], {"position": cache["position"] + 1, "fed": cache["fed"] + 1}

    return Model(init=None, apply=None, prefill=prefill, decode=decode, score_tokens=None)  # type: ignore[arg-type]


MODEL = bigram()
PARAMS = {"table": jax.random.normal(jax.random.key(7), (5, 5))}


def prompts(rows: int, length: int = 3, last: int = 1) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.full((rows, length), last, np.int32)
    return tokens, np.ones((rows, length), bool)


def run(rows=4, key=KEY, **options):
    tokens, mask = prompts(rows)
    return generate(MODEL, PARAMS, tokens, mask, key, **{"max_new_tokens": 6, "eos_ids": (EOS,), **options})


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.8}])
def test_texts_have_their_exact_frequencies(options, truncated):
    """All texts of up to 3 tokens enumerated; 40,000 samples; chi-square. Log-probs equal the enumerated ones."""
    table = np.asarray(PARAMS["table"])
    step = np.stack([truncated(row, **options) for row in table])
    exact = {}
    for text in itertools.product(range(5), repeat=3):
        end = text.index(EOS) + 1 if EOS in text else 3
        text = text[:end]
        exact[text] = np.prod([step[a, b] for a, b in itertools.pairwise((1, *text))])
    assert sum(exact.values()) == pytest.approx(1)
    done = run(40_000, max_new_tokens=3, **options)
    tokens, mask, logp = (np.asarray(x) for x in (done.tokens_BT, done.mask_BT, done.logp_BT))
    texts = [tuple(row[:n]) for row, n in zip(tokens.tolist(), mask.sum(axis=1), strict=True)]
    names = [text for text, p in exact.items() if p > 0]
    counts = [texts.count(text) for text in names]
    assert sum(counts) == len(texts)
    assert stats.chisquare(counts, np.array([exact[text] for text in names]) * len(texts)).pvalue > 1e-3
    np.testing.assert_allclose(logp.sum(axis=1), [np.log(exact[text]) for text in texts], atol=1e-5)


def test_eos_is_kept_and_nothing_after_it_counts():
    done = run(256)
    tokens, mask, logp = (np.asarray(x) for x in (done.tokens_BT, done.mask_BT, done.logp_BT))
    assert tokens.dtype == np.int32 and mask.dtype == bool and logp.dtype == np.float32
    lengths = mask.sum(axis=1)
    assert (lengths < 6).any() and (lengths == 6).any()
    for row in range(256):
        n = lengths[row]
        assert mask[row, :n].all() and not mask[row, n:].any()
        assert EOS not in tokens[row, : n - 1]
        assert n == 6 or tokens[row, n - 1] == EOS
        assert (tokens[row, n:] == EOS).all() and (logp[row, n:] == 0).all()  # padded with EOS, yet not counted


def test_any_of_several_eos_and_a_pad_of_ones_own():
    done = run(256, eos_ids=(EOS, 4), pad_id=0)
    tokens, mask = np.asarray(done.tokens_BT), np.asarray(done.mask_BT)
    ends = np.where(mask, np.isin(tokens, (EOS, 4)), False)
    assert (ends.sum(axis=1) <= 1).all() and {2, 4} == set(tokens[ends])
    assert (tokens[~mask] == 0).all()


def test_without_eos_every_row_is_full():
    assert bool(run(8, eos_ids=()).mask_BT.all())


def test_keys():
    same, again, other = run(64), run(64), run(64, key=jax.random.key(1))
    assert np.array_equal(same.tokens_BT, again.tokens_BT) and np.array_equal(same.logp_BT, again.logp_BT)
    assert not np.array_equal(same.tokens_BT, other.tokens_BT)
    assert len({tuple(row) for row in np.asarray(same.tokens_BT).tolist()}) > 16  # rows of one prompt differ


def test_a_row_depends_on_its_global_number_alone():
    """Not on batch mates, their order, the padding, or how many tokens were asked for."""
    whole = np.asarray(run(16).tokens_BT)
    order = np.array([9, 3, 14, 0])
    tokens, mask = prompts(4, length=7)
    mask[:, :4] = False
    part = generate(MODEL, PARAMS, tokens, mask, KEY, max_new_tokens=6, eos_ids=(EOS,), index_B=order)
    assert np.array_equal(part.tokens_BT, whole[order])
    longer = run(16, max_new_tokens=9)
    assert np.array_equal(longer.tokens_BT[:, :6], whole)


@pytest.mark.parametrize("mesh", [None, sharding.make_mesh(2, devices=jax.devices()[:2])])
def test_rows_in_passes_are_the_rows_at_once(mesh):
    """Same texts and log-probs, and the cache of a pass has its own rows only."""
    tokens, mask = prompts(8)
    whole = run(8)
    trace = []
    rows = sharding.place_batch((tokens, mask, np.arange(8, dtype=np.int32)), mesh)
    options = {"max_new_tokens": 6, "eos_ids": (EOS,), "index_B": rows[2], "mesh": mesh}
    parts = generate(bigram(trace), sharding.place(PARAMS, mesh), *rows[:2], KEY, passes=2, **options)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert {shape[0] for _, shape, _ in trace} == {4 if mesh is None else 2}
    with pytest.raises(ValueError, match=r"rows do not divide into 3 passes"):
        generate(MODEL, PARAMS, tokens, mask, KEY, max_new_tokens=6, eos_ids=(EOS,), passes=3)


def test_uniforms_by_the_definition():
    uniforms = token_uniforms(KEY, jnp.array([5, 0]), 3)
    for row, index in enumerate((5, 0)):
        for t in range(3):
            key = jax.random.fold_in(jax.random.fold_in(KEY, index), t)
            assert uniforms[t, row] == jax.random.uniform(key)


def test_greedy():
    done = run(2, temperature=0, top_k=2, top_p=0.1, eos_ids=())
    table, last = np.asarray(PARAMS["table"]), 1
    for t in range(6):
        best = int(table[last].argmax())
        assert done.tokens_BT[:, t].tolist() == [best, best]
        np.testing.assert_allclose(done.logp_BT[0, t], jax.nn.log_softmax(table[last])[best], rtol=1e-6)
        last = best
    assert np.array_equal(run(2, temperature=0, key=jax.random.key(9)).tokens_BT, run(2, temperature=0).tokens_BT)


def test_padded_vocabulary():
    done = run(512, vocab_size=3)
    assert int(done.tokens_BT.max()) == 2
    with pytest.raises(ValueError, match="vocab_size 6"):
        run(vocab_size=6)


def test_row_that_fills_the_batch_gets_no_tokens():
    tokens, mask = prompts(4)
    mask[2] = False
    done = generate(MODEL, PARAMS, tokens, mask, KEY, max_new_tokens=6, eos_ids=(EOS,))
    assert np.asarray(done.mask_BT).sum(axis=1)[2] == 0 and (done.logp_BT[2] == 0).all()
    assert np.array_equal(np.asarray(done.tokens_BT)[[0, 1, 3]], np.asarray(run().tokens_BT)[[0, 1, 3]])


def test_leaves_early_when_every_row_has_ended():
    """A model that counts its decode calls at run time: EOS comes third, so two tokens are fed back, not 499."""
    calls = []

    def prefill(params, tokens_BL, mask_BL, *, length):
        return jax.nn.one_hot(tokens_BL[:, -1] + 1, 5) * 1e9, jnp.int32(0)

    def decode(params, tokens_B, cache):
        jax.debug.callback(calls.append, cache)
        return jax.nn.one_hot(tokens_B + 1, 5) * 1e9, cache + 1

    model = Model(None, None, prefill, decode, None)  # type: ignore[arg-type]
    tokens, mask = prompts(3, last=0)
    done = generate(model, {}, tokens, mask, KEY, max_new_tokens=500, eos_ids=(3,))
    jax.effects_barrier()
    assert np.asarray(done.tokens_BT)[0, :3].tolist() == [1, 2, 3] and len(calls) == 2
    assert done.tokens_BT.shape == (3, 500)


def test_compiles_once():
    trace = []
    model = bigram(trace)
    tokens, mask = prompts(4)
    for temperature in (1.0, 1.0, 0.7, 2):
        for index in (None, np.arange(4, dtype=np.int64) + 8):
            for given in (tokens, tokens.astype(np.int64), jnp.asarray(tokens)):
                generate(
                    model, PARAMS, given, mask, KEY, max_new_tokens=5, eos_ids=(EOS,), temperature=temperature, index_B=index
                )  # fmt: skip
    assert trace == [("prefill", (4, 3), 8)]
    generate(model, PARAMS, tokens, mask, KEY, max_new_tokens=5, eos_ids=(EOS,), temperature=0)
    assert len(trace) == 2  # greedy is another program


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"vocab_size": 0}, "vocab_size 0"),
        ({"eos_ids": (-1,)}, "eos_ids"),
        ({"eos_ids": (4,), "vocab_size": 4}, "could never be drawn"),
        ({"index_B": np.arange(3)}, "index_B"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_prompts_out_of_shape():
    tokens, mask = prompts(2)
    for bad_tokens, bad_mask, message in [
        (tokens, mask[:1], "must both be"),
        (tokens[:, :0], mask[:, :0], "length ≥ 1"),
        (tokens, mask.astype(np.int32), "boolean"),
        (tokens, np.array([[True] * 3, [False, True, False]]), "row 1 is not left-padded"),
    ]:
        with pytest.raises(ValueError, match=message):
            generate(MODEL, PARAMS, bad_tokens, bad_mask, KEY, max_new_tokens=2, eos_ids=(EOS,))


def test_the_padding_check_can_be_done_before():
    """Device arrays are checked by default too; a loop that has checked the host's copy does not wait for the device's."""
    tokens, torn = jnp.asarray(prompts(2)[0]), jnp.array([[True] * 3, [False, True, False]])
    with pytest.raises(ValueError, match="row 1 is not left-padded"):
        generate(MODEL, PARAMS, tokens, torn, KEY, max_new_tokens=2, eos_ids=(EOS,))
    with pytest.raises(ValueError, match="row 1 is not left-padded"):
        check_left_padded(np.asarray(torn))
    generate(MODEL, PARAMS, tokens, torn, KEY, max_new_tokens=2, eos_ids=(EOS,), check_padding=False)  # not looked at, so not refused


def test_inside_a_program_of_ones_own():
    """`generate` under someone's jit, and the pure `sample` under pmap and vmap, give the same text."""
    tokens, mask = prompts(4)
    whole = run()

    @jax.jit
    def outer(tokens, mask):
        return generate(MODEL, PARAMS, tokens, mask, KEY, max_new_tokens=6, eos_ids=(EOS,))

    assert np.array_equal(outer(tokens, mask).tokens_BT, whole.tokens_BT)

    def inner(tokens, mask, index):
        return sample(MODEL, PARAMS, tokens, mask, KEY, index, max_new_tokens=6, eos_ids=(EOS,), pad_id=EOS)

    mapped = jax.pmap(inner)(tokens[None], mask[None], np.arange(4)[None])
    assert np.array_equal(mapped.tokens_BT[0], whole.tokens_BT) and np.array_equal(mapped.logp_BT[0], whole.logp_BT)
    split = jax.vmap(inner)(tokens.reshape(2, 2, 3), mask.reshape(2, 2, 3), np.arange(4).reshape(2, 2))
    assert np.array_equal(split.tokens_BT.reshape(4, 6), whole.tokens_BT)
