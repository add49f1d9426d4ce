"""Publish a model on the Hub as a stock checkpoint with its card, and load it as anyone would.

    pip install lion-st
    hf auth login
    python examples/publish_and_load.py

Prints the files that go up, their commits and address, and the similarities from each way to load the model. `main`
serves SentenceTransformer; of a sparse model the branch `sparse-encoder` serves SparseEncoder.
"""

from sentence_transformers import SentenceTransformer, SparseEncoder

import lion_st

MODEL = "runs/quickstart/lion-sp"  # of `make quickstart`, or any model that lion_st trained or exported
REPOSITORY = "my-name/lion-sp-mini"
LICENSE = "apache-2.0"
PRIVATE = True
QUERY = "what do lions eat?"
DOCUMENTS = ["Lions prey on zebras and wildebeest.", "Paris is the capital of France."]

plan = lion_st.hub.publish(MODEL, REPOSITORY, license=LICENSE, dry_run=True)  # sends nothing
for revision, files in plan.files.items():
    print(f"{revision}: {len(files)} files, {sum(files.values()) / 1e6:.1f} MB")

published = lion_st.hub.publish(MODEL, REPOSITORY, license=LICENSE, private=PRIVATE)
print(published.url, published.commits, published.tags)

# Everything below runs where lion_st is not installed, but for the last lines.
model = SentenceTransformer(REPOSITORY)
print("SentenceTransformer:", model.similarity(model.encode_query(QUERY), model.encode_document(DOCUMENTS)).tolist())

if "sparse-encoder" in published.commits:
    sparse = SparseEncoder(REPOSITORY, revision="sparse-encoder")
    query = sparse.encode_query(QUERY)
    print("SparseEncoder:", sparse.similarity(query, sparse.encode_document(DOCUMENTS)).to_dense().tolist())
    print("terms:", sparse.decode(query, top_k=8))

fast = lion_st.load(REPOSITORY)  # the same vectors from the fused head
print("lion_st:", fast.similarity(fast.encode_query(QUERY), fast.encode_document(DOCUMENTS)).tolist())
