"""Getting data: what a notebook cell cannot show: servers that misbehave in every order, hostile archives, full disks, killed and competing processes."""

import hashlib
import io
import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cadm_paper.data import DataError, load_split
from cadm_paper.data import download as G
from cadm_paper.data.voc import VOC_CLASSES

# ---------------------------------------------------------------- a server that does what it is told


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; before each answer one of `server.tricks` is taken (a dict), or none."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        plan = self.server.tricks.pop(0) if self.server.tricks else {}
        if "serve" in plan:
            self.server.files[self.path] = plan["serve"]
        body, asked = self.server.files.get(self.path), self.headers.get("Range")
        self.server.asked.append((self.command, self.path, asked))
        status = plan.get("status") or (404 if body is None else 200)
        if status >= 400:
            return self.answer(status, b"no")
        tag = plan.get("tag", f'"{hashlib.md5(body).hexdigest()}"')
        first = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        same = self.headers.get("If-Range", tag) == tag or plan.get("no_if_range")
        extra = {} if plan.get("no_tag") else {"ETag": tag}
        if asked and same and not plan.get("no_ranges"):
            if first >= len(body):
                return self.answer(416, b"", **{"Content-Range": f"bytes */{len(body)}"})
            begin = first + plan.get("shift", 0)
            self.answer(
                206,
                body[begin:],
                plan,
                **extra,
                **{"Content-Range": f"bytes {begin}-{len(body) - 1}/{len(body)}"},
            )
        else:
            self.answer(200, body, plan, **extra)

    def answer(self, status, body, plan=None, **headers):
        if plan is None:
            plan = {}
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Type", plan.get("type", "application/octet-stream"))
        if plan.get("no_length"):
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body) + plan.get("lie", 0)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: plan.get("cut")])
            self.wfile.flush()
            time.sleep(plan.get("hang", 0))
        if plan:
            self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def running():
    os.environ["no_proxy"] = "127.0.0.1"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.base = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(running):
    running.files, running.tricks, running.asked = {}, [], []
    return running


def archive(server, body, *, name="a.bin", checksum=True, size=True, **more):
    server.files[f"/{name}"] = body
    return G.Archive(
        name,
        (f"{server.base}/{name}",),
        more.pop("gives", ("d",)),
        more.pop("room", 10**7),
        len(body) if size else None,
        "sha256:" + hashlib.sha256(body).hexdigest() if checksum else None,
        "this test" if checksum else "",
        **more,
    )


BODY = bytes(i * i % 251 for i in range(5000))
fetch = lambda a, folder, **k: G.fetch(a, folder, **{"wait": 0, "timeout": 5, **k})


def names(folder):
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


# ---------------------------------------------------------------- fetching

TRICK = st.fixed_dictionaries(
    {},
    optional={
        "cut": st.integers(0, 400),
        "no_ranges": st.booleans(),
        "no_tag": st.booleans(),
        "no_if_range": st.booleans(),
        "shift": st.integers(-3, 3),
        "status": st.sampled_from([0, 416, 429, 500, 503]),
        "serve": st.binary(min_size=1, max_size=300),
        "lie": st.integers(-2, 2),
        "no_length": st.booleans(),
    },
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(min_size=1, max_size=300), tricks=st.lists(TRICK, max_size=6))
def test_whatever_the_server_does_only_the_published_bytes_get_the_name(
    server, tmp_path_factory, body, tricks
):
    folder = tmp_path_factory.mktemp("f")
    a = archive(server, body)
    server.tricks = [*tricks, {"serve": body}]  # at last it serves the right file again
    try:
        path = fetch(a, folder, tries=3)
    except G.GetError:
        assert "a.bin" not in names(folder)
        server.tricks = []
        server.files["/a.bin"] = body
        path = fetch(a, folder)  # whatever is left behind does no harm
    assert path.read_bytes() == body and names(folder) == ["a.bin", "a.bin.json"]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.sampled_from([60, 61, 90]), min_size=3, max_size=3),
    how=st.lists(
        st.fixed_dictionaries(
            {
                "cut": st.integers(1, 59),
                "no_if_range": st.booleans(),
                "no_tag": st.booleans(),
                "shift": st.integers(-1, 1),
            }
        ),
        min_size=3,
        max_size=3,
    ),
)
def test_without_a_checksum_versions_of_a_file_are_never_joined(server, tmp_path_factory, lengths, how):
    """Tag, range and length alone must do: what gets the name is one of the versions that were served, whole."""
    folder = tmp_path_factory.mktemp("f")
    versions = [bytes((n + 1) * i * i % 251 for i in range(length)) for n, length in enumerate(lengths)]
    a = archive(server, versions[0], checksum=False, size=False)
    server.tricks = [{"serve": v, **h} for v, h in zip(versions, how)]
    assert fetch(a, folder).read_bytes() in versions


