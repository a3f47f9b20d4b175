"""Lists on disk: what was written is read, in bounded memory; what was damaged is named."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from toolkit.errors import FormatError, ToolkitError, UsageError
from toolkit.rag.disk import ALIGN_BYTES, DirectFile, throttled
from toolkit.rag.quantizer import Quantizer
from toolkit.rag.segment import Segment, SegmentWriter
from toolkit.rag.spill import Spill

Cloud = Callable[..., np.ndarray]


def _write(path: Path, vectors: np.ndarray, quantizer: Quantizer, memory_bytes: int = 1 << 20):
    path.mkdir(exist_ok=True)
    with contextlib.closing(Spill(path / "spill", quantizer, memory_bytes=memory_bytes)) as spill:
        for start in range(0, len(vectors), 100):
            spill.append(vectors[start : start + 100], start)
        with contextlib.closing(SegmentWriter(path / "lists.bin", quantizer)) as writer:
            for number, ids, codes in spill.lists():
                writer.append(number, ids, codes)
            writer.finish(0, len(vectors))
    return path / "lists.bin"


@pytest.fixture(params=["f32", "f16", "sq8"])
def quantizer(request: pytest.FixtureRequest, cloud: Cloud) -> Quantizer:
    return Quantizer.train(cloud(900), 20, request.param)


@pytest.mark.parametrize("memory_bytes", [1, 20_000, 1 << 20])
def test_lists_hold_every_vector_once_in_the_order_of_ids(
    quantizer: Quantizer, cloud: Cloud, tmp_path: Path, memory_bytes: int
) -> None:
    vectors = cloud(900)
    segment = Segment(_write(tmp_path, vectors, quantizer, memory_bytes), quantizer)
    assigned = np.concatenate([quantizer.assign(v) for v in np.split(vectors, 9)])
    codes = quantizer.encode(vectors)
    for number in range(quantizer.num_lists):
        ids, found = segment.read(number)
        np.testing.assert_array_equal(ids, np.flatnonzero(assigned == number))
        np.testing.assert_array_equal(found, codes[ids])
    assert segment.nums.sum() == segment.num_vectors == 900
    assert segment.verify() == []
    held = segment.offsets[segment.nums > 0]
    assert (held % ALIGN_BYTES == 0).all()
    assert (np.diff(held) > 0).all()  # in the order of their numbers, so neighbours follow
    segment.close()


def test_however_much_memory_the_file_is_the_same(
    quantizer: Quantizer, cloud: Cloud, tmp_path: Path
) -> None:
    files = [
        _write(tmp_path / str(memory), cloud(900), quantizer, memory) for memory in (1, 30_000)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_memory_of_a_build_does_not_grow_with_the_corpus(cloud: Cloud, tmp_path: Path) -> None:
    quantizer = Quantizer.train(cloud(2000, 64), 40)

    def peak_bytes(count: int) -> int:
        vectors = cloud(count, 64)
        tracemalloc.start()
        _write(tmp_path / str(count), vectors, quantizer, 256 << 10)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    # 1.25 MB and 5 MB of vectors, the largest list of the latter about 1 MB.
    small, large = peak_bytes(5_000), peak_bytes(20_000)
    assert large < small + (2 << 20)


def test_neighbouring_numbers_are_neighbouring_centroids(cloud: Cloud) -> None:
    quantizer = Quantizer.train(cloud(2000), 60)
    products = quantizer.centroids_LD @ quantizer.centroids_LD.T
    beside = np.diagonal(products, offset=1).mean()
    assert beside > np.median(products) + 0.3


def test_a_quantizer_is_read_as_it_was_written(
    quantizer: Quantizer, cloud: Cloud, tmp_path: Path
) -> None:
    quantizer.write(tmp_path / "q")
    again = Quantizer.read(tmp_path / "q")
    assert (again.encoding, again.checksum) == (quantizer.encoding, quantizer.checksum)
    vectors = cloud(900)[:50]
    np.testing.assert_array_equal(again.encode(vectors), quantizer.encode(vectors))
    np.testing.assert_array_equal(again.rank(vectors[0], 20), quantizer.rank(vectors[0], 20))
    error = {"f32": 0, "f16": 1e-3, "sq8": 2e-2}[quantizer.encoding]
    np.testing.assert_allclose(again.decode(again.encode(vectors)), vectors, atol=error)
    data = (tmp_path / "q").read_bytes()
    for cut, said in ((data[:-4], "is torn"), (data[:9], "is not"), (b"X" + data[1:], "is not")):
        (tmp_path / "q").write_bytes(cut)
        with pytest.raises(FormatError, match=said):
            Quantizer.read(tmp_path / "q")
    for at, said in ((8, "is version"), (100, "was altered"), (len(data) - 1, "was altered")):
        (tmp_path / "q").write_bytes(data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :])
        with pytest.raises(FormatError, match=said):
            Quantizer.read(tmp_path / "q")


def test_ranking_more_lists_than_there_are_is_refused(quantizer: Quantizer, cloud: Cloud) -> None:
    for nprobe in (0, 21):
        with pytest.raises(UsageError, match=f"nprobe is {nprobe}, and the index has 20 lists"):
            quantizer.rank(cloud(1)[0], nprobe)


def test_a_flipped_bit_is_named_wherever_it_is(cloud: Cloud, tmp_path: Path) -> None:
    quantizer = Quantizer.train(cloud(300), 5)
    path = _write(tmp_path, cloud(300), quantizer)
    whole = path.read_bytes()
    opened = Segment(path, quantizer)
    places = {
        "is not a segment": 0, "is version": 8, "in its header": 20, "in its table": ALIGN_BYTES,
        "in list 0": int(opened.offsets[0]) + 3, "in list 4": len(whole) - 1,
    }  # fmt: skip
    opened.close()

    def read(number: int) -> None:
        with contextlib.closing(Segment(path, quantizer)) as segment:
            (error,) = segment.verify()
            assert f"in list {number}" in str(error)
            segment.read(number)

    for said, at in places.items():
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(FormatError, match=rf"lists\.bin.*{said}"):
            read(int(said[-1]) if said[-1].isdigit() else 0)
    path.write_bytes(whole[:-ALIGN_BYTES])
    with pytest.raises(FormatError, match="is torn"):
        Segment(path, quantizer)
    path.write_bytes(whole)
    with pytest.raises(FormatError, match="another index"):
        Segment(path, Quantizer.train(cloud(300, seed=1), 5))
    path.unlink()
    with pytest.raises(FormatError, match="is missing"):
        Segment(path, quantizer)


def test_what_is_no_vector_is_refused(cloud: Cloud, tmp_path: Path) -> None:
    quantizer = Quantizer.train(cloud(300), 5)
    with contextlib.closing(Spill(tmp_path, quantizer)) as spill:
        with pytest.raises(UsageError, match=r"\(3, 7\) for an index of 24 dims"):
            spill.append(np.ones((3, 7), np.float32), 0)
        wrong = cloud(10)
        wrong[4, 2] = np.nan
        with pytest.raises(UsageError, match="vector 104 has values that are not finite"):
            spill.append(wrong, 100)
    for num_lists in (0, 301):
        with pytest.raises(UsageError, match="lists to train from 300"):
            Quantizer.train(cloud(300), num_lists)
    with pytest.raises(UsageError, match="did you mean 'sq8'"):
        Quantizer.train(cloud(300), 5, "sq9")  # type: ignore[arg-type]


def test_an_empty_segment_can_be_read(cloud: Cloud, tmp_path: Path) -> None:
    quantizer = Quantizer.train(cloud(300), 5)
    segment = Segment(_write(tmp_path, cloud(300)[:0], quantizer), quantizer)
    assert [len(segment.read(number)[0]) for number in range(5)] == [0] * 5


@pytest.mark.parametrize("direct", [True, False])
def test_reads_fill_buffers_in_pieces(
    tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl
    import mmap
    import os

    data = np.random.default_rng(0).integers(0, 256, 5 * 2**20, np.uint8).tobytes()
    (tmp_path / "f").write_bytes(data)
    with monkeypatch.context() as without:
        if not direct:
            without.delattr(os, "O_DIRECT")
        file = DirectFile(tmp_path / "f")
    if direct and not file.direct:
        pytest.skip("this file system refuses direct reads")
    assert bool(fcntl.fcntl(file._handle, fcntl.F_GETFL) & os.O_DIRECT) is direct
    sizes = [4096, 3 * 2**20, 8192, 2**20]
    buffers = [memoryview(mmap.mmap(-1, size)) for size in sizes]
    file.read(4096, buffers)
    assert b"".join(buffers) == data[4096 : 4096 + sum(sizes)]
    with pytest.raises(FormatError, match=r"f is torn: it ends at byte 5242880"):
        file.read(5 * 2**20 - 4096, buffers[:1] + buffers[2:3])
    file.close()
    with pytest.raises(ToolkitError, match="f at byte 0: Bad file descriptor"):
        file.read(0, buffers)


def test_a_file_system_that_refuses_direct_reads_is_read_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(256)) * 32)
    file = DirectFile(tmp_path / "f")
    # Not aligned in memory: what the kernel refuses as EINVAL.
    buffer = memoryview(bytearray(4097))[1:]
    file.read(0, [buffer])
    assert buffer == (bytes(range(256)) * 16)
    file.close()


def test_a_read_error_names_file_and_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    (tmp_path / "f").write_bytes(bytes(8192))
    file = DirectFile(tmp_path / "f")

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(ToolkitError, match=r"cannot read .*f at byte 4096: Input/output error"):
        file.read(4096, [memoryview(bytearray(4096))])
    file.close()


def test_a_throttled_disk_takes_its_time(tmp_path: Path) -> None:
    import mmap

    (tmp_path / "f").write_bytes(bytes(8192))
    now_s = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    read = throttled(4096.0, clock=lambda: now_s, sleep=sleep)
    file = DirectFile(tmp_path / "f")
    for _ in range(3):
        read(file, 0, [memoryview(mmap.mmap(-1, 8192))])
    assert now_s == 6.0
    file.close()
