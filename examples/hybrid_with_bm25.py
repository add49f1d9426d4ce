"""Fuse a model's search with BM25, with weights fitted on one test set and scored on another.

    pip install 'lion-st[eval]'
    python examples/hybrid_with_bm25.py

Prints the fitted weights, a table of BM25, the model and both together, and the fused results of one query.
"""

import lion_st
from lion_st.data import load_beir
from lion_st.evaluation import evaluate_retrieval, fit_hybrid, format_table
from lion_st.retrieval import Bm25Retriever, HybridRetriever, ModelRetriever

MODEL = "runs/quickstart/lion-sp"  # of `make quickstart`, or a name on the Hub, sparse or dense
DEVELOPMENT = "runs/quickstart/test_sets/squad_dev"  # BEIR folders: the weights are fitted here
TEST = "runs/quickstart/test_sets/scifact"  # and scored here
OUTPUT = "runs/hybrid"
DEPTH = 100  # documents taken from each part

bm25 = Bm25Retriever()
lion = ModelRetriever(lion_st.load(MODEL), engine="exact", name="lion")

# One weight each, for scores that were brought to one range. Without a development set: HybridRetriever([lion, bm25]),
# which fuses by reciprocal ranks.
convex = fit_hybrid([lion, bm25], DEVELOPMENT, split="test", depth=DEPTH, name="convex")
print("weights:", {part.name: round(weight, 2) for part, weight in zip([lion, bm25], convex.weights, strict=True)})
by_rank = HybridRetriever([lion, bm25], depth=DEPTH, name="reciprocal ranks")

rows = []
for retriever in (bm25, lion, by_rank, convex):
    rows += evaluate_retrieval(retriever, TEST, output_dir=OUTPUT, top_k=DEPTH, metrics=("nDCG@10", "Recall@100"))
print(format_table(rows, ["model", "dataset", "nDCG@10", "Recall@100"]))

documents, queries, _ = load_beir(TEST)
convex.index({key: f"{row['title']} {row['text']}".strip() for key, row in documents.items()})
query = next(iter(queries.values()))
print(f"\n{query}")
for document, score in convex.search([query], k=3)[0]:
    print(f"  {score:.3f}  {document}  {documents[document]['text'][:80]}")
