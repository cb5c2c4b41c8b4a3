"""Damaged files: an error names the file, the reason and what to do; damaged lines are left out."""
import json

import pytest
import torch

from vtp_min.extras.files import (check_writable, read_json, read_json_lines, read_settings,
                                  reading)

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"


@pytest.mark.parametrize("content, reason", [
    (b"", "the file is empty"), (bytes(300), "it begins with zeros"), (LFS, "Git LFS pointer"),
    (b'{"data": "shap', "Unterminated string"), (b"[1, 2]", "it holds a list, not a dict"),
    (b"null", "it holds a NoneType"), (b'{"other": 1}', "it lacks data"), (b"\xff\xfe{", "decode")])
def test_an_error_names_the_file_the_reason_and_the_remedy(tmp_path, content, reason):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"x.json cannot be read .*{reason}.*; do this"):
        read_json(path, "do this", keys=("data",))


@pytest.mark.parametrize("n", [0, 10, 500])
def test_a_file_of_tensors_that_is_cut_off_is_named_in_one_line(tmp_path, n):
    torch.save({"mean": torch.zeros(100)}, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:n])
    with pytest.raises(ValueError, match=r"x.pt cannot be read \(.*\); copy it") as error:
        with reading(tmp_path / "x.pt", "copy it"):
            torch.load(tmp_path / "x.pt", weights_only=True)
    assert "\n" not in str(error.value)


def test_a_missing_key_a_folder_and_a_missing_file_are_named_too(tmp_path):
    (tmp_path / "x").write_text("contents")
    for path, action, why in ((tmp_path / "x", lambda: {}["mean"], "'mean' is missing"),
                              (tmp_path, tmp_path.read_bytes, "Is a directory"),
                              (tmp_path / "y", (tmp_path / "y").read_bytes, "No such file")):
        with pytest.raises(ValueError, match=f"{path} cannot be read .{why}.*; copy it"):
            with reading(path, "copy it"):
                action()


def test_the_settings_of_released_weights_are_empty(tmp_path):
    assert read_settings(tmp_path) == read_settings("owner/name") == read_settings(None) == {}


GOOD = [{"step": 1, "loss": 2.0}, {"step": 2, "note": {"a": "{"}}, {"step": 3}]


def lines_of(content, tmp_path):
    (tmp_path / "log.jsonl").write_bytes(content)
    return read_json_lines(tmp_path / "log.jsonl", lambda line: "step" in line)


def test_lines_are_read_in_order_without_a_message(tmp_path, capsys):
    content = "".join(json.dumps(line) + "\n" for line in GOOD).encode()
    assert lines_of(content, tmp_path) == GOOD and lines_of(b"", tmp_path) == []
    assert read_json_lines(tmp_path / "none.jsonl", bool) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("damaged, kept", [
    (b'{"step": 2, "lo\n', [0, 2]),                          # cut off, as by a full disk
    (b'{"step": 2, "lo' + b'{"step": 2, "note": {"a": "{"}}\n', [0, 1, 2]),       # then continued
    (bytes(300) + b'{"step": 2, "note": {"a": "{"}}\n', [0, 1, 2]),       # after a power failure
    (bytes(300) + b"\n", [0, 2]), (b"7\n", [0, 2]), (b'{"epoch": 1}\n', [0, 2]),
    (b"\xff\xfe\n", [0, 2])])
def test_damaged_lines_are_left_out_and_counted_and_a_complete_object_at_their_end_is_kept(
        tmp_path, capsys, damaged, kept):
    first, last = (json.dumps(GOOD[k]).encode() + b"\n" for k in (0, 2))
    assert lines_of(first + damaged + last, tmp_path) == [GOOD[k] for k in kept]
    said = capsys.readouterr().out
    assert ("log.jsonl: 1 of 3 lines are damaged and are left out" in said) == (len(kept) == 2)


def test_a_folder_that_cannot_be_written_is_named_before_the_computation(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "folder", "type this")
    assert not list((tmp_path / "new" / "folder").iterdir())
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=f"{path} cannot be written .*; type this"):
            check_writable(path, "type this")

    def full(dir):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(ValueError, match="cannot be written .No space left on device.; type this"):
        check_writable(tmp_path, "type this")
