"""Draw what `search.py` measured of several engines over the same vectors: latency, and what building costs.

    python benchmarks/search_figure.py                           # results/search-lion-100000.json
    python benchmarks/search_figure.py FILE --output FIGURE.svg

Points are the median of one query's processor time at k = 10 and k = 1000, whiskers reach from the least to the 99th
percentile. An engine that has no figures stands with what kept it from them.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS

OURS, OTHERS = "#D55E00", "#0072B2"
DEPTHS = {10: "o", 1000: "s"}
COSTS = {"build s": "seconds of building", "MB": "index, MB"}


def draw(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """A line for each engine, the fastest first: latency, seconds of building, size.

    Args:
        rows: Of `search.py`.
        title: What was searched, and on what.
        path: SVG to write.
    """
    import matplotlib

    from lion_st.study.figures import STYLE

    matplotlib.use("svg")
    from matplotlib import pyplot, ticker

    rows = sorted(rows, key=lambda row: row.get("p50 ms, k=10", float("inf")))
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(
            1, 1 + len(COSTS), figsize=(11.5, 1.4 + 0.42 * len(rows)), sharey=True, width_ratios=(2, 1, 1)
        )
        for place, row in enumerate(rows):
            colour = OURS if row["engine"].startswith("exact") else OTHERS
            if "p50 ms, k=10" not in row:
                reason = f"stopped {row['stopped']}" if "stopped" in row else row.get("note", "")
                panels[0].annotate(reason, (0.02, place), xycoords=("axes fraction", "data"), va="center", color="grey")
                continue
            for shift, (k, marker) in zip((-0.14, 0.14), DEPTHS.items(), strict=True):
                least, middle, most = (row[f"{which} ms, k={k}"] for which in ("min", "p50", "p99"))
                panels[0].errorbar(
                    middle, place + shift, xerr=[[middle - least], [most - middle]], marker=marker, color=colour,
                    markersize=5, capsize=2, linestyle="none",
                )  # fmt: skip
            for panel, name in zip(panels[1:], COSTS, strict=True):
                panel.plot(row[name], place, marker="D", color=colour, markersize=6, linestyle="none")
        names = [f"{row['engine']}, {row['recall@10']:.3g}" if "recall@10" in row else row["engine"] for row in rows]
        panels[0].set_yticks(range(len(rows)), names)
        panels[0].set_ylim(len(rows) - 0.5, -0.5)
        for panel, label in zip(panels, ("ms of one query, k = 10 (●) and 1000 (■)", *COSTS.values()), strict=True):
            panel.set_xscale("log")
            panel.set_xlabel(label)
            panel.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
            panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panels[0].set_title(f"{title}\nengine, recall@10", loc="left")
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=RESULTS / "search-lion-100000.json")
    parser.add_argument("--output", type=Path, default=RESULTS.parents[1] / "docs" / "search-engines.svg")
    options = parser.parse_args()
    found = json.loads(options.file.read_text())
    settings = found["settings"]
    title = f"{settings['documents']:,} documents: {settings['vectors']}; one core of {found['machine']}"
    draw(found["rows"], title, options.output)


if __name__ == "__main__":
    main()