def test_a_server_that_sends_another_range_than_the_one_asked_for_is_asked_again(server, tmp_path):
    a = archive(server, BODY, checksum=False, size=False)
    server.tricks = [{"cut": 2000}, {"shift": 1}]
    assert fetch(a, tmp_path).read_bytes() == BODY


def test_a_server_without_tags_and_dates_is_asked_from_the_start(server, tmp_path):
    a = archive(server, BODY, checksum=False, size=False)
    server.tricks = [
        {"serve": BODY[::-1], "cut": 2000, "no_tag": True},
        {"serve": BODY, "no_tag": True, "no_if_range": True},
    ]
    assert fetch(a, tmp_path).read_bytes() == BODY
    assert [r for _, _, r in server.asked] == [None, None]


def test_a_server_whose_tags_do_not_tell_files_apart_is_found_out_by_the_checksum(server, tmp_path):
    """The joined bytes are thrown away and the file is fetched once more, in one piece."""
    a = archive(server, BODY)
    server.tricks = [{"serve": BODY[::-1], "cut": 3000, "tag": '"x"'}, {"serve": BODY, "tag": '"x"'}]
    assert fetch(a, tmp_path).read_bytes() == BODY
    assert [r for _, _, r in server.asked] == [None, "bytes=3000-", None]


def test_a_broken_download_goes_on_where_it_stopped(server, tmp_path):
    a = archive(server, BODY)
    server.tricks = [{"cut": 2000}, {"status": 503}, {"cut": 500}]
    assert fetch(a, tmp_path).read_bytes() == BODY
    assert [r for _, _, r in server.asked] == [None, "bytes=2000-", "bytes=2000-", "bytes=2500-"]


def test_it_goes_on_in_another_process_days_later(server, tmp_path):
    a = archive(server, BODY)
    server.tricks = [{"cut": 3000}] + [{"status": 500}] * 2
    with pytest.raises(G.GetError, match="HTTP status 500"):
        fetch(a, tmp_path, tries=2)
    assert names(tmp_path) == ["a.bin.part", "a.bin.part.json"]
    steps = G.plan(G.Source((a,), ""), tmp_path.parent)
    assert (
        G.Step(a, "begun", 3000, 5000).left == 2000 and steps[0].state == "to fetch"
    )  # another folder: nothing begun
    server.asked = []
    fetch(a, tmp_path)
    assert server.asked == [("GET", "/a.bin", "bytes=3000-")]


def test_a_server_that_ignores_ranges_is_asked_from_the_start(server, tmp_path):
    a = archive(server, BODY)
    server.tricks = [{"cut": 3000}, {"no_ranges": True, "cut": 4000}, {"no_ranges": True}]
    assert fetch(a, tmp_path).read_bytes() == BODY


def test_a_file_that_changes_between_two_ranges_is_fetched_anew(server, tmp_path):
    other = bytes(reversed(BODY))
    for no_if_range in (False, True):
        a = archive(server, other, name=f"{no_if_range}.bin")
        server.tricks = [{"serve": BODY, "cut": 3000}, {"serve": other, "no_if_range": no_if_range}]
        assert fetch(a, tmp_path).read_bytes() == other


def test_wrong_bytes_and_wrong_lengths_are_named_and_leave_nothing(server, tmp_path):
    a = archive(server, BODY)
    server.files["/a.bin"] = bytes(5000)
    with pytest.raises(G.GetError, match="sha256:.* not sha256:.*this test") as error:
        fetch(a, tmp_path)
    for what in (a.addresses[0], "5000 bytes", a.checksum, str(tmp_path / "a.bin")):
        assert what in str(error.value)
    assert names(tmp_path) == [] and len(server.asked) == 1  # in one piece: not asked for twice
    server.files["/a.bin"] = bytes(4000)
    with pytest.raises(G.GetError, match="announces 4000 bytes, but 5000 are published"):
        fetch(a, tmp_path)
    server.tricks = [{"lie": 100}] * 9
    server.files["/a.bin"] = BODY
    with pytest.raises(G.GetError, match="announces 5100"):
        fetch(a, tmp_path)
    assert "a.bin" not in names(tmp_path)


