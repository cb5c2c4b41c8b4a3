"""The tokenizer gives CLIP's ids, and each of its parts does its step of byte-pair encoding."""
import hashlib
import json
import pickle
import re
import time
from pathlib import Path

import pytest
import torch

import tokenizer
from tokenizer import END, START, bytes_to_unicode, clean, get_tokenizer, join, merge, vocabulary

HERE = Path(__file__).parent
ASSETS = HERE.parent / "vtp_min" / "assets"
# 77 texts with the ids of the official tokenizer
GOLDEN = json.loads((HERE / "golden" / "bpe.json").read_text())
TEXTS = [case["text"] for case in GOLDEN]


@pytest.mark.parametrize("length", [77, 32])
def test_rows_equal_those_of_the_official_tokenizer(length):
    rows = get_tokenizer("ViT-B-32", context_length=length)(TEXTS).tolist()
    assert rows == [case[f"ids{length}"] for case in GOLDEN]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["kind"])
def test_encoding_and_decoding_equal_those_of_the_official_tokenizer(case):
    assert get_tokenizer().encode(case["text"]) == case["encode"]
    assert get_tokenizer().decode(case["encode"]) == case["decoded"]


def test_each_byte_has_a_character_of_its_own():
    table = bytes_to_unicode()
    assert sorted(table) == list(range(256)) and len(set(table.values())) == 256
    assert not any(character.isspace() for character in table.values())


def test_vocabulary_is_256_characters_twice_then_the_merges_then_two_special_tokens():
    vocab, ids, merge_rank = vocabulary()
    assert len(vocab) == len(set(vocab)) == tokenizer.VOCAB == 256 + 256 + len(merge_rank) + 2
    assert vocab[START] == "<start_of_text>" and vocab[END] == "<end_of_text>"


def test_every_token_is_the_merge_of_two_tokens_learned_before_it():
    _, ids, merge_rank = vocabulary()
    for (left, right), n in merge_rank.items():
        assert ids[left + right] == 512 + n
        assert max(ids[left], ids[right]) < 512 + n


def test_join_works_from_left_to_right_and_uses_no_part_twice():
    assert join(list("abcab"), ("a", "b")) == ["ab", "c", "ab"]
    assert join(list("aaa"), ("a", "a")) == ["aa", "a"]


def test_any_text_can_be_encoded_because_every_byte_has_a_character():
    for word in ("猫", "🍕", "\U0010ffff", "qqqzzzxxx"):
        assert get_tokenizer().decode(merge(word)) == word + " "


def test_decoding_an_encoded_text_gives_its_words_separated_by_spaces():
    tok = get_tokenizer()
    for text in ("a photo of a cat", "größe", "красная площадь", "三 cats", "5 stars !"):
        assert tok.decode(tok.encode(text)).split() == re.sub(r"(\d)", r"\1 ", text).split()


def test_cleaning_a_clean_text_changes_nothing():
    for text in map(clean, TEXTS):
        assert clean(text) == text


def test_case_spaces_and_html_escapes_do_not_matter():
    encode = get_tokenizer().encode
    assert encode("  A\tDog &amp;amp; a\n cat ") == encode("a dog & a cat")


def test_a_row_is_start_ids_end_and_zeros():
    tok = get_tokenizer(context_length=10)
    ids = tok.encode("a small dog")
    assert tok("a small dog").tolist() == [[START, *ids, END] + [0] * (8 - len(ids))]
    assert tok([]).shape == (0, 10)
    assert tok(["", "a"]).shape == (2, 10)
    assert tok("").dtype == torch.long


def test_the_largest_id_of_a_row_is_its_end_even_if_the_caption_was_truncated():
    tok = get_tokenizer(context_length=8)
    rows = tok(["dog", "dog " * 5, "dog " * 6, "dog " * 7, "dog " * 100])
    assert rows.argmax(-1).tolist() == [2, 6, 7, 7, 7]
    assert (rows.max(-1).values == END).all()
    assert (rows[:, 0] == START).all()


def test_a_padded_row_can_be_decoded():
    row = get_tokenizer(context_length=6)("a dog")[0]
    assert get_tokenizer().decode(row) == "<start_of_text>a dog <end_of_text>!!"


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B/32", "ViT-L-14-336", "ViT-bigG-14",
                                  "ViT-B-16-plus-240", "ViT-H-14-378-quickgelu", "RN50", "RN50x4"])
def test_models_of_clips_family_share_one_vocabulary(name):
    assert get_tokenizer(name)("a dog").equal(get_tokenizer()("a dog"))


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "roberta-ViT-B-32", "ViT-L-14-CLIPA",
                                  "ViT-H-14-worldwide", "gpt2", ""])
def test_models_with_another_vocabulary_raise(name):
    with pytest.raises(ValueError, match="get_tokenizer"):
        get_tokenizer(name)


def test_a_length_without_space_for_start_and_end_raises():
    with pytest.raises(ValueError, match="context_length is 1"):
        get_tokenizer("ViT-B-32", context_length=1)


def test_a_tokenizer_is_sent_to_a_worker_process_in_a_few_bytes():
    pickled = pickle.dumps(get_tokenizer(context_length=20))
    assert len(pickled) < 200
    assert pickle.loads(pickled)("a dog").shape == (1, 20)


def test_tables_load_in_less_than_a_second():
    start = time.perf_counter()
    vocabulary.__wrapped__()
    assert time.perf_counter() - start < 1


def test_the_list_of_sources_names_each_asset_with_its_hash():
    sources = (ASSETS / "SOURCES.md").read_text()
    rows = re.findall(r"^\| `(\S+)` .* `([0-9a-f]{64})` \|$", sources, re.MULTILINE)
    files = {path.name for path in ASSETS.iterdir()}
    assert {name for name, _ in rows} == files - {"SOURCES.md"}
    for name, digest in rows:
        assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == digest, name


def test_imagenet_has_1000_names_1000_folders_in_order_and_80_templates():
    def lines(name):
        return (ASSETS / f"imagenet_{name}.txt").read_text().splitlines()
    names, wnids, templates = lines("classnames"), lines("wnids"), lines("templates")
    assert len(names) == len(set(wnids)) == 1000 and wnids == sorted(wnids)
    assert (wnids[0], names[0]) == ("n01440764", "tench")
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in wnids)
    assert len(templates) == 80
    assert all(template.count("{}") == 1 for template in templates)
