"""What is said of a query's terms and of a hit, without a model."""

import numpy as np
import pytest
from tiny_models import TEXTS, tiny_tokenizer

from lion_st.demo.terms import (
    Piece,
    Reason,
    cut,
    mark,
    read_text,
    read_words,
    reasons_of,
    word_reasons,
)
from lion_st.retrieval.explain import SharedTerm, TextTerm, expanded_terms

WIDTH = 500


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(vocab_size=900)  # wide enough for whole words


def term_of(tokenizer, text: str) -> int:
    """The one term that a text is."""
    (term,) = tokenizer(text, add_special_tokens=False)["input_ids"]
    return term


def vector(**weights: float) -> np.ndarray:
    row = np.zeros((1, WIDTH))
    for term, weight in weights.items():
        row[0, int(term.removeprefix("t"))] = weight
    return row


def test_tokens_and_words_stand_where_the_text_has_them(tokenizer) -> None:
    text = "What does a  retriever do in France?"
    read = read_text(text, tokenizer)
    for piece in read.pieces:
        assert text[piece.start : piece.end].casefold() == piece.name
    assert {"what", "a", "retriever", "france"} <= read.names
    assert read.read_until == len(text)
    assert read.tokens == len(tokenizer(text)["input_ids"])


def test_a_text_is_read_up_to_the_limit_behind_its_prompt(tokenizer) -> None:
    whole = read_text(TEXTS[3], tokenizer)
    part = read_text(TEXTS[3], tokenizer, limit=12)
    prompted = read_text(TEXTS[3], tokenizer, limit=12, prompt="passage: ")
    assert 0 < prompted.read_until < part.read_until < whole.read_until == len(TEXTS[3])
    assert part.tokens == whole.tokens < prompted.tokens
    assert "1949" not in part.names
    for piece in prompted.pieces:
        assert TEXTS[3][piece.start : piece.end].casefold() == piece.name
        assert piece.end <= prompted.read_until
    named = read_text("France", tokenizer, prompt="the capital of ").pieces
    assert named == [Piece(0, 6, "france")] * 2, "a word, and a token that begins with the prompt's last space"
    assert read_text(TEXTS[3], tokenizer, limit=3, prompt="a prompt longer than the limit: ").pieces == []


def test_half_a_character_is_not_a_name(tokenizer) -> None:
    text = "naïve 漢字"
    assert {piece.name for piece in read_text(text, tokenizer).pieces} >= {"naïve", "漢字"}
    assert not any("\ufffd" in name for name in read_text(text, tokenizer).names)


def test_query_terms_are_told_apart_from_expansions(tokenizer) -> None:
    term, lion, france = (term_of(tokenizer, text) for text in (" term", "Lions", " France"))
    query = "Which term? LIONS!"
    weights = {f"t{term}": 1.0, f"t{lion}": 3.0, f"t{france}": 2.0}
    terms = expanded_terms(vector(**weights), query, tokenizer, 3)
    assert terms == [TextTerm("Lions", 3.0, True), TextTerm("France", 2.0, False), TextTerm("term", 1.0, True)]
    assert len(expanded_terms(vector(**weights), query, tokenizer, 2)) == 2


def test_pieces_of_a_word_and_spellings_of_a_term_are_one(tokenizer) -> None:
    word = "photosynthesis"
    pieces = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    assert len(set(pieces)) > 2
    inside, start = term_of(tokenizer, "for"), term_of(tokenizer, " for")
    bytes_of_characters = tokenizer("漢字", add_special_tokens=False)["input_ids"][:2]
    weights = dict.fromkeys([f"t{piece}" for piece in pieces], 1.0) | {f"t{inside}": 0.5, f"t{start}": 0.25}
    weights |= dict.fromkeys([f"t{piece}" for piece in set(bytes_of_characters)], 0.01)
    terms = expanded_terms(vector(**weights), f"what is {word}", tokenizer, 9)
    assert [(term.name, term.in_text) for term in terms] == [(word, True), ("for", False), ("\ufffd", False)]
    assert terms[0].weight == pytest.approx(len(set(pieces))) and terms[1].weight == 0.75


