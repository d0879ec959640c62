"""Tokenizer: characters, the word rule, figures, errors."""

import dataclasses
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timemachine import require_time_machine

from gpurnn.text import EDITIONS, Tokenizer, normalize

WORDS = Tokenizer("word")


def test_characters_are_code_points_of_the_normalised_text() -> None:
    assert Tokenizer("char", "book").tokens("Oh, é!") == ["o", "h", " "]
    assert Tokenizer().tokens("Oé\n") == ["O", "é", "\n"]


def test_title_of_the_time_machine() -> None:
    assert WORDS.tokens("The Time Machine, by H. G. Wells") == [
        "the", "time", "machine", "by", "h.", "g.", "wells",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        # apostrophes: inside a word only, and of one kind
        ("'I don't,' said the o'clock.", "i don't said the o'clock"),
        ("don\N{RIGHT SINGLE QUOTATION MARK}t fellows' 'em rock''n", "don't fellows em rock n"),
        # other punctuation, hyphens and underscores separate
        ("way--marking _nil_, after-dinner (a_b)!", "way marking nil after dinner a b"),
        # initials and abbreviations
        ("H.G. Wells, h. g. wells", "h. g. wells h. g. wells"),
        ("One A.D. (e.g. this); i.e.", "one a. d. e. g. this i. e."),
        ("x.append(y) or a.b", "x append y or a. b"),
        ("ab. c", "ab c"),
        # a one-letter word that ends a sentence cannot be told from an initial
        ("said I. You", "said i. you"),
        # digits are words, and no initials
        ("[1898] 3.11.7, 1,000. 2. 3rd 5,x ab,5", "1898 3.11.7 1,000 2 3rd 5 x ab 5"),
        # letters of any script, with their combining marks
        ("Naïve ÅNGSTRÖM Ünï. É. Ω.", "naïve ångström ünï é. ω."),
        ("हिन्दी भाषा, 中文", "हिन्दी भाषा 中文"),
        ("ΟΔΟΣ İstanbul", "οδος i\u0307stanbul"),
        ("\u0301stray mark", "stray mark"),
        # nothing
        ("", ""),
        (" -- ... '' _ ", ""),
    ],
)  # fmt: skip
def test_word_rule(text: str, tokens: str) -> None:
    assert WORDS.tokens(text) == tokens.split()


def test_composed_and_decomposed_letters_are_the_same_word() -> None:
    assert WORDS.tokens("cafe\u0301 E\u0301. x\u0301.") == ["café", "é.", "x\u0301."]
    assert WORDS.tokens("cafe\u0301") == WORDS.tokens("café")


def test_marks_of_one_text_do_not_leak_into_the_next() -> None:
    assert WORDS.tokens("a\u0301\u0308b") == ["á\u0308b"]
    assert WORDS.tokens("a-b") == ["a", "b"]


def test_words_of_the_time_machine() -> None:
    words = Tokenizer("word", "book").tokens(require_time_machine())
    assert (len(words), len(set(words))) == (32_775, 4_579)
    assert words == normalize(require_time_machine(), "book").split()


def test_raw_words_of_the_time_machine_keep_initials_and_apostrophes() -> None:
    words = WORDS.tokens(require_time_machine())
    assert words[:7] == ["the", "time", "machine", "by", "h.", "g.", "wells"]
    assert (len(words), len(set(words))) == (32_654, 4_610)
    assert words.count("don't") == 16


def test_join() -> None:
    assert Tokenizer("char").join("machine") == "machine"
    assert Tokenizer("word").join(["by", "h.", "g."]) == "by h. g."
    assert Tokenizer("word").join([]) == ""


@settings(deadline=None)
@given(text=st.text(), edition=st.sampled_from(sorted(EDITIONS)))
def test_characters_join_to_the_normalised_text(text: str, edition: str) -> None:
    tokenizer = Tokenizer("char", edition)
    assert tokenizer.join(tokenizer.tokens(text)) == normalize(text, edition)


@settings(deadline=None)
@given(text=st.text() | st.text(alphabet="aI9Σ.,'’_- \u0301\n"))
def test_joined_words_split_into_the_same_words(text: str) -> None:
    words = WORDS.tokens(text)
    assert WORDS.tokens(WORDS.join(words)) == words


@settings(deadline=None)
@given(text=st.text() | st.text(alphabet="aI9Σ.,'’_- \u0301\n"))
def test_no_letter_or_digit_is_lost(text: str) -> None:
    composed = unicodedata.normalize("NFC", text.lower())
    found = "".join(WORDS.tokens(text))
    assert list(filter(str.isalnum, found)) == list(filter(str.isalnum, composed))


@settings(deadline=None)
@given(text=st.text(alphabet="aB '-.\n"))
def test_words_of_the_book_edition_are_split_at_spaces(text: str) -> None:
    assert Tokenizer("word", "book").tokens(text) == normalize(text, "book").split()


@pytest.mark.parametrize(
    "tokenizer", [Tokenizer(), Tokenizer("word", "book"), Tokenizer("char", "book-2019")]
)
def test_config_round_trip(tokenizer: Tokenizer) -> None:
    config = tokenizer.config()
    assert config == {"unit": tokenizer.unit, "edition": tokenizer.edition}
    assert Tokenizer.from_config(config) == tokenizer


@pytest.mark.parametrize(
    "config",
    [{}, {"unit": "char"}, {"unit": "char", "edition": "raw", "size": "28"}],
)
def test_config_with_other_keys(config: dict[str, str]) -> None:
    with pytest.raises(ValueError) as caught:
        Tokenizer.from_config(config)
    assert str(caught.value) == (
        f"a tokenizer's config must have the keys 'unit' and 'edition', got {list(config)}"
    )


def test_from_config_refuses_bad_values() -> None:
    with pytest.raises(ValueError, match="unit is "):
        Tokenizer.from_config({"unit": "byte", "edition": "raw"})


def test_unknown_unit() -> None:
    with pytest.raises(ValueError, match=r"^unit is 'line': expected one of char, word$"):
        Tokenizer("line")


def test_unknown_edition() -> None:
    with pytest.raises(ValueError, match=r"^edition is 'first': expected one of raw, .*$"):
        Tokenizer("char", "first")


def test_words_of_an_edition_that_runs_words_together() -> None:
    with pytest.raises(
        ValueError, match=r"unit='word' .* edition='book-2017'.* use edition='book'"
    ):
        Tokenizer("word", "book-2017")


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Tokenizer().unit = "word"
