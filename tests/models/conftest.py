import pytest


@pytest.fixture(autouse=True)
def exact_products():
    import jax

    with jax.default_matmul_precision("highest"):
        yield