def test_an_answer_that_promises_more_than_it_sends_is_not_whole(server, tmp_path):
    a = archive(server, BODY, checksum=False, size=False)
    server.tricks = [{"lie": 100} for _ in range(20)]
    with pytest.raises(G.GetError, match="of 5100 bytes|changed between|416"):
        fetch(a, tmp_path, tries=3)
    assert "a.bin" not in names(tmp_path)


def test_a_web_page_instead_of_an_archive_does_not_cost_what_came(server, tmp_path):
    """A hotel's login page, or a "page not found" with status 200."""
    a = archive(server, BODY)
    server.tricks = [{"cut": 3000}, {"serve": b"<html>log in</html>", "type": "text/html", "no_length": True}]
    with pytest.raises(G.GetError, match="a web page"):
        fetch(a, tmp_path)
    assert (tmp_path / "a.bin.part").read_bytes() == BODY[:3000]


def test_not_found_is_not_asked_twice_and_the_next_address_is_tried(server, tmp_path):
    a = archive(server, BODY)
    b = G.Archive(
        "a.bin", (f"{server.base}/none", *a.addresses), a.gives, a.room, a.size, a.checksum, a.published
    )
    assert fetch(b, tmp_path).read_bytes() == BODY
    assert [p for _, p, _ in server.asked] == ["/none", "/a.bin"]
    assert json.loads((tmp_path / "a.bin.json").read_text())["address"] == a.addresses[0]


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/a.bin", "http://no-such-host.invalid/a.bin"])
def test_unreachable_hosts_give_one_error_that_says_what_to_do_by_hand(tmp_path, address):
    a = G.Archive("a.bin", (address,), ("d",), 10, 5, "md5:" + "0" * 32, "somewhere")
    with pytest.raises(G.GetError) as error:
        fetch(a, tmp_path, tries=1)
    for what in (address, "by hand", "5 bytes", "md5:000", str(tmp_path / "a.bin")):
        assert what in str(error.value)


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://127.0.0.1/a", "/etc/passwd"])
def test_only_http_is_fetched(tmp_path, address):
    with pytest.raises(G.GetError, match="only http"):
        fetch(G.Archive("a.bin", (address,), ("d",), 10), tmp_path)


def test_an_archive_put_there_by_hand_is_checked_and_recorded(server, tmp_path):
    a = archive(server, BODY)
    (tmp_path / "a.bin").write_bytes(BODY)
    fetch(a, tmp_path)
    assert (
        server.asked == []
        and json.loads((tmp_path / "a.bin.json").read_text())["address"] == "put there by hand"
    )
    (tmp_path / "a.bin").write_bytes(BODY[:-1] + b"?")
    with pytest.raises(G.GetError, match="remove this file"):
        fetch(a, tmp_path)
    assert (tmp_path / "a.bin").exists()  # what a user put there is never removed


def test_without_a_published_checksum_the_first_download_is_recorded_and_holds(server, tmp_path):
    a = archive(server, BODY, checksum=False, size=False)
    fetch(a, tmp_path)
    record = json.loads((tmp_path / "a.bin.json").read_text())
    assert (
        record["checksum"] == "sha256:" + hashlib.sha256(BODY).hexdigest()
        and record["published"] is None
        and record["bytes"] == 5000
    )
    (tmp_path / "a.bin").write_bytes(BODY[::-1])
    with pytest.raises(G.GetError, match="recorded at the first download"):
        fetch(a, tmp_path)


# ---------------------------------------------------------------- hostile and broken archives


def tar_of(path, *entries):
    with tarfile.open(path, "w") as tar:
        for name, content, *kind in entries:
            entry = tarfile.TarInfo(name)
            entry.type, entry.size = (kind[0] if kind else tarfile.REGTYPE), 0 if kind else len(content)
            entry.linkname = content.decode() if kind else ""
            tar.addfile(entry, io.BytesIO(content))
    return path


