"""External files are found, checked, and fetched; a broken download goes on, a wrong file is never used. All on 127.0.0.1."""
import errno
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from vtp_min import weights
from vtp_min.weights import FILES, fetch, find

BYTES = bytes(range(256)) * 4096                                        # 1 MB stands for the weights
DIGEST = hashlib.sha256(BYTES).hexdigest()[:8]
FILE = f"tiny-{DIGEST}.pth"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Our folder, torch.hub's folder, and a table with one tiny file nobody serves."""
    monkeypatch.setenv("VTP_WEIGHTS", str(tmp_path / "ours"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setitem(FILES, "tiny", (1, f"file://{tmp_path}/nowhere/{FILE}"))
    monkeypatch.delenv("RANK", raising=False)
    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    return tmp_path


@pytest.fixture
def server(monkeypatch):
    """A small web server that knows Range. .sent = the bytes it would send, .asked = the Range headers seen, .breaks = stop half-way."""
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers["Range"]
            http.asked.append(asked)
            first = int(asked[6:-1]) if asked and http.ranges else 0
            if first >= len(http.sent):
                return self.send_error(416)
            self.send_response(206 if asked and http.ranges else 200)
            self.send_header("Content-Length", str(len(http.sent) - first))
            self.end_headers()
            self.wfile.write(http.sent[first:len(http.sent) // 2 if http.breaks else None])

        def log_message(self, *words):
            pass

    http = HTTPServer(("127.0.0.1", 0), Answer)
    http.sent, http.asked, http.breaks, http.ranges = BYTES, [], False, True
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


def test_every_file_of_the_table_carries_eight_digits_of_its_hash_in_its_name():
    for name in ("vgg", "alex", "squeeze", "inception"):
        file, digest, size, address = weights.entry(name)
        assert address.startswith("https://") and address.endswith(file) and len(digest) == 8 and int(digest, 16) and size > 0


def test_a_missing_file_is_said_with_size_address_folder_and_what_to_type(home):
    with pytest.raises(FileNotFoundError) as error:
        find("vgg")
    for part in ("vgg16-397923af.pth", "553 MB", FILES["vgg"][1], str(home / "ours"), "python eval.py fetch vgg"):
        assert part in str(error.value)


def test_a_name_outside_the_table_is_refused_with_the_names_in_it():
    with pytest.raises(ValueError, match="vgg, alex, squeeze, inception.*squeezenet"):
        find("resnet")


def test_a_whole_file_is_found_in_our_folder_and_in_that_of_torch_hub_ours_first(home):
    hub = put(home / "hub" / "checkpoints" / FILE, BYTES)
    assert find("tiny") == hub
    ours = put(home / "ours" / FILE, BYTES)
    assert find("tiny") == ours


def test_a_damaged_file_is_refused_and_hashed_anew_once_it_is_replaced(home):
    path = put(home / "ours" / FILE, BYTES[:-1] + b"?")
    with pytest.raises(ValueError, match="is damaged.*fetch tiny"):
        find("tiny")
    put(path, BYTES)
    assert find("tiny") == path


def test_a_file_that_nobody_offers_says_what_it_is_and_where_to_put_it_and_is_not_sought_on_the_net(home, server):
    for seek, error in ((find, FileNotFoundError), (fetch, SystemExit)):
        with pytest.raises(error, match="squeezenet_v10.npz is missing, and no address offers it ready made") as told:
            seek("squeezenet")
        assert all(part in str(told.value) for part in ("songhan/SqueezeNet-Deep-Compression", "BSD 2-clause", weights.BY_HAND["squeezenet"][1], str(home / "ours")))
    put(home / "ours" / "squeezenet_v10.npz", BYTES)
    for seek, error in ((find, ValueError), (fetch, SystemExit)):
        with pytest.raises(error, match="is damaged: its sha256 begins .*, not 1e67ccb7; copy it anew"):
            seek("squeezenet")
    assert server.asked == []


def test_without_the_variable_files_live_in_the_users_cache(monkeypatch):
    monkeypatch.delenv("VTP_WEIGHTS")
    assert weights.folder() == Path.home() / ".cache" / "vtp_min"


def test_what_is_fetched_is_found_and_not_fetched_again(home, server):
    assert fetch("tiny") == home / "ours" / FILE == find("tiny") == fetch("tiny")
    assert find("tiny").read_bytes() == BYTES and server.asked == [None]
    assert [path.name for path in (home / "ours").iterdir()] == [FILE]             # no .part stays behind


def test_a_broken_download_goes_on_where_it_stopped(home, server):
    server.breaks = True
    with pytest.raises(SystemExit, match=f"ended after {len(BYTES) // 2} of {len(BYTES)} bytes|IncompleteRead"):
        fetch("tiny")
    server.breaks = False
    assert fetch("tiny").read_bytes() == BYTES
    assert server.asked == [None, f"bytes={len(BYTES) // 2}-"]


def test_a_server_that_knows_no_ranges_sends_the_whole_file_again(home, server):
    put(home / "ours" / (FILE + ".part"), BYTES[:1000])
    server.ranges = False
    assert fetch("tiny").read_bytes() == BYTES


def test_a_part_that_is_already_whole_only_takes_its_name(home, server):
    put(home / "ours" / (FILE + ".part"), BYTES)
    assert fetch("tiny").read_bytes() == BYTES


def test_a_file_with_another_hash_is_thrown_away(home, server):
    server.sent = BYTES[::-1]
    with pytest.raises(SystemExit, match="thrown away"):
        fetch("tiny")
    assert list((home / "ours").iterdir()) == []


def test_fetch_replaces_a_damaged_file(home, server):
    put(home / "ours" / FILE, b"half a file")
    assert fetch("tiny").read_bytes() == BYTES


def test_without_a_network_fetch_lists_all_addresses_hashes_and_the_folder(home):
    with pytest.raises(SystemExit) as error:
        fetch("tiny")
    assert str(home / "ours") in str(error.value) and DIGEST in str(error.value)
    assert all(address in str(error.value) for _, address in FILES.values())


def test_only_rank_0_downloads(home, server, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert fetch("tiny") is None and server.asked == [] and not (home / "ours").exists()


def test_the_heads_of_lpips_come_with_its_package_and_are_the_ones_vtp_asks_for(monkeypatch):
    assert hashlib.md5(weights.heads("vgg").read_bytes()).hexdigest() == "d507d7349b931f0638a25a48a722f98a"        # the hash in VTP's own evaluation
    assert all(weights.heads(name).exists() for name in ("alex", "squeeze"))
    monkeypatch.setitem(weights.HEADS, "vgg", "0" * 64)
    with pytest.raises(ValueError, match="pip install --force-reinstall lpips==0.1.4"):
        weights.heads("vgg")


def test_a_folder_that_cannot_be_written_is_said_in_a_sentence(home, server):
    put(home / "ours", b"a file where the folder should be")
    with pytest.raises(SystemExit, match="cannot be written.*VTP_WEIGHTS"):
        fetch("tiny")
    assert server.asked == []


def test_a_disk_without_room_is_said_before_anything_is_sent(home, server, monkeypatch):
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(SystemExit, match="needs about 1 MB, and the disk of .* has 0 MB left"):
        fetch("tiny")
    assert server.asked == []


def test_a_disk_that_fills_up_keeps_what_came(home, server, monkeypatch):
    def full(address, part):
        part.write_bytes(BYTES[:5])
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(weights, "download", full)
    with pytest.raises(SystemExit, match="is full.*the same command"):
        fetch("tiny")
    assert (home / "ours" / (FILE + ".part")).read_bytes() == BYTES[:5]


def test_a_proxy_that_does_not_answer_is_named_without_its_password(home, monkeypatch):
    monkeypatch.setitem(FILES, "tiny", (1, f"http://example.invalid/{FILE}"))
    monkeypatch.setenv("http_proxy", "http://student:secret@127.0.0.1:9")
    with pytest.raises(SystemExit, match="through the proxy http: 127.0.0.1:9") as error:
        fetch("tiny")
    assert "secret" not in str(error.value)
