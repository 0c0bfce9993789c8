"""Storage promises, kept by folders and by S3: whole objects, one winner, clear errors."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
from s3_server import bucket, s3_endpoint, s3_environment  # noqa: F401

from pirl.errors import StorageError, StorageNotFoundError, UsageError
from pirl.storage import Storage, local_path, open_storage, sha256_file

# Children of a process with threads (the S3 server) are started afresh, not forked, except where fork is the subject.
SPAWN = multiprocessing.get_context("spawn")
TEMPORARIES = ".pirl-tmp-*"


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(tmp_path / "root")
    return open_storage(request.getfixturevalue("bucket") + "/some/prefix")


def message(call: Callable[[], object], kind: type[StorageError] | type[UsageError] = StorageError) -> str:
    """The text of the one expected error; it must have a next step."""
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert caught.value.hint
    return str(caught.value)


class TestObjects:
    def test_round_trip(self, storage: Storage) -> None:
        assert storage.list() == []
        storage.write_bytes("a/b/c.bin", b"old")
        storage.write_bytes("a/b/c.bin", b"newer")
        assert storage.read_bytes("a/b/c.bin") == b"newer"
        assert (storage / "a" / "b").read_bytes("c.bin") == (storage / "a/b/").read_bytes("c.bin") == b"newer"
        assert storage.size("a/b/c.bin") == 5
        assert storage.exists("a/b/c.bin")
        storage.delete("a/b/c.bin")
        storage.delete("a/b/c.bin")
        assert not storage.exists("a/b/c.bin")
        assert storage.list() == []

    def test_range(self, storage: Storage) -> None:
        storage.write_bytes("x", b"0123456789")
        assert storage.read_range("x", 2, 3) == b"234"
        assert storage.read_range("x", 8, 10) == b"89"
        assert storage.read_range("x", 10, 1) == storage.read_range("x", 99, 1) == storage.read_range("x", 3, 0) == b""
        storage.write_bytes("empty", b"")
        assert storage.read_bytes("empty") == storage.read_range("empty", 0, 4) == b""

    def test_absent(self, storage: Storage, tmp_path: Path) -> None:
        storage.write_bytes("folder/x", b"")
        for absent in ("nope", "folder", "folder/y", "folder/x/z"):
            assert not storage.exists(absent)
            for call in (
                lambda name=absent: storage.read_bytes(name),
                lambda name=absent: storage.read_range(name, 0, 1),
                lambda name=absent: storage.size(name),
                lambda name=absent: storage.download(name, tmp_path / "copy"),
            ):
                assert absent in message(call, StorageNotFoundError)
        assert not list(tmp_path.glob("*copy*"))
        assert not list(tmp_path.glob(TEMPORARIES))

    def test_big_files_travel_whole(self, storage: Storage, tmp_path: Path) -> None:
        big = os.urandom(40 << 20)  # several parts on S3
        (tmp_path / "source").write_bytes(big)
        storage.upload(tmp_path / "source", "deep/big")
        storage.download("deep/big", tmp_path / "new folder" / "copy")
        assert sha256_file(tmp_path / "new folder" / "copy") == sha256_file(tmp_path / "source")
        assert storage.read_range("deep/big", (20 << 20) - 1, 3) == big[(20 << 20) - 1 :][:3]
        storage.write_bytes("big", big)
        assert storage.read_bytes("big") == big
        assert not list((tmp_path / "new folder").glob(TEMPORARIES))

    def test_upload_of_an_absent_file_is_not_an_absent_object(self, storage: Storage, tmp_path: Path) -> None:
        assert str(tmp_path / "gone") in message(lambda: storage.upload(tmp_path / "gone", "x"))
        assert str(tmp_path) in message(lambda: storage.upload(tmp_path, "x"))
        assert not storage.exists("x")

    def test_list_is_recursive_sorted_and_relative(self, storage: Storage) -> None:
        for name in ("b", "a/2", "a/10", "ab/1", "a/sub/x", ".hidden"):
            storage.write_bytes(name, b"")
        assert storage.list() == sorted(["b", "a/2", "a/10", "ab/1", "a/sub/x", ".hidden"])
        assert storage.list("a") == ["a/10", "a/2", "a/sub/x", "ab/1"]
        assert storage.list("a/") == ["a/10", "a/2", "a/sub/x"]
        assert storage.list("a/s") == ["a/sub/x"]
        assert storage.list("zzz/") == []
        assert (storage / "a").list() == ["10", "2", "sub/x"]

    def test_unusual_names(self, storage: Storage) -> None:
        names = ["Übung/画像 1.jpg", "a b+c&d=e%20f#g?h", "ключ", "-dash", "dots..", "...", "tilde~"]
        for name in names:
            storage.write_bytes(name, name.encode())
        assert storage.list() == sorted(names)
        assert [storage.read_bytes(name).decode() for name in names] == names
        again = open_storage((storage / "Übung #1 %41").uri)
        again.write_bytes("x", b"here")
        assert storage.read_bytes("Übung #1 %41/x") == b"here"

    @pytest.mark.parametrize(
        "name", ["../x", "a/../../x", "/etc/passwd", "", ".", "a//b", "a/", "./a", "a\0b", "..", ".pirl-tmp-1"]
    )
    def test_names_do_not_escape(self, storage: Storage, name: str, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(b"outside")
        for call in (
            lambda: storage.read_bytes(name),
            lambda: storage.read_range(name, 0, 1),
            lambda: storage.write_bytes(name, b"stolen"),
            lambda: storage.create(name, b"stolen"),
            lambda: storage.upload(tmp_path / "x", name),
            lambda: storage.download(name, tmp_path / "y"),
            lambda: storage.size(name),
            lambda: storage.delete(name),
        ):
            assert repr(name) in message(call)
        assert (tmp_path / "x").read_bytes() == b"outside"
        for prefix in ("../", "/", "..", "a/../.."):
            message(lambda prefix=prefix: storage.list(prefix))
            message(lambda prefix=prefix: storage / prefix)

    def test_json(self, storage: Storage) -> None:
        value = {"z": 1, "a": [1.5, None, "ü"]}
        storage.write_json("x.json", value)
        assert storage.read_json("x.json") == value
        text = storage.read_bytes("x.json").decode()
        assert text.endswith("}\n")
        assert text.index('"z"') < text.index('"a"')
        assert "ü" in text
        storage.write_bytes("x.json", b'{"half": ')
        assert "x.json is not valid JSON" in message(lambda: storage.read_json("x.json"))

    def test_pickle_and_equality(self, storage: Storage) -> None:
        storage.write_bytes("x", b"1")
        again = pickle.loads(pickle.dumps(storage))
        assert again == storage == open_storage(storage.uri)
        assert again != storage / "child"
        assert len({again, storage}) == 1
        assert again.read_bytes("x") == b"1"

    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
    def test_usable_after_fork_and_in_threads(self, storage: Storage) -> None:
        storage.write_bytes("x", b"parent")  # the client is in use before the fork
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(storage.read_bytes, ["x"] * 40)) == [b"parent"] * 40
        pids = []
        for index in range(4):
            if (pid := os.fork()) == 0:
                code = 1
                try:
                    assert storage.read_bytes("x") == b"parent"
                    storage.write_bytes(f"child-{index}", b"")
                    code = 0
                finally:
                    os._exit(code)
            pids.append(pid)
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
        assert storage.list("child") == [f"child-{index}" for index in range(4)]


def contend(uri: str, who: str, rounds: int, gate: object, queue: object) -> None:
    storage = open_storage(uri)
    for index in range(rounds):
        gate.wait()  # type: ignore[attr-defined]
        queue.put((index, who, storage.create(f"claims/{index}", who.encode())))  # type: ignore[attr-defined]


class TestCreate:
    def test_second_create_changes_nothing(self, storage: Storage) -> None:
        assert storage.create("a/x", b"first")
        assert not storage.create("a/x", b"second")
        assert storage.read_bytes("a/x") == b"first"
        assert storage.list() == ["a/x"]
        storage.delete("a/x")
        assert storage.create("a/x", b"third")

    def test_local_race_has_one_winner(self, tmp_path: Path) -> None:
        self.race(f"file://{tmp_path}", contenders=8, rounds=50)

    def test_s3_race_has_one_winner(self, s3_environment: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
        with faulty_s3() as server:
            monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
            self.race("s3://claims-bucket", contenders=4, rounds=20)

    def race(self, uri: str, contenders: int, rounds: int) -> None:
        gate, queue = SPAWN.Barrier(contenders), SPAWN.Queue()
        children = [
            SPAWN.Process(target=contend, args=(uri, f"process-{index}", rounds, gate, queue))
            for index in range(contenders)
        ]
        for child in children:
            child.start()
        results = [queue.get(timeout=120) for _ in range(contenders * rounds)]
        for child in children:
            child.join()
        for index in range(rounds):
            winners = [who for round_, who, won in results if round_ == index and won]
            assert [open_storage(uri).read_bytes(f"claims/{index}").decode()] == winners


class TestUri:
    def test_local_forms(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        expected = f"file://{tmp_path}/x"
        for form in (
            "x",
            "./x/",
            "y/../x",
            Path("x"),
            tmp_path / "x",
            "~/x",
            expected,
            f"{expected}/",
            f"file://localhost{tmp_path}/x",
        ):
            assert open_storage(form).uri == expected
        assert local_path(open_storage("x")) == tmp_path / "x"
        assert open_storage("/").uri == "file:///"
        assert open_storage("file:///a%20b").uri == open_storage("/a b").uri == "file:///a%20b"
        assert local_path(open_storage("/100% #1")) == local_path(open_storage(open_storage("/100% #1").uri))

    def test_s3_forms(self) -> None:
        assert open_storage("s3://bucket/a//b/").uri == "s3://bucket/a/b"
        assert open_storage("s3://bucket").uri == open_storage("s3://bucket/").uri == "s3://bucket"
        assert (open_storage("s3://bucket") / "x").uri == "s3://bucket/x"
        assert local_path(open_storage("s3://bucket/x")) is None

    @pytest.mark.parametrize(
        ("uri", "said"),
        [
            ("s3a://bucket/x", "Did you mean 's3'?"),
            ("fil:///x", "Did you mean 'file'?"),
            ("gs://bucket/x", "Use a path or s3://bucket/prefix"),
            ("s3:/bucket/x", "s3://bucket/prefix"),
            ("file:/x", "Use a path or"),
            ("s3://", "bucket"),
            ("s3://a", "bucket"),
            ("", "empty"),
            ("  ", "empty"),
            ("file://server/share", "the path /server/share"),
        ],
    )
    def test_wrong_uri(self, uri: str, said: str) -> None:
        assert said in message(lambda: open_storage(uri), UsageError)

    def test_no_password_is_repeated(self) -> None:
        for uri in ("s3://id:hush@bucket/x", "https://id:hush@host/x"):
            assert "hush" not in message(lambda uri=uri: open_storage(uri), UsageError)

    def test_prefix_does_not_escape(self) -> None:
        message(lambda: open_storage("s3://bucket/a/../../b"))

    def test_a_laptop_does_not_pay_for_boto3(self, tmp_path: Path) -> None:
        code = (
            "import sys; from pirl.storage import open_storage; "
            f"open_storage({str(tmp_path)!r}).write_bytes('x', b''); open_storage('s3://bucket/x'); "
            "assert not {'boto3', 'botocore', 's3transfer'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestLocalFaults:
    def test_killed_writers_leave_the_old_or_the_new_object(self, tmp_path: Path) -> None:
        """kill -9 at random moments of a loop that replaces 16 MiB: a reader never sees half of anything."""
        code = textwrap.dedent(
            f"""
            from pirl.storage import open_storage
            storage = open_storage({str(tmp_path)!r})
            step = 0
            while True:
                storage.write_bytes("big", bytes([step % 256]) * (16 << 20))
                print(step, flush=True)
                step += 1
            """
        )
        storage = open_storage(tmp_path)
        seen = set()
        for attempt in range(6):
            child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
            assert child.stdout is not None
            child.stdout.readline()
            deadline = time.monotonic() + 0.1 + 0.037 * attempt
            while time.monotonic() < deadline:
                self.check_whole(storage.read_bytes("big"))
            child.send_signal(signal.SIGKILL)
            child.wait()
            child.stdout.close()
            data = storage.read_bytes("big")
            self.check_whole(data)
            seen.add(data[0])
            assert storage.list() == ["big"]
        assert len(seen) > 1  # it was really being replaced

        left = list(tmp_path.glob(TEMPORARIES))
        assert left, "no kill hit the middle of a write: the test shows nothing"
        for path in left:
            os.utime(path, (0, 0))
        storage.write_bytes("other", b"")
        assert all(path.exists() for path in left)
        storage.write_bytes("big", b"small")  # what dead writers of this object left is taken away
        assert not list(tmp_path.glob(TEMPORARIES))

    @staticmethod
    def check_whole(data: bytes) -> None:
        assert len(data) == 16 << 20
        assert data.count(data[:1]) == len(data)

    def test_a_living_writer_is_not_swept(self, tmp_path: Path) -> None:
        from pirl.storage.local import replacing

        with replacing(tmp_path / "x") as file:
            file.write(b"slow")
            file.flush()
            (mine,) = tmp_path.glob(TEMPORARIES)
            os.utime(mine, (0, 0))
            open_storage(tmp_path).write_bytes("x", b"quick")
            assert mine.exists()
        assert (tmp_path / "x").read_bytes() == b"slow"

    def test_full_disk(self, tmp_path: Path, small_disk: Path) -> None:
        storage = open_storage(small_disk / "out")
        storage.write_bytes("kept", b"old")
        (tmp_path / "big").write_bytes(bytes(2 << 20))
        big = open_storage(tmp_path)
        calls: list[tuple[str, Callable[[], object]]] = [
            ("kept", lambda: storage.write_bytes("kept", bytes(2 << 20))),
            ("new", lambda: storage.create("new", bytes(2 << 20))),
            ("kept", lambda: storage.upload(tmp_path / "big", "kept")),
            ("copy", lambda: big.download("big", small_disk / "out" / "copy")),
        ]
        for name, call in calls:
            text = message(call)
            assert f"{small_disk}/out/{name}: the disk is full" in text
            assert "Free some space" in text
        assert storage.list() == ["kept"]
        assert storage.read_bytes("kept") == b"old"
        assert os.listdir(small_disk / "out") == ["kept"]
        storage.write_bytes("kept", b"there is room again")

    def test_full_disk_under_an_s3_download(self, bucket: str, small_disk: Path) -> None:  # noqa: F811
        storage = open_storage(bucket)
        storage.write_bytes("big", bytes(2 << 20))
        assert "the disk is full" in message(lambda: storage.download("big", small_disk / "big"))
        assert os.listdir(small_disk) == []

    def test_read_only(self, small_disk: Path) -> None:
        storage = open_storage(small_disk)
        storage.write_bytes("kept", b"old")
        remount(small_disk, "ro")
        for call in (
            lambda: storage.write_bytes("kept", b"new"),
            lambda: storage.create("new", b""),
            lambda: storage.delete("kept"),
            lambda: (storage / "child").write_bytes("x", b""),
        ):
            assert "read-only" in message(call)
        assert storage.read_bytes("kept") == b"old"
        assert storage.list() == ["kept"]

    def test_permission_denied(self, tmp_path: Path) -> None:
        """Root may do everything, so another user tries, in a process of its own."""
        (tmp_path / "closed").mkdir(mode=0o700)
        (tmp_path / "closed" / "x").write_bytes(b"old")
        user = 65534
        if os.geteuid() == 0:
            for parent in (tmp_path, *tmp_path.parents):
                if parent.owner() == "root" and parent != Path("/") and not parent.stat().st_mode & 0o001:
                    parent.chmod(0o711)
        else:
            (tmp_path / "closed").chmod(0o000)

        def attempt() -> None:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setuid(user)
            storage = open_storage(tmp_path / "closed")
            for call in (lambda: storage.read_bytes("x"), lambda: storage.write_bytes("x", b""), storage.list):
                assert "permission denied" in message(call)
            with pytest.raises(StorageError):
                storage.exists("x")

        if (pid := os.fork()) == 0:
            code = 1
            try:
                attempt()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        (tmp_path / "closed").chmod(0o700)
        assert (tmp_path / "closed" / "x").read_bytes() == b"old"

    def test_something_in_the_way(self, tmp_path: Path) -> None:
        storage = open_storage(tmp_path)
        storage.write_bytes("file", b"")
        storage.write_bytes("folder/x", b"")
        for call in (
            lambda: storage.write_bytes("file/x", b""),
            lambda: storage.create("file/x", b""),
            lambda: storage.write_bytes("folder", b""),
            lambda: storage.create("folder", b""),
        ):
            assert "in the way" in message(call) or "a file stands" in message(call)
        assert "too long" in message(lambda: storage.write_bytes("n" * 300, b""))
        storage.write_bytes("n" * 255, b"as long as a name may be")
        assert storage.list() == ["file", "folder/x", "n" * 255]

    def test_a_folder_goes_with_its_last_object(self, tmp_path: Path) -> None:
        storage = open_storage(tmp_path / "root")
        for name in ("a/b/c", "a/d", "e"):
            storage.write_bytes(name, b"")
        (storage / "a" / "b").delete("c")
        assert sorted(path.name for path in (tmp_path / "root").rglob("*")) == ["a", "d", "e"]
        storage.delete("a/d")
        assert [path.name for path in (tmp_path / "root").iterdir()] == ["e"]
        storage.write_bytes("a/b/c", b"again")
        assert storage.read_bytes("a/b/c") == b"again"

    def test_writers_survive_a_folder_that_others_remove(self, tmp_path: Path) -> None:
        def write_and_delete(number: int) -> None:
            storage = open_storage(tmp_path / "root")
            for _ in range(50):
                storage.write_bytes(f"a/b/{number}", b"data")
                assert storage.read_bytes(f"a/b/{number}") == b"data"
                storage.delete(f"a/b/{number}")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(write_and_delete, range(4)))
        assert open_storage(tmp_path).list() == []

    def test_files_have_usual_permissions(self, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            open_storage(tmp_path).write_bytes("x", b"")
        finally:
            os.umask(before)
        assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "small disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def remount(place: Path, mode: str) -> None:
    if subprocess.run(["mount", "-o", f"remount,{mode}", str(place)], capture_output=True).returncode:
        pytest.skip("remounting is not permitted here")


class TestS3:
    def test_more_than_one_page(self, bucket: str) -> None:  # noqa: F811
        client = boto3.client("s3", region_name="us-east-1")
        names = [f"many/{index:05d}" for index in range(1203)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: client.put_object(Bucket=bucket[5:], Key=name, Body=b""), names))
        assert open_storage(bucket).list() == names
        assert open_storage(f"{bucket}/many").list("0120") == ["01200", "01201", "01202"]

    def test_a_neighbour_with_a_longer_name_is_not_listed(self, bucket: str) -> None:  # noqa: F811
        open_storage(f"{bucket}/run-10").write_bytes("x", b"")
        open_storage(f"{bucket}/run-1").write_bytes("y", b"")
        assert open_storage(f"{bucket}/run-1").list() == ["y"]

    def test_folder_markers_of_other_tools_are_no_objects(self, bucket: str) -> None:  # noqa: F811
        client = boto3.client("s3", region_name="us-east-1")
        for key in ("p/", "p/folder/", "p/../x", "p/a//b", "p/ok"):
            client.put_object(Bucket=bucket[5:], Key=key, Body=b"")
        assert open_storage(f"{bucket}/p").list() == ["ok"]

    @pytest.mark.usefixtures("bucket")
    def test_no_such_bucket(self, tmp_path: Path) -> None:
        storage = open_storage("s3://no-such-bucket/x")
        (tmp_path / "f").write_bytes(b"")
        for call in (
            lambda: storage.read_bytes("x"),
            lambda: storage.write_bytes("x", b""),
            lambda: storage.create("x", b""),
            lambda: storage.exists("x"),
            lambda: storage.download("x", tmp_path / "g"),
            lambda: storage.upload(tmp_path / "f", "x"),
            storage.list,
        ):
            assert "The bucket 'no-such-bucket' does not exist" in message(call)

    @pytest.mark.usefixtures("s3_environment")
    def test_endpoint_that_is_down(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://user:hush@127.0.0.1:9")
        started = time.monotonic()
        text = message(lambda: open_storage("s3://bucket/x").read_bytes("y"))
        assert time.monotonic() - started < 10
        assert "127.0.0.1:9 is unavailable" in text
        assert "2 tries" in text
        assert "AWS_ENDPOINT_URL" in text
        assert "hush" not in text

    @pytest.mark.usefixtures("s3_environment")
    def test_no_credentials(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        assert "no usable S3 credentials" in message(lambda: open_storage("s3://bucket/x").list())
        monkeypatch.setenv("AWS_PROFILE", "nobody")
        assert "nobody" in message(lambda: open_storage("s3://bucket/x").list(), UsageError)

    @pytest.mark.usefixtures("s3_environment")
    def test_wrong_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "no url")
        assert "AWS_ENDPOINT_URL" in message(lambda: open_storage("s3://bucket/x").list(), UsageError)
        monkeypatch.setenv("PIRL_S3_ATTEMPTS", "many")
        assert "PIRL_S3_ATTEMPTS='many'" in message(lambda: open_storage("s3://bucket/x").list(), UsageError)


class FaultyS3(ThreadingHTTPServer):
    """Small objects with exact conditional writes, and faults on demand: `faults` are taken one by one."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FaultyHandler)
        self.objects: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.always = ""
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self) -> str:
        with self.lock:
            return self.always or (self.faults.pop(0) if self.faults else "")

    def __enter__(self) -> FaultyS3:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class FaultyHandler(BaseHTTPRequestHandler):
    server: FaultyS3
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", announced: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if announced is None else announced))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer(
            status,
            f"<Error><Code>{code}</Code><Message>x</Message><AWSAccessKeyId>hush</AWSAccessKeyId></Error>".encode(),
        )

    def broken(self) -> bool:
        fault = self.server.fault()
        if fault.isdigit():
            self.answer(int(fault))
        elif fault:
            status, code = fault.split(":")
            self.refuse(int(status), code)
        return bool(fault)

    def do_GET(self) -> None:
        data = self.server.objects.get(self.path)
        if self.server.faults[:1] == ["truncate"] and data is not None:
            self.server.faults.pop(0)
            self.close_connection = True
            self.answer(200, data[: len(data) // 2], announced=len(data))
        elif not self.broken():
            if data is None:
                self.refuse(404, "NoSuchKey")
            else:
                self.answer(200, data)

    def do_HEAD(self) -> None:
        if fault := self.server.fault():
            self.answer(int(fault.partition(":")[0]))
        else:
            self.answer(200 if self.path in self.server.objects else 404)

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if "aws-chunked" in self.headers.get("Content-Encoding", ""):
            length = int(self.headers["x-amz-decoded-content-length"])
            data = data.split(b"\r\n", 1)[1][:length] if length else b""
        lost = self.server.faults[:1] == ["lose the answer"]
        if lost:
            self.server.faults.pop(0)
        elif self.broken():
            return
        with self.server.lock:
            taken = self.path in self.server.objects and self.headers.get("If-None-Match") == "*"
            if not taken:
                self.server.objects[self.path] = data
        if lost:
            self.answer(500)
        elif taken:
            self.refuse(412, "PreconditionFailed")
        else:
            self.answer(200)

    def do_DELETE(self) -> None:
        if not self.broken():
            self.server.objects.pop(self.path, None)
            self.answer(204)


def faulty_s3() -> FaultyS3:
    return FaultyS3()


@pytest.mark.usefixtures("s3_environment")
class TestS3Faults:
    @pytest.fixture
    def server(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
        with faulty_s3() as server:
            monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
            monkeypatch.setenv("PIRL_S3_ATTEMPTS", "3")
            yield server

    @pytest.mark.parametrize(
        ("fault", "said"),
        [
            ("403:AccessDenied", "access denied"),
            ("403:InvalidAccessKeyId", "does not accept the credentials"),
            ("403:SignatureDoesNotMatch", "does not accept the credentials"),
            ("400:ExpiredToken", "does not accept the credentials"),
            ("403:RequestTimeTooSkewed", "clock"),
            ("503:SlowDown", "overloaded or failing"),
            ("507:XMinioStorageFull", "no space"),
            ("501:NotImplemented", "lacks a feature"),
            ("418:Teapot", "Teapot"),
        ],
    )
    def test_refusals(
        self, server: FaultyS3, fault: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PIRL_S3_ATTEMPTS", "1")
        storage = open_storage("s3://bucket/p")
        server.always = fault
        (tmp_path / "f").write_bytes(b"")
        for call in (
            lambda: storage.read_bytes("x"),
            lambda: storage.write_bytes("x", b""),
            lambda: storage.create("x", b""),
            lambda: storage.upload(tmp_path / "f", "x"),
            lambda: storage.delete("x"),
            storage.list,
        ):
            text = message(call)
            assert said in text
            assert "s3://bucket/p" in text
            assert not {"hush", "test-key-id", "test-secret-value"} & set(text.split())

    def test_forbidden_head(self, server: FaultyS3, tmp_path: Path) -> None:
        """A HEAD answer has no body, only the number."""
        server.always = "403:AccessDenied"
        assert "access denied" in message(lambda: open_storage("s3://bucket/p").exists("x"))
        assert "access denied" in message(lambda: open_storage("s3://bucket/p").download("x", tmp_path / "x"))

    def test_passing_failures_are_ridden_out(self, server: FaultyS3) -> None:
        storage = open_storage("s3://bucket/p")
        server.faults = ["500", "503:SlowDown"]
        storage.write_bytes("x", b"whole object")
        server.faults = ["503:SlowDown", "500"]
        assert storage.read_bytes("x") == b"whole object"
        server.faults = ["truncate", "truncate"]
        assert storage.read_bytes("x") == b"whole object"
        server.faults = ["truncate"] * 3
        assert "breaks off" in message(lambda: storage.read_bytes("x"))

    def test_create_whose_answer_was_lost_knows_that_it_won(self, server: FaultyS3) -> None:
        storage = open_storage("s3://bucket/p")
        server.faults = ["lose the answer"]
        assert storage.create("x", b"mine")
        assert server.faults == []
        assert not storage.create("x", b"theirs")
        server.faults = ["500"]
        assert not storage.create("x", b"theirs")

    def test_create_repeats_a_conflict(self, server: FaultyS3) -> None:
        server.faults = ["409:ConditionalRequestConflict"]
        assert open_storage("s3://bucket/p").create("x", b"mine")
