"""Encode a folder of texts, index it and search it, with the words behind each score.

    pip install 'lion-st[retrieval]'
    python examples/index_and_search_a_folder.py

Prints what was encoded and indexed, and for each query the best documents with the terms that they share with it.
Repeat it after an interruption and it goes on; encoding and index are folders that later runs and other machines read.
"""

import lion_st
from lion_st.encoding import EncodedCorpus, encode_corpus
from lion_st.indexes import load_index
from lion_st.retrieval import index_corpus, search_texts

MODEL = "runs/quickstart/lion-sp"  # of `make quickstart`, or a name on the Hub
TEXTS = "my_texts"  # a folder of .jsonl, .tsv, .csv, .parquet or .txt files (a text a line); also compressed
OUTPUT = "runs/my_texts"
QUERIES = ["who hunts zebras", "where do rivers end"]
ENGINE = "exact"  # or "seismic" for many millions of documents; "faiss" for dense models

model = lion_st.load(MODEL)
encoded = encode_corpus(model, TEXTS, f"{OUTPUT}/encoded")
corpus = EncodedCorpus(encoded)
print(f"{len(corpus):,} documents in {encoded}")

report = index_corpus(encoded, f"{OUTPUT}/index", ENGINE, overwrite=True)
megabytes = report.index.stats()["bytes"] / 1e6
print(f"{ENGINE} index of {megabytes:.1f} MB in {report.seconds:.1f} s, recall {report.recall or 'complete'}")

index = load_index(f"{OUTPUT}/index")  # as another process would
for hit in search_texts(model, index, QUERIES, k=3, explain=ENGINE == "exact"):
    if hit.rank == 1:
        print(f"\n{hit.query}")
    terms = ", ".join(f"{shared.term} {shared.share:.0%}" for shared in hit.terms[:5])
    print(f"  {hit.rank}. {hit.score:7.3f}  {hit.document}  {terms}")
