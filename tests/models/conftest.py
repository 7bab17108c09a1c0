import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))  # tiny_models: what the golden script and these tests share


@pytest.fixture(autouse=True)
def exact_products():
    import jax

    with jax.default_matmul_precision("highest"):
        yield
