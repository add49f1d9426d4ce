"""Score a model beside BM25 on BEIR test sets, and test whether the difference is one.

    pip install 'lion-st[eval]'
    python examples/evaluate_on_beir.py

Prints a table with a row for each model and test set, and for each test set the paired difference with its p-value. The
scores are mteb's own; its result files, and TREC runs for any other tool, lie in the output folder. Run again, it reads
back what is finished.
"""

from collections import defaultdict

import lion_st
from lion_st.evaluation import compare_runs, evaluate_retrieval, format_table, read_qrels, read_run

MODEL = "runs/quickstart/lion-sp"  # of `make quickstart`, or a name on the Hub
DATA = ["runs/quickstart/test_sets/scifact"]  # BEIR folders, names of mteb's tasks ("SciFact"), or "BEIR", "NanoBEIR"
PROTOCOL = "beir"  # the paper's lengths, depth and metrics; "model" for the model's own lengths
OUTPUT = "runs/beir"
METRIC = "nDCG@10"

rows = []
for model in ("bm25", lion_st.load(MODEL)):
    rows += evaluate_retrieval(model, DATA, protocol=PROTOCOL, output_dir=OUTPUT, show_progress=True)
print(format_table(rows, ["model", "engine", "dataset", METRIC, "Recall@100", "query_terms", "document_terms"]))


of_dataset = defaultdict(dict)
for row in rows:
    if row["run"] is not None:  # the mean over several test sets has no run of its own
        of_dataset[row["dataset"]][row["model"]] = row
for dataset, models in of_dataset.items():
    runs = {name: read_run(row["run"]) for name, row in models.items()}
    (difference,) = compare_runs(read_qrels(models["bm25"]["qrels"]), runs, metrics=[METRIC])
    print(f"{dataset}: {difference.b} - {difference.a} = {difference.difference:+.3f}, p = {difference.p_value:.3f}")
