"""What several reward models say together."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Num

from jaxrlhf.losses.masked import AnyArray, Scalar, as_float


def ensemble_score(scores: Num[AnyArray, "B M"], *, spread_coef: Scalar = 0.0) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """The score of an ensemble of M reward models, and how far its members lie apart.

        s_b = μ_b − c σ_b,   μ_b = 1/M Σ_m s_bm,   σ_b = sqrt( 1/M Σ_m (s_bm − μ_b)² )

    c = 0 is the plain mean. σ is the *population* deviation (M, not M − 1), in units of reward; 0 for one member. Scores of
    separately fitted models share no zero: subtract each member's own bias first.
    Mean minus deviation is in Eisenstein et al. (2023), "Helping or herding?"; Coste et al. (2023), "Reward model ensembles help
    mitigate overoptimization", subtract the variance instead.
    """
    scores = as_float(scores)
    mean = jnp.mean(scores, axis=1)
    spread = jnp.sqrt(jnp.mean(jnp.square(scores - mean[:, None]), axis=1))
    return mean - spread_coef * spread, spread
