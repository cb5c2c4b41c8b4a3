"""CLIP's text tokenizer: a caption <-> token ids. It is a byte-level byte-pair encoding (BPE) with
the vocabulary of VTP and OpenCLIP.

    clean      "A  Café!" -> "a café!"         one spelling for equal texts
    split      "a café!" -> a | café | !       words, single digits, runs of other characters
    bytes      café -> c a f Ã ©</w>           one character per UTF-8 byte, so any text has ids
    merge      c a f Ã ©</w> -> café</w>       join pairs, the pair learned earliest first
    look up    café</w> -> 15304
    pad        49406 (start), ids, 49407 (end), 0, 0, ...; longer captions are truncated

    get_tokenizer("ViT-B-32", context_length=77)(["a dog", "two cats"])    (2, 77) int64

The end token has the largest id, and the text tower reads a caption at argmax(ids).
`python tokenizer.py a dog` prints the tokens of a text.
"""
import gzip
import html
from functools import lru_cache
from itertools import islice
from pathlib import Path

import ftfy
import regex
import torch

# one pair of tokens per line, in the order in which they were learned
MERGES = Path(__file__).parent / "vtp_min" / "assets" / "bpe_simple_vocab_16e6.txt.gz"
SPECIAL = ["<start_of_text>", "<end_of_text>"]
# 256 characters, 256 characters that end a word, 48894 merges and 2 special tokens
START, END, VOCAB = 49406, 49407, 49408
# special tokens, English contractions, then: letters; one digit; other characters, but no spaces
WORD = regex.compile(r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d"
                     r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
# names of CLIP and OpenCLIP models that have this vocabulary
MODEL = regex.compile(r"ViT-[A-Za-z]+-\d+(-(plus|alt|quickgelu|\d+))*|RN\d+(x\d+)?(-quickgelu)?")


@lru_cache
def bytes_to_unicode():
    """-> {byte: printable character}, in the order of the vocabulary

    Printable Latin-1 characters represent themselves. The other bytes, such as spaces and control
    characters, are represented by the characters from U+0100 on, so that a token is visible text.
    """
    # Latin-1 without the no-break space (0xA0) and the soft hyphen (0xAD), which are not visible
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in table]
    for n, byte in enumerate(others):
        table[byte] = chr(256 + n)
    return table


# read when it is first needed, then kept
@lru_cache
def vocabulary():
    """-> vocab, list of VOCAB tokens by id; ids {token: id}; merge_rank {(left, right): order}"""
    characters = list(bytes_to_unicode().values())
    # the file has more merges than CLIP uses
    n_merges = VOCAB - 2 * len(characters) - len(SPECIAL)
    with gzip.open(MERGES, "rt", encoding="utf-8") as f:
        lines = islice(f, 1, 1 + n_merges)                        # line 0 is a title
        merges = [tuple(line.split()) for line in lines]
    # "</w>" marks the end of a word: "cat</w>" is a word, "cat" the beginning of a longer one
    vocab = characters + [c + "</w>" for c in characters]
    vocab += [left + right for left, right in merges] + SPECIAL
    ids = {token: i for i, token in enumerate(vocab)}
    merge_rank = {pair: n for n, pair in enumerate(merges)}
    return vocab, ids, merge_rank


def clean(text):
    """Repair broken Unicode, undo HTML escapes, reduce whitespace to single spaces, lower case"""
    # captions from the web are often escaped twice: "&amp;amp;"
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


# the cache is large because captions repeat the same words
@lru_cache(maxsize=2 ** 16)
def merge(word):
    """Byte-pair encoding of one word, a match of WORD -> tuple of its ids

    The text is split into bytes. While a neighbouring pair of tokens is in the list of merges, the
    pair that was learned earliest is joined.
    """
    _, ids, merge_rank = vocabulary()
    if word in SPECIAL:
        return (ids[word],)
    parts = [bytes_to_unicode()[byte] for byte in word.encode("utf-8")]
    parts[-1] += "</w>"
    while len(parts) > 1:
        pairs = zip(parts, parts[1:])
        # VOCAB is above every rank, so a pair that was never learned comes last
        earliest = min(pairs, key=lambda pair: merge_rank.get(pair, VOCAB))
        if earliest not in merge_rank:
            break
        parts = join(parts, earliest)
    return tuple(ids[part] for part in parts)


def join(parts, pair):
    """Join every occurrence of `pair`:  a b c a b, (a, b) -> ab c ab"""
    out = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part                # does not match again: a a a, (a, a) -> aa a
        else:
            out.append(part)
    return out


class Tokenizer:
    """Callable: a caption or a list of n captions -> (n, context_length) int64

    An instance holds only the length, so it is cheap to send to worker processes.
    """
    start, end, vocab_size = START, END, VOCAB

    def __init__(self, context_length):
        self.context_length = context_length

    def __call__(self, texts):
        if isinstance(texts, str):
            texts = [texts]
        rows = torch.zeros(len(texts), self.context_length, dtype=torch.long)     # padded with 0
        for row, text in zip(rows, texts):
            ids = [self.start, *self.encode(text), self.end][:self.context_length]
            # a truncated caption needs an end token, too: the text tower reads its output there
            ids[-1] = self.end
            row[:len(ids)] = torch.tensor(ids)
        return rows

    def encode(self, text):
        """A caption -> list of its ids, of any length, without start and end

        "<start_of_text>" and "<end_of_text>" in the text become 49406 and 49407, as in OpenCLIP:
        the text tower reads such a caption at its first 49407.
        """
        ids = []
        for word in WORD.findall(clean(text)):
            ids += merge(word)
        return ids

    def decode(self, ids):
        """List or 1-d tensor of ids -> text, with a space after each word

        The result is the cleaned text, not the original one. Padding (id 0) is decoded as "!".
        """
        vocab, _, _ = vocabulary()
        characters = "".join(vocab[int(i)] for i in ids)
        unicode_to_bytes = {c: byte for byte, c in bytes_to_unicode().items()}
        # "</w>" consists of four characters that are also bytes, so it is replaced afterwards
        text = bytes(unicode_to_bytes[c] for c in characters)
        # a truncated caption may end within a character of several bytes
        return text.replace(b"</w>", b" ").decode("utf-8", errors="replace")


@lru_cache
def get_tokenizer(name="ViT-B-32", context_length=77):
    """-> Tokenizer. ValueError if the named model has another vocabulary.

    All models of CLIP and OpenCLIP with names such as ViT-B-32, ViT-L/14, ViT-bigG-14 or RN50x4
    share one vocabulary. Others, such as ViT-B-16-SigLIP or roberta-ViT-B-32, have their own.
    """
    # OpenAI writes ViT-L/14, OpenCLIP writes ViT-L-14
    if not MODEL.fullmatch(name.replace("/", "-")):
        raise ValueError(f"'{name}' is not known to use CLIP's vocabulary of 49408 tokens, and no "
                         f"other vocabulary is available; for VTP, type get_tokenizer('ViT-B-32')")
    if context_length < 2:
        raise ValueError(f"context_length is {context_length}, but it must be at least 2, for the "
                         f"start and end tokens; the paper's models have 77")
    return Tokenizer(context_length)


if __name__ == "__main__":
    import sys
    text = " ".join(sys.argv[1:]) or "A photo of a Café!"
    for i in get_tokenizer().encode(text):
        print(f"{i:6d}  {vocabulary()[0][i]}")
