"""External files are found, checked and downloaded; a file with a wrong hash is never used. The
downloads come from a server on 127.0.0.1."""
import errno
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from vtp_min.extras import weights
from vtp_min.extras.weights import FILES, fetch, find

BYTES = bytes(range(256)) * 4096                                        # 1 MB instead of weights
DIGEST = hashlib.sha256(BYTES).hexdigest()[:8]
FILE = f"tiny-{DIGEST}.pth"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Set our folder, torch.hub's folder, and a table with one tiny file that no server offers."""
    monkeypatch.setenv("VTP_WEIGHTS", str(tmp_path / "ours"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setitem(FILES, "tiny", (1, f"file://{tmp_path}/nowhere/{FILE}"))
    monkeypatch.setattr(weights.socket, "setdefaulttimeout", lambda seconds: None)
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    return tmp_path


@pytest.fixture
def server(monkeypatch):
    """An HTTP server

    .sent      the bytes that it sends
    .requests  number of requests so far
    .breaks    True: it sends only half of the bytes
    """
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            http.requests += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(http.sent)))
            self.end_headers()
            self.wfile.write(http.sent[:len(http.sent) // 2 if http.breaks else None])

        def log_message(self, *words):
            pass

    http = HTTPServer(("127.0.0.1", 0), Answer)
    http.sent, http.requests, http.breaks = BYTES, 0, False
    monkeypatch.setitem(FILES, "tiny", (1, f"http://127.0.0.1:{http.server_port}/{FILE}"))
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield http
    http.shutdown()
    http.server_close()
    thread.join()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# ---- finding

def test_every_file_of_the_table_has_eight_digits_of_its_hash_in_its_name():
    for name in ("vgg", "alex", "squeeze", "inception"):
        file, digest = weights.entry(name)
        size, address = FILES[name]
        assert address.startswith("https://") and address.endswith(file)
        assert len(digest) == 8 and int(digest, 16) and size > 0


def test_a_missing_file_is_reported_with_size_address_folder_and_command(home):
    with pytest.raises(FileNotFoundError) as error:
        find("vgg")
    for part in ("vgg16-397923af.pth", "553 MB", FILES["vgg"][1], str(home / "ours"),
                 "python eval.py fetch vgg"):
        assert part in str(error.value)


def test_a_name_outside_the_table_is_refused_with_the_names_in_it():
    for function in (find, fetch):
        with pytest.raises(ValueError, match="vgg, alex, squeeze, inception"):
            function("resnet")


def test_a_file_is_found_in_our_folder_and_in_that_of_torch_hub_ours_first(home):
    hub = put(home / "hub" / "checkpoints" / FILE, BYTES)
    assert find("tiny") == hub
    ours = put(home / "ours" / FILE, BYTES)
    assert find("tiny") == ours


@pytest.mark.parametrize("content", [BYTES[:-1] + b"?", BYTES[:-1], b""],
                         ids=["changed", "truncated", "empty"])
def test_a_damaged_file_is_refused_and_hashed_again_once_it_is_replaced(home, content):
    path = put(home / "ours" / FILE, content)
    with pytest.raises(ValueError, match="is damaged.*fetch tiny"):
        find("tiny")
    put(path, BYTES)
    assert find("tiny") == path


def test_without_the_variable_files_are_in_the_users_cache_folder(monkeypatch):
    monkeypatch.delenv("VTP_WEIGHTS")
    assert weights.folder() == Path.home() / ".cache" / "vtp_min"


# ---- downloading

def test_a_downloaded_file_is_found_and_not_downloaded_again(home, server):
    assert fetch("tiny") == home / "ours" / FILE == find("tiny") == fetch("tiny")
    assert find("tiny").read_bytes() == BYTES and server.requests == 1
    assert [path.name for path in (home / "ours").iterdir()] == [FILE]        # no temporary file


def test_half_a_download_is_not_kept_and_the_same_command_downloads_again(home, server):
    server.breaks = True
    with pytest.raises(SystemExit, match="could not be downloaded"):
        fetch("tiny")
    assert list((home / "ours").iterdir()) == []
    server.breaks = False
    assert fetch("tiny").read_bytes() == BYTES


def test_a_file_with_another_hash_is_not_kept(home, server):
    server.sent = BYTES[::-1]
    with pytest.raises(SystemExit, match="could not be downloaded.*hash"):
        fetch("tiny")
    assert list((home / "ours").iterdir()) == []


def test_fetch_replaces_a_damaged_file(home, server):
    put(home / "ours" / FILE, b"half a file")
    assert fetch("tiny").read_bytes() == BYTES


def test_without_a_network_fetch_prints_all_addresses_and_the_folder(home):
    with pytest.raises(SystemExit) as error:
        fetch("tiny")
    for part in (str(home / "ours"), DIGEST, "VTP_WEIGHTS", "https_proxy"):
        assert part in str(error.value)
    assert all(address in str(error.value) for _, address in FILES.values())


def test_a_proxy_that_does_not_answer_is_reported_without_its_password(home, monkeypatch):
    monkeypatch.setitem(FILES, "tiny", (1, f"http://example.invalid/{FILE}"))
    monkeypatch.setenv("http_proxy", "http://student:secret@127.0.0.1:9")
    with pytest.raises(SystemExit, match="could not be downloaded") as error:
        fetch("tiny")
    assert "secret" not in str(error.value)


def test_only_rank_0_downloads_and_the_others_wait_for_it(home, server, monkeypatch):
    monkeypatch.setattr(weights, "rank", lambda: 1)
    monkeypatch.setattr(weights, "barrier", lambda: put(home / "ours" / FILE, BYTES))
    assert fetch("tiny").read_bytes() == BYTES and server.requests == 0


def test_a_folder_that_cannot_be_written_is_reported_without_a_traceback(home, server):
    put(home / "ours", b"a file in place of the folder")
    with pytest.raises(SystemExit, match="could not be downloaded into .*ours.*VTP_WEIGHTS"):
        fetch("tiny")
    assert server.requests == 0


def test_a_full_disk_is_reported_with_the_variable_for_another_folder(home, monkeypatch):
    def full(*args, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(torch.hub, "download_url_to_file", full)
    with pytest.raises(SystemExit, match="No space left on device.*VTP_WEIGHTS=FOLDER"):
        fetch("tiny")


# ---- the heads of LPIPS

def test_the_heads_of_lpips_come_with_its_package_and_are_those_of_vtp(monkeypatch):
    md5 = hashlib.md5(weights.heads("vgg").read_bytes()).hexdigest()
    assert md5 == "d507d7349b931f0638a25a48a722f98a"                     # in VTP's own evaluation
    assert all(weights.heads(name).exists() for name in ("alex", "squeeze"))
    monkeypatch.setitem(weights.HEADS, "vgg", "0" * 64)
    with pytest.raises(ValueError, match="pip install --force-reinstall lpips==0.1.4"):
        weights.heads("vgg")
