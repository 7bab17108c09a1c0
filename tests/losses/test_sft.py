import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import token_logp

from jaxrlhf.losses import sft_loss

LOGP = jnp.array([[-1.0, -2.0, jnp.nan], [-4.0, -jnp.inf, jnp.inf]])
MASK = jnp.array([[True, True, False], [True, False, False]])


def test_mean_over_tokens_by_hand():
    loss, gradient = jax.value_and_grad(sft_loss)(LOGP, MASK)
    assert float(loss) == pytest.approx(7 / 3)  # not the mean of row means, 2.75
    np.testing.assert_allclose(gradient, -1.0 * MASK / 3, rtol=1e-6)


def test_microbatches_of_unequal_length_add_up():
    parts = [sft_loss(LOGP[i : i + 1], MASK[i : i + 1], total=3) for i in range(2)]
    assert float(sum(parts)) == pytest.approx(7 / 3)


def test_nothing_gives_nothing():
    loss, gradient = jax.value_and_grad(sft_loss)(LOGP, jnp.zeros_like(MASK))
    assert loss == 0 and bool(jnp.all(gradient == 0))


def test_gradient_of_the_logits_is_probability_minus_one_hot():
    logits, tokens = jnp.array([[[0.0, 1.0, 2.0]]]), jnp.array([[1]])
    gradient = jax.grad(lambda x: sft_loss(token_logp(x, tokens), jnp.ones((1, 1), bool)))(logits)
    np.testing.assert_allclose(gradient[0, 0], jax.nn.softmax(logits[0, 0]) - jnp.array([0, 1, 0]), rtol=1e-5, atol=1e-6)
