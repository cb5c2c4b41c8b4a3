"""CLIP's text tokenizer: a caption <-> token ids. Byte-level byte-pair encoding with the vocabulary
of VTP and OpenCLIP.

    clean      "A  Café!" -> "a café!"         one spelling for each text
    split      "a café!" -> a | café | !       words, single digits, runs of other signs
    bytes      café -> c a f Ã ©</w>           one character per UTF-8 byte, so none is unknown
    merge      c a f Ã ©</w> -> café</w>       the pair learned earliest first, until none is left
    look up    café</w> -> 15304
    a row      49406 (start), ids, 49407 (end), 0, 0, ...; a longer caption is cut

    get_tokenizer("ViT-B-32", context_length=77)(["a dog", "two cats"])    (2, 77) int64

The end id is the largest one: the text tower reads a caption at argmax(ids).
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

# a pair per line, the one learned earliest first
MERGES = Path(__file__).parent / "vtp_min" / "assets" / "bpe_simple_vocab_16e6.txt.gz"
SPECIAL = ["<start_of_text>", "<end_of_text>"]
# 256 characters, 256 characters that end a word, 48894 merges and 2 special tokens
START, END, VOCAB = 49406, 49407, 49408
WORD = regex.compile(r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d"
                     r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
# names of the models that have this vocabulary
MODEL = regex.compile(r"ViT-[A-Za-z]+-\d+(-(plus|alt|quickgelu|\d+))*|RN\d+(x\d+)?(-quickgelu)?")


@lru_cache
def bytes_to_unicode():
    """{byte: visible character}, in the vocabulary's order: printable Latin-1 characters stand for
    themselves, the other bytes become the characters from U+0100 on"""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in table]
    for n, byte in enumerate(others):
        table[byte] = chr(256 + n)
    return table


@lru_cache
def vocabulary():
    """-> vocab, list of VOCAB tokens by id; ids {token: id}; merge_rank {(left, right): order}"""
    characters = list(bytes_to_unicode().values())
    n_merges = VOCAB - 2 * len(characters) - len(SPECIAL)
    with gzip.open(MERGES, "rt", encoding="utf-8") as f:
        lines = islice(f, 1, 1 + n_merges)                        # line 0 is a title
        merges = [tuple(line.split()) for line in lines]
    vocab = characters + [c + "</w>" for c in characters]
    vocab += [left + right for left, right in merges] + SPECIAL
    ids = {token: i for i, token in enumerate(vocab)}
    merge_rank = {pair: n for n, pair in enumerate(merges)}
    return vocab, ids, merge_rank


def clean(text):
    """Repair broken Unicode, undo HTML escapes, reduce whitespace to single spaces, lower case"""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))      # captions are often escaped twice
    return " ".join(text.split()).lower()


@lru_cache(maxsize=2 ** 16)
def merge(word):
    """Byte-pair encoding of one word of WORD -> its ids, a tuple. Cached: captions repeat words."""
    _, ids, merge_rank = vocabulary()
    if word in SPECIAL:
        return (ids[word],)
    parts = [bytes_to_unicode()[byte] for byte in word.encode("utf-8")]
    parts[-1] += "</w>"
    while len(parts) > 1:
        pairs = zip(parts, parts[1:])
        earliest = min(pairs, key=lambda pair: merge_rank.get(pair, VOCAB))
        if earliest not in merge_rank:
            break
        parts = join(parts, earliest)
    return tuple(ids[part] for part in parts)


def join(parts, pair):
    """Join every neighbouring `pair`:  a b c a b, (a, b) -> ab c ab"""
    out = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


class Tokenizer:
    """A caption or a list of n captions -> (n, context_length) int64

    It holds only the length, so it is cheap to send to worker processes.
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
            ids[-1] = self.end                                    # also of a caption that was cut
            row[:len(ids)] = torch.tensor(ids)
        return rows

    def encode(self, text):
        """A caption -> list of its ids, without start and end, of any length

        "<start_of_text>" and "<end_of_text>" in the text become 49406 and 49407, as in OpenCLIP:
        the text tower reads such a caption at its first 49407.
        """
        ids = []
        for word in WORD.findall(clean(text)):
            ids += merge(word)
        return ids

    def decode(self, ids):
        """List or 1-d tensor of ids -> text, a space after each word. The cleaning is not undone,
        and padding, id 0, becomes "!"."""
        vocab, _, _ = vocabulary()
        characters = "".join(vocab[int(i)] for i in ids)
        unicode_to_bytes = {c: byte for byte, c in bytes_to_unicode().items()}
        text = bytes(unicode_to_bytes[c] for c in characters)
        return text.replace(b"</w>", b" ").decode("utf-8", errors="replace")


@lru_cache
def get_tokenizer(name="ViT-B-32", context_length=77):
    """-> Tokenizer. ValueError if the named model has another vocabulary.

    All models of CLIP and OpenCLIP named like ViT-B-32, ViT-L/14, ViT-bigG-14 or RN50x4 share one
    vocabulary; others (ViT-B-16-SigLIP, roberta-ViT-B-32) have their own.
    """
    if not MODEL.fullmatch(name.replace("/", "-")):
        raise ValueError(f"'{name}' is not known to use CLIP's vocabulary of 49408 tokens, the "
                         f"only one here; VTP's is get_tokenizer('ViT-B-32')")
    if context_length < 2:
        raise ValueError(f"context_length is {context_length}, but start and end need 2 ids; the "
                         f"paper's models have 77")
    return Tokenizer(context_length)


if __name__ == "__main__":
    import sys
    text = " ".join(sys.argv[1:]) or "A photo of a Café!"
    for i in get_tokenizer().encode(text):
        print(f"{i:6d}  {vocabulary()[0][i]}")
