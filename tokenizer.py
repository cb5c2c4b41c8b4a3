"""CLIP's text tokenizer: a caption -> T ids, and back. Byte-level byte-pair encoding, the vocabulary of VTP and OpenCLIP.

    clean    "A  Café!"   -> "a café!"                     one way to write each text
    split    "a café!"    -> a | café | !                  words, single digits, runs of signs
    spell    café         -> c a f Ã ©</w>                 one visible letter for each UTF-8 byte, so that nothing is unknown
    merge    c a f Ã ©</w>   -> café</w> -> 15304          the pair learned earliest is joined first, until no known pair is left
    frame    49406 (start), ids, 49407 (end), 0, 0, ...    T in all; a longer caption is cut, its last id is the end

    get_tokenizer("ViT-B-32", context_length=77)(["a dog", "two cats"])    (2, 77) int64
The end id is the largest: the text tower reads the caption at argmax(ids). `python tokenizer.py a dog` shows the pieces.
"""
import gzip
import html
from functools import lru_cache
from itertools import islice
from pathlib import Path

import ftfy
import regex
import torch

MERGES = Path(__file__).parent / "vtp_min" / "assets" / "bpe_simple_vocab_16e6.txt.gz"     # a pair a line, earliest learned first
SPECIAL = ["<start_of_text>", "<end_of_text>"]
START, END, VOCAB = 49406, 49407, 49408                  # 256 letters + 256 letters that end a word + 48894 merges + 2 special ids
WORD = regex.compile(r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
MODEL = regex.compile(r"ViT-[A-Za-z]+-\d+(-(plus|alt|quickgelu|\d+))*|RN\d+(x\d+)?(-quickgelu)?")     # who speaks this vocabulary


@lru_cache
def letters():
    """The 256 bytes as visible letters, {byte: letter}, in the vocabulary's order: printable Latin-1 is itself, the rest follow from U+0100."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in seen]
    return {b: chr(b) for b in seen} | {b: chr(256 + n) for n, b in enumerate(hidden)}


@lru_cache
def vocabulary():
    """-> pieces, the VOCAB strings by id; ids {piece: id}; rank {(left, right): order in which the merge was learned}"""
    alphabet = list(letters().values())
    with gzip.open(MERGES, "rt", encoding="utf-8") as f:
        pairs = [tuple(line.split()) for line in islice(f, 1, 1 + VOCAB - 2 * 256 - 2)]       # line 0 is a title
    pieces = alphabet + [a + "</w>" for a in alphabet] + [left + right for left, right in pairs] + SPECIAL
    return pieces, {p: i for i, p in enumerate(pieces)}, {pair: n for n, pair in enumerate(pairs)}


def clean(text):
    """One spelling for each text: repair broken Unicode, undo HTML escapes (twice: captions are often escaped twice), one space, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@lru_cache(maxsize=2 ** 16)
def merge(word):
    """One word of WORD -> its ids, a tuple. Byte-pair encoding; captions repeat their words, hence the cache."""
    _, ids, rank = vocabulary()
    if word in SPECIAL:
        return (ids[word],)
    parts = [letters()[b] for b in word.encode("utf-8")]
    parts[-1] += "</w>"
    while len(parts) > 1:
        first = min(zip(parts, parts[1:]), key=lambda pair: rank.get(pair, VOCAB))            # the pair learned earliest
        if first not in rank:
            break
        parts = join(parts, first)
    return tuple(ids[p] for p in parts)


def join(parts, pair):
    """Every neighbouring `pair` becomes one part:  a b c a b, (a, b) -> ab c ab"""
    out = []
    for p in parts:
        if out and (out[-1], p) == pair:
            out[-1] += p
        else:
            out.append(p)
    return out


class Tokenizer:
    """Call it on a caption or a list of n captions -> (n, context_length) int64. It holds nothing but the length; the tables are shared."""
    start, end, vocab_size = START, END, VOCAB

    def __init__(self, context_length):
        self.context_length = context_length

    def __call__(self, texts):
        texts = [texts] if isinstance(texts, str) else texts
        rows = torch.zeros(len(texts), self.context_length, dtype=torch.long)                 # 0 pads
        for row, text in zip(rows, texts):
            ids = [self.start, *self.encode(text), self.end][:self.context_length]
            ids[-1] = self.end                                                                # a cut caption ends too
            row[:len(ids)] = torch.tensor(ids)
        return rows

    def encode(self, text):
        """One caption -> its ids, a list: neither framed nor cut. "<start_of_text>" and "<end_of_text>" written out become ids 49406 and 49407,
        as in OpenCLIP: the text tower reads such a caption at its first 49407."""
        return [i for word in WORD.findall(clean(text)) for i in merge(word)]

    def decode(self, ids):
        """Ids (list or 1-d tensor) -> text, words set apart by one space: the cleaning is not undone, and padding, id 0, reads "!"."""
        pieces, byte = vocabulary()[0], {letter: b for b, letter in letters().items()}
        spelled = "".join(pieces[int(i)] for i in ids)
        return bytes(byte[c] for c in spelled).replace(b"</w>", b" ").decode("utf-8", errors="replace")


@lru_cache
def get_tokenizer(name="ViT-B-32", context_length=77):
    """-> Tokenizer. All of CLIP's and OpenCLIP's models named ViT-B-32, ViT-L/14, ViT-bigG-14, RN50x4, ... share one vocabulary, so the name
    changes nothing; a name outside this family (ViT-B-16-SigLIP, roberta-ViT-B-32) has words of its own and is refused."""
    if not MODEL.fullmatch(name.replace("/", "-")):
        raise ValueError(f"'{name}' is not known to use CLIP's 49408-piece vocabulary, the only one here; VTP's is get_tokenizer('ViT-B-32')")
    if context_length < 2:
        raise ValueError(f"context_length is {context_length}, but start and end alone take 2 ids; the paper's models use 77")
    return Tokenizer(context_length)


if __name__ == "__main__":
    import sys
    show = get_tokenizer()
    for i in show.encode(" ".join(sys.argv[1:]) or "A photo of a Café!"):
        print(f"{i:6d}  {vocabulary()[0][i]}")
