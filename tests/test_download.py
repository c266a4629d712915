"""Downloads beyond the notebook: misbehaving servers, hostile archives, full disks."""

import contextlib
import errno
import hashlib
import io
import os
import tarfile
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cadm_paper.data import DATASETS, DataError, load_split
from cadm_paper.data import download as G
from cadm_paper.data.voc import VOC_CLASSES

# ---- a scripted server


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; each answer follows one of `server.tricks` (a dict), or none."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        plan, asked = self.server.tricks.pop(0) if self.server.tricks else {}, self.headers.get("Range", "")
        self.server.asked.append((self.path, asked))
        body, first = plan.get("serve", self.server.files.get(self.path)), int(asked[6:-1] or 0)
        headers = {}
        if first and not plan.get("no_ranges"):
            first += plan.get("shift", 0)
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
            body = body[first:]
        if not plan.get("no_length"):
            headers["Content-Length"] = str(len(body) + plan.get("lie", 0))
        self.send_response(plan.get("status") or (206 if "Content-Range" in headers else 200))
        for item in headers.items():
            self.send_header(*item)
        self.end_headers()
        self.wfile.write(body[: plan.get("cut")])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.tricks, server.asked = {}, [], []
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def archive(server, body, name="a.bin", gives=("d",)):
    server.files[f"/{name}"] = body
    address = f"http://127.0.0.1:{server.server_port}/{name}"
    digest = "sha256:" + hashlib.sha256(body).hexdigest()
    return G.Archive((address,), gives, len(body), digest, "this test")


BODY = bytes(i * i % 251 for i in range(5000))
fetch = lambda a, folder, **k: G.fetch(a, folder, **{"wait": 0, "timeout": 5, **k})
names = lambda folder: sorted(p.name for p in folder.iterdir())
TRICKS = dict(
    cut=st.integers(0, 400),
    no_ranges=st.booleans(),
    shift=st.integers(-3, 3),
    status=st.sampled_from([0, 416, 429, 500, 503]),
    serve=st.binary(min_size=1, max_size=300),
    lie=st.integers(-2, 2),
    no_length=st.booleans(),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.binary(min_size=1, max_size=300),
    tricks=st.lists(st.fixed_dictionaries({}, optional=TRICKS), max_size=6),
)
def test_only_the_published_bytes_get_the_name(server, tmp_path_factory, body, tricks):
    folder = tmp_path_factory.mktemp("f")
    a, server.tricks = archive(server, body), tricks
    for _ in range(len(tricks) + 1):
        try:
            path = fetch(a, folder, tries=3)
            break
        except DataError:
            assert "a.bin" not in names(folder)
    assert path.read_bytes() == body and names(folder) == ["a.bin"]


def test_a_later_call_resumes_the_download(server, tmp_path):
    a = archive(server, BODY)
    server.tricks = [{"cut": 2000}, {"status": 503}, {"cut": 500}, {"status": 500}]
    with pytest.raises(DataError, match="HTTP Error 500.*continues where it stopped"):
        fetch(a, tmp_path, tries=4)
    assert names(tmp_path) == ["a.bin.part"]
    assert fetch(a, tmp_path).read_bytes() == BODY
    assert [asked for _, asked in server.asked] == ["", "bytes=2000-", "bytes=2000-", *["bytes=2500-"] * 2]


@pytest.mark.parametrize("trick", [dict(serve=b"<html>log in</html>"), dict(no_length=True), dict(lie=100)])
def test_another_file_does_not_replace_downloaded_bytes(server, tmp_path, trick):
    """Such as a login page, an error page or a newer version."""
    a, server.tricks = archive(server, BODY), [{"cut": 3000}, trick | {"no_ranges": True}]
    with pytest.raises(DataError, match="another file or a web page"):
        fetch(a, tmp_path)
    assert (tmp_path / "a.bin.part").read_bytes() == BODY[:3000]


def test_http_needs_a_checksum(server, tmp_path):
    with pytest.raises(DataError, match="is not https, and no checksum is published"):
        fetch(replace(archive(server, BODY), checksum=None), tmp_path)


# ---- hostile and broken archives


def tar_of(path, *entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content, *kind in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.size = (kind[0] if kind else tarfile.REGTYPE), 0 if kind else len(content)
            entry.linkname, entry.mode = content.decode("latin-1") if kind else "", 0o6755
            tar.addfile(entry, io.BytesIO(content))
    return path


def zip_of(path, *entries):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in entries:
            z.writestr(name, content)
    return path


both = pytest.mark.parametrize("make, path", [(tar_of, "s.tar"), (zip_of, "s.zip")])
NAMES = ["/evil", "../evil", "d/../../evil", "..", "d/..", "..\\evil", "\\evil", "C:\\evil", "//host/evil"]
KINDS = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]


