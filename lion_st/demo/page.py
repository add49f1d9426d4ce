"""The page itself, laid out with Gradio; it needs nothing from the network."""

from __future__ import annotations

from threading import Event
from typing import TYPE_CHECKING, Any

from lion_st.demo import markup
from lion_st.demo.explorer import Explorer, QueryError
from lion_st.demo.style import CSS
from lion_st.extras import require

if TYPE_CHECKING:
    from gradio import Blocks

START = "Type a query and press Enter."
# The choices become one group, so that arrow keys move between them; what is found is announced; the query comes from
# the address.
ON_LOAD = """() => {
  document.getElementById("lion-status").setAttribute("role", "status");
  document.querySelectorAll("#lion-beside input").forEach(choice => { choice.name = "lion-beside"; });
  return new URLSearchParams(window.location.search).get("q") || "";
}"""
SELECT_QUERY = '() => { document.querySelector("#lion-query textarea, #lion-query input").select(); }'


def build_page(explorer: Explorer) -> Blocks:
    """Lay the page out.

    Its address takes a query, `?q=...`, so that a search can be linked to. Without one, the collection's first example
    is answered.

    Args:
        explorer: What answers.

    Raises:
        ImportError: If Gradio is not installed.
    """
    gr = require("gradio")
    names = list(explorer.beside)

    def search(query: str, beside: str) -> tuple[str, str, str]:
        return respond(explorer, query, beside)

    def open_link(query: str) -> tuple[str, str, str, str]:
        query = query or next(iter(explorer.collection.examples()), "")
        return query, *(search(query, names[0]) if query else (markup.message(START), "", ""))

    with gr.Blocks(title="Lion explorer", analytics_enabled=False) as page:
        gr.HTML(markup.header(explorer))
        with gr.Row(equal_height=True):
            query = gr.Textbox(label="Query", max_lines=1, autofocus=True, scale=8, min_width=260, elem_id="lion-query")
            button = gr.Button("Search", variant="primary", scale=1, min_width=110, elem_id="lion-search")
        beside = gr.Radio(names, value=names[0], label="Beside it", visible=len(names) > 1, elem_id="lion-beside")
        with gr.Row(elem_id="lion-examples"):
            examples = [gr.Button(text, size="sm") for text in explorer.collection.examples()]
        terms = gr.HTML(elem_id="lion-terms")
        results = gr.HTML(elem_id="lion-results")
        status = gr.HTML(elem_id="lion-status", elem_classes="lion-hidden")
        asked: dict[str, Any] = {"fn": search, "inputs": [query, beside], "outputs": [terms, results, status]}
        # What is asked while an answer is on its way is answered next, not dropped.
        gr.on([query.submit, button.click, beside.input], **asked, api_name="search", trigger_mode="always_last")
        for example in examples:
            chosen = example.click(str, example, query, api_visibility="private", queue=False)
            chosen.then(**asked, api_visibility="private")
        opened = page.load(open_link, query, [query, terms, results, status], js=ON_LOAD, api_visibility="private")
        opened.then(None, js=SELECT_QUERY, api_visibility="private")  # typing replaces the example
    return page


def respond(explorer: Explorer, query: str, beside: str | None = None) -> tuple[str, str, str]:
    """HTML of a query's terms, of what was found, and of a line that says so; of a query without answer, a message."""
    try:
        answer = explorer.answer(query or "", beside)
    except QueryError as error:
        return markup.message(str(error), "error"), "", ""
    return markup.expansion(answer), markup.rankings(answer), markup.summary(answer)


def launch(page: Blocks, host: str | None = None, port: int | None = None, *, block: bool = True) -> str:
    """Serve a page.

    Args:
        page: As `build_page` made it.
        host: Address to listen on, by default GRADIO_SERVER_NAME or 127.0.0.1: this machine alone.
        port: Port, by default GRADIO_SERVER_PORT or the first free one from 7860.
        block: Serve until interrupted; else return at once and serve until `page.close()`.

    Returns:
        The page's address.

    Raises:
        OSError: If the port is taken.
    """
    gr = require("gradio")
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        theme=_theme(gr),
        css=CSS,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        prevent_thread_lock=True,
        quiet=True,
    )
    if block:
        print(f"{page.title}: {address} (Ctrl+C ends it)", flush=True)
        try:
            _serve()
        except KeyboardInterrupt:
            page.close(verbose=False)
    return address


def _serve() -> None:
    Event().wait()


def _theme(gr: Any) -> Any:
    """Fonts of the reader's own machine, and a button whose white text can be read."""
    theme = gr.themes.Default(primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    button = {"background_fill": "*primary_700", "background_fill_hover": "*primary_800"}
    return theme.set(**{f"button_primary_{name}{mode}": hue for name, hue in button.items() for mode in ("", "_dark")})
