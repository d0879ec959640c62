"""Editions: the rules, the published figures, the cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timemachine import require_time_machine

from gpurnn.text import EDITION_LIMIT, EDITIONS, normalize, training_text

TEXT = "The Time\r\nMachine, by\rH. G. Wells [1898]\n\n  I\n"


@pytest.mark.parametrize(
    ("edition", "expected"),
    [
        ("raw", TEXT),
        ("book", "the time machine by h g wells i "),
        ("book-2017", "the timemachine byh g wellsi"),
        ("book-2019", "the time  machine, by h. g. wells [1898]    i "),
    ],
)
def test_rule_of_each_edition(edition: str, expected: str) -> None:
    assert normalize(TEXT, edition) == expected


@pytest.mark.parametrize(
    ("edition", "characters", "distinct"),
    [
        ("raw", 178_979, 70),
        ("book", 173_428, 27),
        ("book-2017", 170_580, 27),
        ("book-2019", 178_979, 44),
    ],
)
def test_time_machine_normalised(edition: str, characters: int, distinct: int) -> None:
    normalised = normalize(require_time_machine(), edition)
    assert (len(normalised), len(set(normalised))) == (characters, distinct)


def test_time_machine_of_2019_is_cut_to_10_000_characters_of_43_symbols() -> None:
    text = require_time_machine()
    cut = training_text(text, "book-2019")
    assert (len(cut), len(set(cut))) == (10_000, 43)
    assert cut == normalize(text, "book-2019")[:10_000]


def test_only_2019_has_a_limit_and_it_cuts_only_the_training_text() -> None:
    text = "Abc " * 5_000
    assert dict(EDITION_LIMIT) == {"book-2019": 10_000}
    for edition in EDITIONS:
        whole = normalize(text, edition)
        assert len(whole) >= 19_999
        limit = 10_000 if edition == "book-2019" else len(whole)
        assert training_text(text, edition) == whole[:limit]


def test_letters_outside_ascii_are_separators_for_the_book() -> None:
    assert normalize("naïve Å 3rd", "book") == "na ve rd"


@settings(deadline=None)
@given(text=st.text(), edition=st.sampled_from(sorted(EDITIONS)))
def test_normalising_twice_changes_nothing_more(text: str, edition: str) -> None:
    once = normalize(text, edition)
    assert normalize(once, edition) == once


@settings(deadline=None)
@given(text=st.text(alphabet="aB .\r\n"))
def test_2017_joins_the_stripped_lines_of_the_book_rule(text: str) -> None:
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    assert normalize(text, "book-2017") == "".join(
        normalize(line, "book").strip() for line in lines
    )


@pytest.mark.parametrize("function", [normalize, training_text])
def test_unknown_edition(function) -> None:
    with pytest.raises(ValueError) as caught:
        function("text", "book-2042")
    assert str(caught.value) == (
        "edition is 'book-2042': expected one of raw, book, book-2017, book-2019"
    )


@pytest.mark.parametrize("edition", sorted(EDITIONS))
def test_text_must_be_a_string(edition: str) -> None:
    with pytest.raises(TypeError, match="text must be a str, got bytes"):
        normalize(b"bytes", edition)


def test_editions_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        EDITIONS["mine"] = str.upper
    with pytest.raises(TypeError):
        EDITION_LIMIT["book"] = 1
