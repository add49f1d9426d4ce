"""Takes the picture of the page that the README shows.

python tests/demo/screenshot.py MODEL --dense DENSE_MODEL --query "..." hub_uploads/spaces/lion-explorer/screenshot.png
"""

import argparse
from pathlib import Path
from urllib.parse import quote

from headless import open_browser, save_screenshot, set_screen, wait

from lion_st.demo import build_page, launch, load_explorer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--dense", help="dense checkpoint; without one, BM25 is beside the sparse model")
    parser.add_argument("--data", help="documents; by default SQuAD dev of the quickstart data")
    parser.add_argument("--query", help="by default the collection's first example")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1400, help="at most")
    arguments = parser.parse_args()

    explorer = load_explorer(arguments.model, arguments.data, arguments.dense, show_progress=True)
    page = build_page(explorer)
    address = launch(page, block=False)
    query = arguments.query or explorer.collection.examples()[0]
    with open_browser(arguments.width) as browser:
        set_screen(browser, arguments.width, arguments.height, arguments.dark)
        browser.get(f"{address}?q={quote(query)}")
        wait(browser, lambda: browser.find_elements("css selector", ".lion-hit"), "hit", 120)
        save_screenshot(browser, arguments.output, arguments.height)
    page.close()


if __name__ == "__main__":
    main()
