"""Text: corpora, editions (preprocessing), tokenizers and vocabularies."""

from gpurnn.text.corpora import CORPORA, Corpus, CorpusError, decode_corpus, load_corpus
from gpurnn.text.editions import EDITION_LIMIT, EDITIONS, normalize, training_text
from gpurnn.text.tokenizer import UNITS, Tokenizer
from gpurnn.text.vocabulary import UNK, Vocabulary

__all__ = [
    "CORPORA",
    "EDITIONS",
    "EDITION_LIMIT",
    "UNITS",
    "UNK",
    "Corpus",
    "CorpusError",
    "Tokenizer",
    "Vocabulary",
    "decode_corpus",
    "load_corpus",
    "normalize",
    "training_text",
]
