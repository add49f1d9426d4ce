"""HTML of what the explorer answers; every text that is not ours is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from lion_st.demo.explorer import DEPTH, Answer, Explorer, Hit, Ranking
from lion_st.demo.terms import Reason, Reasons, Segment, cut
from lion_st.retrieval.explain import TextTerm

SHOWN_CHARACTERS = 600  # of a passage, before the rest is folded away
LEAST_FOLDED = 200
KINDS = {"sparse": "sparse", "dense": "dense", "lexical": "words"}


def header(explorer: Explorer) -> str:
    """Title of the page and what is searched with what."""
    documents = f"{len(explorer.collection.documents):,} documents"
    beside = " and ".join(escape(name) for name in explorer.beside)
    return (
        '<header class="lion-header"><h1>Lion explorer</h1>'
        f"<p>What <strong>{escape(explorer.name)}</strong> makes of a query, what it finds in "
        f"<strong>{escape(explorer.collection.name)}</strong> ({documents}), and why, beside {beside}.</p>"
        "<p>A sparse retriever gives a text a weight for each word of a vocabulary, also for related words that the "
        "text does not use, and finds the documents that share weighted words with the query.</p></header>"
    )


def message(text: str, kind: str = "note") -> str:
    """A message that a screen reader announces; `kind` is "note" or "error"."""
    role = "alert" if kind == "error" else "status"
    return f'<p class="lion-message {kind}" role="{role}">{escape(text)}</p>'


def expansion(answer: Answer) -> str:
    """The query's terms as bars, its own and the expansions told apart by pattern, sign and colour."""
    if not answer.terms:
        return _section("Terms of the query", "<p>The model gives this query no term, so it finds nothing.</p>")
    notes = "".join(message(note) for note in answer.notes)
    heaviest = answer.terms[0].weight
    own = sum(term.in_text for term in answer.terms)
    legend = (
        '<p class="lion-legend"><span><i class="swatch own"></i>in the query</span>'
        '<span><i class="swatch new"></i>+ expansion, added by the model</span></p>'
    )
    bars = "".join(_bar(term, heaviest) for term in answer.terms)
    count = (
        f"{len(answer.terms)} heaviest of {answer.active_dims:,} terms: {own} in the query, "
        f"{len(answer.terms) - own} expansions."
    )
    return notes + _section(
        "Terms of the query", f'{legend}<ol class="lion-bars">{bars}</ol><p class="lion-small">{count}</p>'
    )


def summary(answer: Answer) -> str:
    """What was found, in a line for those who do not see the page change."""
    found = " and ".join(f"{len(ranking.hits)} by {ranking.name}" for ranking in answer.rankings)
    return escape(f"Documents found: {found}.")


def rankings(answer: Answer) -> str:
    """The rankings side by side, on a narrow screen in tabs."""
    tabs = "".join(
        f'<input type="radio" class="lion-tab" name="lion-tab" id="lion-tab-{number}"{" checked" * (number == 0)}>'
        f'<label for="lion-tab-{number}">{escape(ranking.name)}</label>'
        for number, ranking in enumerate(answer.rankings)
    )
    columns = "".join(
        _ranking(ranking, other.name, answer)
        for ranking, other in zip(answer.rankings, reversed(answer.rankings), strict=True)
    )
    return f'<div class="lion-columns">{tabs}{columns}</div>'


def text_with_marks(segments: Sequence[Segment]) -> str:
    """A text with its reasons marked; what the model does not read is set apart."""
    return "".join(_segment(segment) for segment in segments)


def passage(segments: Sequence[Segment]) -> str:
    """A passage with its reasons marked, the rest of a long one folded away."""
    text = "".join(segment.text for segment in segments)
    if len(text) <= SHOWN_CHARACTERS + LEAST_FOLDED:
        return f'<p class="lion-text">{text_with_marks(segments)}</p>'
    place = text.rfind(" ", 0, SHOWN_CHARACTERS)
    first, rest = cut(segments, place if place > 0 else SHOWN_CHARACTERS)
    return (
        f'<p class="lion-text">{text_with_marks(first)} …</p><details class="lion-rest"><summary>The rest '
        f"({sum(len(segment.text) for segment in rest):,} characters)</summary>"
        f'<p class="lion-text">{text_with_marks(rest)}</p></details>'
    )


def _section(title: str, body: str) -> str:
    return f'<section class="lion-section"><h2>{escape(title)}</h2>{body}</section>'


