import jax.numpy as jnp
import numpy as np

from jaxrlhf.losses.ensemble import ensemble_score


def test_mean_less_spread_by_hand():
    """Members 1, 2, 6 (mean 3, population variance (4 + 1 + 9)/3) and three that agree; without a coefficient the plain mean."""
    scores = jnp.array([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    spread = np.array([np.sqrt(14 / 3), 0.0])
    for given, mean in (({}, [3.0, 4.0]), ({"spread_coef": 0.5}, [3.0, 4.0] - 0.5 * spread)):
        np.testing.assert_allclose(ensemble_score(scores, **given), [mean, spread], rtol=1e-6)