def zip_of(path, *entries):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content, *mode in entries:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (mode[0] if mode else stat.S_IFREG | 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            z.writestr(entry, content)
    return path


GOOD = [("d/a", b"1"), ("d/b/c", b"22")]
HOSTILE_NAMES = [
    "/evil",
    "../evil",
    "d/../../evil",
    "..",
    "d/..",
    "..\\evil",
    "d\\..\\..\\evil",
    "\\evil",
    "C:\\evil",
    "C:evil",
    "//host/evil",
    "d/evil\x07",
    "",
]
unpack = lambda path, out, **k: G.unpack(
    path, G.Archive(path.name, (), ("d",), k.pop("room", 1000), **k), out
)


def untouched(tmp_path):
    return names(tmp_path) in (["s.tar"], ["s.zip"])


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_a_plain_archive_is_unpacked_without_owners_or_modes(tmp_path, make):
    path = make(tmp_path / f"s.{make.__name__[:3]}", *GOOD)
    assert unpack(path, tmp_path / "out") == 2
    assert (tmp_path / "out/d/b/c").read_bytes() == b"22"
    assert not (tmp_path / "out/d/a").stat().st_mode & 0o7111


@pytest.mark.parametrize("make", [tar_of, zip_of])
@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_that_leave_the_folder_are_refused_before_anything_is_written(tmp_path, make, name):
    path = make(tmp_path / f"s.{make.__name__[:3]}", *GOOD, (name, b"evil"))
    with pytest.raises(G.GetError, match="nothing was unpacked"):
        unpack(path, tmp_path / "out")
    assert untouched(tmp_path) and not (tmp_path.parent / "evil").exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
@pytest.mark.parametrize("target", [b"/etc/passwd", b"../../evil", b"d/a"])
def test_links_and_devices_in_tar_files_are_refused(tmp_path, kind, target):
    path = tar_of(tmp_path / "s.tar", *GOOD, ("d/link", target, kind), ("d/link/x", b"through"))
    with pytest.raises(G.GetError, match="no plain file"):
        unpack(path, tmp_path / "out")
    assert untouched(tmp_path)


@pytest.mark.parametrize("mode", [stat.S_IFLNK | 0o777, stat.S_IFCHR | 0o644, stat.S_IFIFO | 0o644])
def test_links_and_devices_in_zip_files_are_refused(tmp_path, mode):
    with pytest.raises(G.GetError, match="no plain file"):
        unpack(zip_of(tmp_path / "s.zip", *GOOD, ("d/link", b"/etc/passwd", mode)), tmp_path / "out")
    assert untouched(tmp_path)


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_more_bytes_than_an_archive_can_hold_are_refused(tmp_path, make):
    path = make(tmp_path / f"s.{make.__name__[:3]}", ("d/zeros", bytes(100_000)))
    with pytest.raises(G.GetError, match="unpacks to 100.0 kB, more than the 1.0 kB"):
        unpack(path, tmp_path / "out")
    assert untouched(tmp_path)


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_more_bytes_than_the_disk_has_are_refused_before_anything_is_written(tmp_path, make, monkeypatch):
    path = make(tmp_path / f"s.{make.__name__[:3]}", *[(f"d/{i}", bytes(1000)) for i in range(3)])
    real = G.shutil.disk_usage
    monkeypatch.setattr(G.shutil, "disk_usage", lambda where: real(where)._replace(free=2999))
    with pytest.raises(G.GetError, match="Make room"):
        unpack(path, tmp_path / "out", room=10**18)
    assert untouched(tmp_path)


def test_a_zip_file_that_lies_about_its_sizes_gives_no_more_than_it_declares(tmp_path):
    path = zip_of(tmp_path / "s.zip", ("d/zeros", bytes(100_000)))
    raw = path.read_bytes()
    path.write_bytes(raw.replace((100_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(G.GetError, match="damaged"):
        unpack(path, tmp_path / "out")
    assert sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file()) <= 10


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_damaged_archives_give_one_error_that_names_the_file(tmp_path, make):
    path = make(tmp_path / f"s.{make.__name__[:3]}", ("d/a", os.urandom(3000)), ("d/b", os.urandom(3000)))
    whole = path.read_bytes()
    for n, broken in enumerate(
        (
            whole[:4000],
            whole[:100],
            b"",
            b"<html>",
            whole[:1500] + b"\0" * 60 + whole[1560:] if make is zip_of else whole[:4000],
        )
    ):
        path.write_bytes(broken)
        with pytest.raises(G.GetError, match="remove it") as error:
            unpack(path, tmp_path / f"out{n}", room=10**5)
        assert str(path) in str(error.value)


@pytest.mark.parametrize("make", [tar_of, zip_of])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_stand_twice_and_archives_of_something_else(tmp_path, make):
    path = make(tmp_path / f"s.{make.__name__[:3]}", ("d/a", b"1"), ("d/./a", b"2"))
    with pytest.raises(G.GetError, match="stands there twice"):
        unpack(path, tmp_path / "out")
    with pytest.raises(G.GetError, match="holds no d"):
        unpack(make(path, ("else/a", b"1")), tmp_path / "out2")
    with pytest.raises(G.GetError):
        unpack(
            make(path, ("d/a", b"1"), ("d/a/b", b"2")), tmp_path / "out3"
        )  # a file and a folder of one name


def test_an_encrypted_zip_file_is_refused(tmp_path):
    path = zip_of(tmp_path / "s.zip", *GOOD)
    raw = bytearray(path.read_bytes())
    for mark, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        raw[raw.index(mark) + at] |= 1
    path.write_bytes(raw)
    with pytest.raises(G.GetError, match="encrypted"):
        unpack(path, tmp_path / "out")


# ---------------------------------------------------------------- all of it, on a VOC in miniature


def voc_tar(split, ids, wrong=""):
    files = [
        (
            f"VOCdevkit/VOC2007/ImageSets/Main/{c}_{split}.txt",
            "".join(f"{i} {1 if (int(i) + n) % 3 else -1}\n" for i in ids).encode(),
        )
        for n, c in enumerate(VOC_CLASSES)
    ]
    files += [(f"VOCdevkit/VOC2007/JPEGImages/{i}.jpg", f"photograph {i}{wrong}".encode() * 40) for i in ids]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


IDS = {"trainval": ["000001", "000002", "000004"], "test": ["000003", "000005"]}


def tiny(server, counts=((3, 3), (2, 2)), **more):
    made = [
        archive(
            server,
            voc_tar(split, ids, **more),
            name=f"VOC{split}.tar",
            gives=(f"VOC2007/ImageSets/Main/tvmonitor_{split}.txt",),
            strip="VOCdevkit/",
        )
        for split, ids in IDS.items()
    ]
    return G.Source(tuple(made), "this test", counts=dict(zip(IDS, counts)))


def get(root, source, **k):
    return G.data_get(
        "voc2007", root, **{"yes": True, "quiet": True, "source": source, "wait": 0, "timeout": 5, **k}
    )


def test_two_archives_become_one_data_set_that_the_reader_reads(server, tmp_path, capsys):
    root = get(tmp_path / "voc", tiny(server))
    assert [len(load_split("voc2007", root, s)) for s in IDS] == [3, 2]
    assert names(root) == [".cadm-index", "VOC2007", "archives"] and names(root / "archives") == [
        ".lock",
        "VOCtest.tar",
        "VOCtest.tar.json",
        "VOCtrainval.tar",
        "VOCtrainval.tar.json",
    ]
    said = capsys.readouterr().out
    assert "To fetch" in said and "test: 2 images, 2 with labels, 2 photographs are there" in said
    server.asked = []
    get(root, tiny(server), yes=False)
    assert server.asked == []


def test_one_of_two_archives_that_is_there_is_not_fetched_again(server, tmp_path):
    source = tiny(server)
    get(tmp_path, G.Source(source.archives[:1], "", counts={"trainval": (3, 3)}), keep=False)
    assert "VOCtrainval.tar" not in names(tmp_path / "archives")
    server.asked = []
    get(tmp_path, source)
    assert {p for _, p, _ in server.asked} == {"/VOCtest.tar"} and len(
        load_split("voc2007", tmp_path, "test")
    ) == 2


def test_a_mirror_serves_the_same_archives_under_the_same_checks(server, tmp_path):
    source = tiny(server)
    away = G.Source(
        tuple(
            G.Archive(
                a.name,
                ("http://no-such-host.invalid/x",),
                a.gives,
                a.room,
                a.size,
                a.checksum,
                a.published,
                a.strip,
            )
            for a in source.archives
        ),
        "",
        counts=source.counts,
    )
    assert get(tmp_path, away, mirror=server.base + "/") == tmp_path


def test_nothing_is_fetched_without_consent_and_a_dry_run_touches_nothing(
    server, tmp_path, monkeypatch, capsys
):
    source = tiny(server)
    G.data_get("voc2007", tmp_path / "voc", source=source, dry_run=True)
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(G.GetError, match="--yes"):
        G.data_get("voc2007", tmp_path / "voc", source=source)
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", lambda question: "n")
    with pytest.raises(G.GetError, match="nothing was fetched"):
        G.data_get("voc2007", tmp_path / "voc", source=source)
    assert server.asked == [] and not (tmp_path / "voc").exists()
    monkeypatch.setattr("builtins.input", lambda question: "y")
    G.data_get("voc2007", tmp_path / "voc", source=source, quiet=True)


def test_a_size_that_is_not_published_is_asked_of_the_server(server, tmp_path, capsys):
    a = archive(server, BODY, checksum=False, size=False)
    G.data_get("voc2007", tmp_path, source=G.Source((a,), "this test"), dry_run=True)
    assert "5.0 kB" in capsys.readouterr().out and server.asked == [("HEAD", "/a.bin", None)]


def test_wrong_counts_and_missing_photographs_are_named(server, tmp_path):
    with pytest.raises(DataError, match="test: 2 images, 2 with labels; published are 9 and 9"):
        get(tmp_path / "a", tiny(server, counts=((3, 3), (9, 9))))
    root = get(tmp_path / "b", tiny(server))
    (root / "VOC2007/JPEGImages/000005.jpg").unlink()
    with pytest.raises(DataError, match="000005"):
        get(root, tiny(server))


def test_files_of_the_users_are_never_overwritten(server, tmp_path):
    mine = tmp_path / "VOC2007/JPEGImages/000003.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(G.GetError, match="JPEGImages/000003.jpg differ"):
        get(tmp_path, tiny(server))
    assert mine.read_bytes() == b"mine"


def test_a_failure_while_moving_into_place_never_looks_finished_and_is_made_good(
    server, tmp_path, monkeypatch
):
    """The move is stopped after every possible number of renamings; lists come last, so a list that is there has its photographs."""
    real, source, total = os.rename, tiny(server), 0
    get(tmp_path / "whole", source)
    for stop in range(1, 40):
        root, done = tmp_path / str(stop), []
        get(
            root, G.Source(source.archives[:1], "", counts={"trainval": (3, 3)})
        )  # VOC2007/ is there: the second archive moves file by file

        def rename(a, b):
            if len(done) == stop:
                raise KeyboardInterrupt
            done.append(b)
            real(a, b)

        monkeypatch.setattr(G.os, "rename", rename)
        try:
            get(root, source)
            break  # it took fewer renamings than that
        except KeyboardInterrupt:
            total += 1
            with pytest.raises(DataError):
                load_split("voc2007", root, "test")
        finally:
            monkeypatch.setattr(G.os, "rename", real)
        get(root, source)
        assert len(load_split("voc2007", root, "test")) == 2
    assert total > 20


def test_nus_wide_without_photographs_is_counted_and_says_how_to_ask(server, tmp_path, capsys):
    concepts, ids = (
        ["cat", "sea"],
        {"Train": ["a\\1_1.jpg", "b\\2_2.jpg", "a\\3_3.jpg"], "Test": ["b\\4_4.jpg"]},
    )
    make = lambda name, *entries: archive(
        server,
        zip_of(tmp_path / name, *entries).read_bytes(),
        name=name,
        checksum=False,
        size=False,
        folder=name[:-4],
        gives=tuple(
            f"{name[:-4]}/{g}"
            for g in {
                "ConceptsList.zip": ["Concepts81.txt"],
                "Groundtruth.zip": ["TrainTestLabels"],
                "ImageList.zip": ["TrainImagelist.txt"],
            }[name]
        ),
    )
    source = G.Source(
        (
            make("ConceptsList.zip", ("Concepts81.txt", "\n".join(concepts).encode())),
            make(
                "Groundtruth.zip",
                *[
                    (f"TrainTestLabels/Labels_{c}_{s}.txt", b"1\r\n" * len(i))
                    for c in concepts
                    for s, i in ids.items()
                ],
            ),
            make(
                "ImageList.zip",
                *[(f"ImageList/{s}Imagelist.txt", "\r\n".join(i).encode()) for s, i in ids.items()],
                ("__MACOSX/x", b""),
            ),
        ),
        G.NUS_PAGE,
        G.NUS_NOTE,
        photographs=False,
        counts={"train": (3, 3), "test": (1, 1)},
    )
    G.data_get("nuswide", tmp_path / "nus", yes=True, quiet=True, source=source)
    said = capsys.readouterr().out
    assert (
        "train: 3 images, 3 with labels, 0 photographs are there" in said
        and "Agreement and Disclaimer Form" in said
    )
    assert len(load_split("nuswide", tmp_path / "nus", "train", missing="drop").missing) == 3


# ---------------------------------------------------------------- disks and processes

PROGRAM = """
import json, sys
from cadm_paper.data import download as G
task = json.loads(sys.argv[1])
if "limit" in task:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (task["limit"], task["limit"]))
source = G.Source(tuple(G.Archive(**{**a, "addresses": tuple(a["addresses"]), "gives": tuple(a["gives"])}) for a in task["archives"]), "", counts={k: tuple(v) for k, v in task["counts"].items()})
try:
    G.data_get("voc2007", task["root"], yes=True, quiet=True, keep=task.get("keep", True), source=source, wait=0, timeout=20)
except G.GetError as error:
    sys.exit(f"GetError: {error}")
"""


def process(source, root, **more):
    from dataclasses import asdict

    task = dict(root=str(root), archives=[asdict(a) for a in source.archives], counts=source.counts, **more)
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps(task)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "no_proxy": "127.0.0.1"},
    )


@pytest.mark.parametrize("limit, where", [(5_000, "VOCtrainval.tar.part"), (60_000, "")])
def test_a_full_disk_leaves_nothing_that_looks_finished(server, tmp_path, limit, where):
    """The size of files is limited as the disk's would be; the second limit is hit by nothing: the test itself is sound."""
    source = tiny(server)
    job = process(source, tmp_path / "voc", limit=limit)
    out, err = job.communicate(timeout=60)
    if not where:
        assert job.returncode == 0, err
        return
    assert job.returncode == 1 and where in err and "Make room" in err and "Traceback" not in err
    assert names(tmp_path / "voc") == ["archives"] and "VOCtrainval.tar" not in names(
        tmp_path / "voc" / "archives"
    )
    get(tmp_path / "voc", source)


def test_a_root_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(G.GetError, match="cannot be written"):
        get(tmp_path / "file" / "voc", tiny(server))
    if os.geteuid() == 0:
        pytest.skip("root may write into read-only folders; the rest is skipped")
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(G.GetError, match="cannot be written"):
        get(tmp_path / "closed" / "voc", tiny(server))


def test_a_killed_process_leaves_a_part_that_the_next_one_completes(server, tmp_path):
    source = tiny(server)
    server.tricks = [{"cut": 7000, "hang": 20}]
    job = process(source, tmp_path)
    part = tmp_path / "archives" / "VOCtrainval.tar.part"
    for _ in range(600):
        if part.exists() and part.stat().st_size == 7000:
            break
        time.sleep(0.05)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    assert names(tmp_path) == ["archives"] and "VOCtrainval.tar" not in names(tmp_path / "archives")
    get(tmp_path, source)
    assert ("GET", "/VOCtrainval.tar", "bytes=7000-") in server.asked and len(
        load_split("voc2007", tmp_path, "trainval")
    ) == 3


def test_two_processes_at_once_fetch_everything_once(server, tmp_path):
    source = tiny(server)
    server.tricks = [{"hang": 2}]  # the first one is still fetching when the second comes
    jobs = [process(source, tmp_path, keep=False) for _ in range(2)]
    outs = [job.communicate(timeout=60) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outs
    assert sorted(p for _, p, _ in server.asked) == ["/VOCtest.tar", "/VOCtrainval.tar"]
    assert len(load_split("voc2007", tmp_path, "test")) == 2


# ---------------------------------------------------------------- the catalogue


def test_every_number_of_the_catalogue_names_its_source():
    for name, source in G.SOURCES.items():
        for a in source.archives:
            assert (a.checksum is None and a.size is None) == (not a.published)
            assert a.checksum is None or re_digest(a.checksum)
            assert a.name == a.addresses[0].rpartition("/")[2] and a.room >= (a.size or 0)
            assert all(g.split("/")[0] for g in a.gives)


def re_digest(text):
    algorithm, _, digits = text.partition(":")
    return len(bytes.fromhex(digits)) == hashlib.new(algorithm).digest_size
