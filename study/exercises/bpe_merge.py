"""Exercise: a BPE merge.   Check it with: python study/exercise.py bpe_merge"""


def bpe_merge(parts, pair):
    """One merge of byte-pair encoding (BPE): join each occurrence of a pair of tokens in a word.

    parts    list of strings: the tokens of a word, such as ["l", "o", "w", "e", "r</w>"]
    pair     tuple of two strings, such as ("l", "o")
    returns  a new list, here ["lo", "w", "e", "r</w>"]; `parts` stays as it is

    The list is read from left to right, and a token takes part in one merge at most:

        ["a", "b", "c", "a", "b"], ("a", "b")  ->  ["ab", "c", "ab"]
        ["a", "a", "a"],           ("a", "a")  ->  ["aa", "a"]

    The tokenizer of CLIP repeats this, each time with the pair of the word that was learned
    earliest, until no neighbouring pair is in its list of merges.

    Source: Sennrich et al. 2016, Algorithm 1; CLIP (Radford et al. 2021) Sec. 2.4; the text tower
    of VTP, Sec. 3.4.

    Time: 15 minutes
    Question: Why must a word be encoded with the merges in the order in which they were learned?
    Give three letters and two merges for which another order gives other tokens.
    """
    raise NotImplementedError