@both
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_unpacked_outside_the_folder(tmp_path, make, path, name):
    archive = make(tmp_path / "a" / "b" / path, ("d/a", b"1"), (name, b"evil"))
    with contextlib.suppress(DataError, OSError):
        G.unpack(archive, tmp_path / "a" / "b" / "out")
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["b"]
    assert set(names(tmp_path / "a" / "b")) <= {path, "out"}


@pytest.mark.parametrize("kind", KINDS)
def test_links_and_devices_are_rejected(tmp_path, kind):
    hostile = tar_of(tmp_path / "s.tar", ("d/l", b"../../evil", kind), ("d/l/x", b"through"))
    with pytest.raises(DataError, match="s.tar: damaged, cut short or not the published archive"):
        G.unpack(hostile, tmp_path / "out")


@both
def test_archives_are_unpacked_without_their_modes_and_damaged_ones_named(tmp_path, make, path):
    whole = make(tmp_path / path, ("d/a", os.urandom(3000)), ("d/b", os.urandom(3000)))
    G.unpack(whole, tmp_path / "out")
    assert names(tmp_path / "out/d") == ["a", "b"] and not (tmp_path / "out/d/a").stat().st_mode & 0o7022
    raw = whole.read_bytes()
    for broken in (raw[:2000], raw[:100], b"", b"<html>"):
        whole.write_bytes(broken)
        with pytest.raises(DataError, match=f"{path}: damaged.*remove it"):
            G.unpack(whole, tmp_path / "out2")


# ---- data_get on a miniature VOC

IDS = {"trainval": ["000001", "000002", "000004"], "test": ["000003", "000005"]}


def voc_tar(path, split):
    lists = [
        (f"ImageSets/Main/{c}_{split}.txt", "".join(f"{i} 1\n" for i in IDS[split])) for c in VOC_CLASSES
    ]
    files = lists + [(f"JPEGImages/{i}.jpg", f"photograph {i}" * 9000) for i in IDS[split]]
    return tar_of(path, *((f"VOCdevkit/VOC2007/{name}", text.encode()) for name, text in files)).read_bytes()


@pytest.fixture
def tiny(server, tmp_path_factory, monkeypatch):
    """Publish two archives as VOC 2007; returns a call of data_get."""
    made = [
        archive(
            server,
            voc_tar(tmp_path_factory.mktemp("voc") / s, s),
            f"{s}.tar",
            (f"VOC2007/ImageSets/Main/tvmonitor_{s}.txt",),
        )
        for s in IDS
    ]
    monkeypatch.setitem(G.SOURCES, "voc2007", G.Source(tuple(made), "this test", ""))
    counts = {split: (len(ids), len(ids)) for split, ids in IDS.items()}
    monkeypatch.setitem(DATASETS, "voc2007", replace(DATASETS["voc2007"], counts=counts))
    return lambda root, **k: G.data_get(
        "voc2007", root, **{"yes": True, "quiet": True, "wait": 0, "timeout": 5, **k}
    )


def test_only_missing_archives_are_downloaded(server, tiny, tmp_path):
    root = tiny(tmp_path / "voc")
    assert [len(load_split("voc2007", root, s)) for s in IDS] == [3, 2]
    archives = root / "archives"
    assert names(archives) == [".lock", "test.tar", "trainval.tar"]
    (root / "VOC2007/ImageSets/Main/tvmonitor_test.txt").unlink()
    (archives / "test.tar").unlink()
    server.asked = []
    tiny(root)
    assert server.asked == [("/test.tar", "")] and len(names(archives)) == 3


def test_a_disk_that_is_too_small_is_reported_before_the_download(server, tiny, tmp_path, monkeypatch):
    size = sum(map(len, server.files.values()))
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / "test.tar.part").write_bytes(server.files["/test.tar"][:1000])
    monkeypatch.setattr(G.shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * size - 1001))
    with pytest.raises(DataError, match="are needed, .* are free; nothing was fetched"):
        tiny(tmp_path)
    assert server.asked == []
    monkeypatch.setattr(G.shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * size - 1000))
    tiny(tmp_path)


@pytest.mark.parametrize("stop", (2, 4, 10, 22))
def test_a_failed_move_is_incomplete_and_can_be_repeated(tiny, tmp_path, monkeypatch, stop):
    """Lists are moved last, so a list has its photographs."""
    real, moved = os.replace, []

    def full(a, b):
        moved.append(b)
        if len(moved) == stop:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(a, b)

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left on device"):
        patched.setattr(G.os, "replace", full)
        tiny(tmp_path)
    with pytest.raises(DataError):
        [load_split("voc2007", tmp_path, s) for s in IDS]
    assert [len(load_split("voc2007", tiny(tmp_path), s)) for s in IDS] == [3, 2]