def _bar(term: TextTerm, heaviest: float) -> str:
    kind, sign = ("own", "") if term.in_text else ("new", '<b aria-hidden="true">+ </b>')
    said = "in the query" if term.in_text else "expansion"
    name = f'{sign}{escape(term.name)}<span class="lion-hidden">, {said}</span>'
    return (
        f'<li class="{kind}"><span class="name" title="{escape(term.name)}">{name}</span>'
        f'<span class="track"><span class="fill" style="width:{100 * term.weight / heaviest:.1f}%"></span></span>'
        f'<span class="weight">{term.weight:.2f}</span></li>'
    )


def _ranking(ranking: Ranking, other: str, answer: Answer) -> str:
    title = f'{escape(ranking.name)} <span class="lion-kind">{KINDS[ranking.paradigm]}</span>'
    if ranking.hits:
        body = "".join(_hit(hit, other) for hit in ranking.hits)
        lead = _lead(ranking, answer.rankings[0].name)
        body = f'<p class="lion-small">{escape(lead)}</p><ol class="lion-hits">{body}</ol>'
    else:
        body = f"<p>{escape(ranking.name)} finds nothing for this query.</p>"
    return f'<section class="lion-ranking {ranking.paradigm}"><h2>{title}</h2>{body}</section>'


def _lead(ranking: Ranking, sparse: str) -> str:
    """What the percentages of a ranking are."""
    lead = {
        "sparse": "A score is a sum over the terms that query and passage share; each percentage is a term's part.",
        "lexical": "A score is a sum over the words that query and passage share; each percentage is a word's part.",
        "dense": f"A dense score has no parts to show. The percentages are parts of {sparse}'s score of the passage.",
    }[ranking.paradigm]
    cut_off = any(not segment.read for hit in ranking.hits for segment in hit.text)
    return f"{lead} In italics: beyond what {sparse} reads." if cut_off else lead


def _hit(hit: Hit, other: str) -> str:
    title = text_with_marks(hit.title) or escape(hit.document.id)
    elsewhere = f"rank {hit.elsewhere}" if hit.elsewhere else f"not among the first {DEPTH}"
    facts = [f"score {hit.score:.3f}", f"{escape(other)}: {elsewhere}"]
    if hit.relevant:
        facts.append('<span class="relevant">✓ judged relevant</span>')
    return (
        f'<li class="lion-hit"><h3><span class="rank">{hit.rank}</span>{title}</h3>'
        f'<p class="lion-small">{" · ".join(facts)}</p>{_why(hit.reasons)}{passage(hit.text)}</li>'
    )


def _why(reasons: Reasons) -> str:
    if not reasons.more and not reasons.listed:
        return '<p class="lion-small">No shared term.</p>'
    chips = "".join(_chip(reason) for reason in reasons.listed)
    if reasons.more:
        chips += f'<li class="more">{reasons.more} more: {_percent(reasons.more_share)}</li>'
    return f'<ul class="lion-why" aria-label="Why it matched">{chips}</ul>'


def _chip(reason: Reason) -> str:
    kind, said = _origin(reason)
    sign = '<b aria-hidden="true">+ </b>' if kind == "new" else ""
    return (
        f'<li class="{kind}" title="{escape(said)}" style="--share:{100 * reason.share:.0f}%">{sign}'
        f'{escape(reason.name)} <span class="percent">{_percent(reason.share)}</span>'
        f'<span class="lion-hidden">, {escape(said)}</span></li>'
    )


def _origin(reason: Reason) -> tuple[str, str]:
    """How a shared term is drawn, and what is said of it."""
    match reason.in_query, reason.in_passage:
        case True, True:
            return "own", "in the query and in the passage"
        case True, False:
            return "new", "in the query; the passage was expanded with it"
        case False, True:
            return "new", "in the passage; the query was expanded with it"
        case _:
            return "new", "in neither text; both were expanded with it"


def _segment(segment: Segment) -> str:
    if segment.reasons:
        kind = "own" if any(reason.in_query for reason in segment.reasons) else "new"
        said = ", ".join(_reason_said(segment.reasons))
        share = min(100.0, 100 * segment.share)
        return f'<mark class="{kind}" title="{escape(said)}" style="--share:{share:.0f}%">{escape(segment.text)}</mark>'
    if not segment.read:
        return f'<span class="unread" title="Beyond what the model reads">{escape(segment.text)}</span>'
    return escape(segment.text)


def _reason_said(reasons: Iterable[Reason]) -> list[str]:
    return [f"{reason.name}: {_percent(reason.share)} of the score" for reason in reasons]


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "under 1%"