def test_a_piece_from_inside_a_word_is_written_as_one(tokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    inside = next(
        token
        for token in sorted(vocabulary)
        if token.isalpha() and token.isascii() and len(token) > 2 and f"Ġ{token}" not in vocabulary
    )
    (term,) = expanded_terms(vector(**{f"t{vocabulary[inside]}": 1.0}), "a lion", tokenizer)
    assert term.name == f"…{inside}"


def test_shared_pieces_of_a_word_are_one_reason(tokenizer) -> None:
    query = read_text("photosynthesis", tokenizer)
    names = [piece.name for piece in query.pieces if piece.name != "photosynthesis"]
    assert set(query.words) >= set(names) and len(names) > 2
    shared = [SharedTerm(name, 1.0, 1.0, 1 / len(names)) for name in names]
    (reason,) = reasons_of(shared, query.names, query.names, words=query.words).listed
    assert (reason.name, reason.share) == ("photosynthesis", pytest.approx(1.0))


def test_reasons_add_up_to_the_score() -> None:
    shared = [SharedTerm(f"t{number}", 1.0, 1.0, share) for number, share in enumerate([0.4, 0.3, 0.2, 0.095, 0.005])]
    reasons = reasons_of(shared, {"t0", "t1"}, {"t0", "t2"}, count=4)
    assert [(reason.in_query, reason.in_passage) for reason in reasons.listed] == [
        (True, True),
        (True, False),
        (False, True),
        (False, False),
    ]
    assert sum(reason.share for reason in reasons.listed) + reasons.more_share == pytest.approx(1.0)
    assert reasons.more == 1
    few = reasons_of(shared, set(), set(), count=2)
    assert (len(few.listed), few.more, few.more_share) == (2, 3, pytest.approx(0.3))
    small = reasons_of(shared, set(), set())
    assert len(small.listed) == 4, "less than a hundredth of the score is not listed"


def test_spellings_of_one_name_are_one_reason() -> None:
    shared = [SharedTerm("Lion", 1, 1, 0.3), SharedTerm("pride", 1, 1, 0.4), SharedTerm("lion", 1, 1, 0.3)]
    listed = reasons_of(shared, {"lion"}, set()).listed
    assert [(reason.name, reason.share, reason.in_query) for reason in listed] == [
        ("Lion", pytest.approx(0.6), True),
        ("pride", pytest.approx(0.4), False),
    ]


def test_word_reasons_are_shares_of_the_lexical_score() -> None:
    reasons = word_reasons({"oil": 3.0, "crisis": 1.0, "the": 0.0})
    assert [(reason.name, reason.share) for reason in reasons.listed] == [("oil", 0.75), ("crisis", 0.25)]
    assert all(reason.in_query and reason.in_passage for reason in reasons.listed)
    assert word_reasons({}).listed == []


def reason(name: str, share: float = 0.5) -> Reason:
    return Reason(name, share, True, True)


def test_reasons_are_marked_where_they_stand_and_nowhere_else() -> None:
    text = "Lions hunt. A lion, and lionesses."
    segments = mark(text, read_words(text).pieces, [reason("Lion", 0.3), reason("hunt", 0.1)])
    assert "".join(segment.text for segment in segments) == text
    assert [(segment.text, segment.share) for segment in segments if segment.reasons] == [("hunt", 0.1), ("lion", 0.3)]


def test_tokens_of_one_word_are_marked_as_one() -> None:
    text = "photosynthesis"
    pieces = [Piece(0, 5, "photo"), Piece(5, 9, "synt"), Piece(9, 14, "hesis"), Piece(3, 7, "tosy")]
    (segment,) = mark(text, pieces, [reason("photo", 0.2), reason("synt", 0.1), reason("hesis", 0.1)])
    assert segment.text == text
    assert segment.share == pytest.approx(0.4)
    twice = mark("a a", read_words("a a").pieces, [reason("a", 0.2)])
    assert [segment.text for segment in twice] == ["a", " ", "a"]


def test_what_is_not_read_is_set_apart() -> None:
    text = "read this, not this"
    segments = mark(text, read_words(text[:9]).pieces, [reason("this")], read_until=9)
    assert [(segment.text, segment.read, bool(segment.reasons)) for segment in segments] == [
        ("read ", True, False),
        ("this", True, True),
        (", not this", False, False),
    ]


@pytest.mark.parametrize("place", [0, 3, 7, 12, 99])
def test_segments_are_cut_without_losing_a_character(place: int) -> None:
    text = "Lions hunt at night."
    segments = mark(text, read_words(text).pieces, [reason("hunt")])
    before, after = cut(segments, place)
    assert "".join(segment.text for segment in before) == text[:place]
    assert "".join(segment.text for segment in after) == text[place:]
