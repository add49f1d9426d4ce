"""A multi-vector model and an index of its vectors on the Hub, loaded by stock classes and as the card says."""

from __future__ import annotations

import re

import numpy as np
from huggingface_hub import ModelCard
from sentence_transformers import MultiVectorEncoder

import lion_st
from lion_st.encoding import encode_corpus
from lion_st.hub import publish, publish_index
from lion_st.indexes import load_index
from lion_st.retrieval import index_corpus, search_texts

NAME = "org/lion-mv"


def test_it_is_one_revision_for_its_class_and_the_card_loads_it(connected, tiny_backbone, texts, tmp_path, capsys):
    model = lion_st.build(tiny_backbone(), "multi_vector", token_dimension=16, query_prompt="q: ", device="cpu")
    done = publish(model, NAME, license="mit")
    assert set(done.tags) == {"v1"} and set(done.files) == {"main"}
    stock = MultiVectorEncoder(NAME, device="cpu")
    for one, own in zip(stock.encode_query(texts), model.encode_query(texts), strict=True):
        np.testing.assert_allclose(one, own, rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    for block in re.findall(r"```python\n(.*?)```", done.card, re.DOTALL):
        exec(block, {})
    assert "tensor([[" in (shown := capsys.readouterr().out) and "('a', " in shown
    metadata = ModelCard(done.card).data
    assert {"multi-vector", "colbert", "late-interaction"} <= set(metadata.tags) and "sparse" not in metadata.tags
    assert metadata.pipeline_tag == "feature-extraction"
    assert "16 dimensions, one vector a token" in done.card and "Khattab" in done.card
    assert f"| Parameters | {sum(one.numel() for one in model.parameters()):,} |" in done.card
    assert "SparseEncoder(" not in done.card and "SentenceTransformer(" not in done.card

    rows = [{"id": f"d{row}", "text": text} for row, text in enumerate(texts)]
    encode_corpus(model, rows, tmp_path / "encoded", show_progress=False)
    local = index_corpus(tmp_path / "encoded", tmp_path / "index", sample=0).index
    published = publish_index(tmp_path / "index", "org/mv-index", license="mit", model=NAME)
    assert search_texts(model, load_index("org/mv-index"), texts[:2]) == search_texts(model, local, texts[:2])
    assert "vector" in published.card
