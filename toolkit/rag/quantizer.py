"""What an index knows before it reads a list: its centroids, and how a vector becomes a code.

FAISS does the arithmetic, and its own IVF scanner scores every code wherever the code lies (disk
buffer, arena, another segment). So a score has the bits that plain FAISS gives it, whatever was
resident. On disk this is one small file that belongs to the index, not to a segment:

    header 64 B | centroids float32 [num_lists, dims] | limits float32 [num_limits]

Shapes: N vectors, L lists, D dims, C bytes a code.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from toolkit import record
from toolkit.errors import FormatError, UsageError, require, unknown_name
from toolkit.rag.disk import checksum

# f32 keeps vectors as they are; f16 halves, sq8 (8 bits a component, between limits learnt in
# training) quarters the bytes that a search reads, at a loss that `toolkit rag eval` measures.
Encoding = Literal["f32", "f16", "sq8"]


def find_encoding(name: str) -> Encoding:
    """Return the encoding of that name. Raises UsageError naming the nearest.

    >>> find_encoding("sq8")
    'sq8'
    """
    if name not in get_args(Encoding):
        raise unknown_name("encoding", name, get_args(Encoding))
    return cast("Encoding", name)


_MAGIC, _VERSION = b"TKQUANT", 1
_HEADER = np.dtype(
    [
        ("magic", "S8"), ("version", "<u4"), ("encoding", "S8"), ("dims", "<u4"),
        ("num_lists", "<u4"), ("num_limits", "<u4"), ("checksum", "<u8"), ("spare", "V24"),
    ]
)  # fmt: skip
_ASSIGN_ROWS = 4096  # vectors assigned at a time: bounds the matrix of their scores


class Quantizer:
    """Centroids in an order where neighbours have near numbers, and one encoding of vectors."""

    def __init__(
        self, encoding: Encoding, centroids_LD: np.ndarray, limits: np.ndarray  # noqa: N803
    ) -> None:  # fmt: skip
        """Wrap trained parts; `limits` is sq8's float32 [2 D] (lows, ranges), else empty."""
        faiss = require("faiss", extra="rag")
        self.encoding = encoding
        self.centroids_LD = np.ascontiguousarray(centroids_LD, np.float32)
        self.limits = np.ascontiguousarray(limits, np.float32)
        self.num_lists, self.dims = self.centroids_LD.shape
        self._coarse = faiss.IndexFlatIP(self.dims)
        self._coarse.add(self.centroids_LD)
        shape = (self._coarse, self.dims, self.num_lists)
        if encoding == "f32":
            self._ivf = faiss.IndexIVFFlat(*shape, faiss.METRIC_INNER_PRODUCT)
        else:
            kind = _scalar_kind(encoding)
            # Not residuals: a score must not depend on which list a vector happens to be in.
            self._ivf = faiss.IndexIVFScalarQuantizer(
                *shape, kind, faiss.METRIC_INNER_PRODUCT, False
            )
            faiss.copy_array_to_vector(self.limits, self._ivf.sq.trained)
        self._ivf.is_trained = True

    @classmethod
    def train(
        cls,
        sample_ND: np.ndarray,  # noqa: N803
        num_lists: int,
        encoding: Encoding = "f32",
        *,
        seed: int = 0,
    ) -> Quantizer:
        """Train on a sample of unit vectors [N, D]; k-means on the sphere, `seed` decides it.

        List numbers follow a greedy tour over the centroids, so that lists which one query probes
        lie near one another on disk. Raises UsageError when there are fewer vectors than lists.
        """
        find_encoding(encoding)
        if not 1 <= num_lists <= len(sample_ND):
            raise UsageError(
                f"{num_lists} lists to train from {len(sample_ND)} vectors",
                remedy=f"ask for 1 to {len(sample_ND)} lists",
            )
        faiss = require("faiss", extra="rag")
        sample_ND = np.ascontiguousarray(sample_ND, np.float32)  # noqa: N806
        flat = faiss.IndexFlatIP(sample_ND.shape[1])
        kmeans = faiss.IndexIVFFlat(
            flat, sample_ND.shape[1], num_lists, faiss.METRIC_INNER_PRODUCT
        )  # fmt: skip
        kmeans.cp.seed = seed
        kmeans.cp.spherical = True  # vectors have length 1, so centroids should
        kmeans.cp.min_points_per_centroid = 1  # few are allowed; FAISS would print warnings
        kmeans.train(sample_ND)
        centroids_LD = flat.reconstruct_n(0, num_lists)  # noqa: N806
        limits = np.empty(0, np.float32)
        if encoding == "sq8":
            scalar = faiss.ScalarQuantizer(sample_ND.shape[1], _scalar_kind(encoding))
            scalar.train(sample_ND)
            limits = faiss.vector_to_array(scalar.trained)
        return cls(encoding, centroids_LD[_tour(centroids_LD)], limits)

    @property
    def code_bytes(self) -> int:
        """The bytes of one code, C."""
        return int(self._ivf.code_size)

    @functools.cached_property
    def checksum(self) -> int:
        """XXH3-64 of everything here that decides a code or a list: segments name it."""
        shape = np.array(self.centroids_LD.shape, "<i8")
        parts = (shape.tobytes(), self.centroids_LD.tobytes(), self.limits.tobytes())
        return checksum(b"".join((self.encoding.encode(), *parts)))

    def rank(self, query_D: np.ndarray, nprobe: int) -> np.ndarray:  # noqa: N803
        """Return the numbers [nprobe] of the lists nearest to a query [D], nearest first.

        One query at a time: FAISS multiplies large batches by another routine, whose last bits
        differ, and probes must not depend on who else asks. Raises UsageError when nprobe is none
        of 1 to L.
        """
        if not 1 <= nprobe <= self.num_lists:
            raise UsageError(
                f"nprobe is {nprobe}, and the index has {self.num_lists} lists",
                remedy=f"use 1 to {self.num_lists}",
            )
        return self._coarse.search(query_D[None], nprobe)[1][0]

    def assign(self, vectors_ND: np.ndarray) -> np.ndarray:  # noqa: N803
        """Return the list that each vector [N, D] belongs to, int32 [N]."""
        out = np.empty(len(vectors_ND), np.int32)
        for start in range(0, len(vectors_ND), _ASSIGN_ROWS):
            rows = slice(start, start + _ASSIGN_ROWS)
            out[rows] = self._coarse.search(vectors_ND[rows], 1)[1][:, 0]
        return out

    def encode(self, vectors_ND: np.ndarray) -> np.ndarray:  # noqa: N803
        """Return the codes uint8 [N, C] of vectors float32 [N, D]."""
        vectors_ND = np.ascontiguousarray(vectors_ND, np.float32)  # noqa: N806
        if self.encoding == "f32":
            return vectors_ND.view(np.uint8).reshape(len(vectors_ND), self.code_bytes)
        return self._ivf.sq.compute_codes(vectors_ND)

    def decode(self, codes_NC: np.ndarray) -> np.ndarray:  # noqa: N803
        """Return the vectors float32 [N, D] that codes [N, C] stand for."""
        codes_NC = np.ascontiguousarray(codes_NC)  # noqa: N806
        if self.encoding == "f32":
            return codes_NC.view(np.float32).reshape(len(codes_NC), self.dims)
        return self._ivf.sq.decode(codes_NC)

    def scan(
        self, query_D: np.ndarray, size: int, alive: Any = None  # noqa: N803
    ) -> Scan:  # fmt: skip
        """Begin a scan for a query [D] that keeps `size` candidates (see `Scan`)."""
        return Scan(self._ivf, query_D, size, alive)

    def write(self, path: Path) -> None:
        """Write to `path`, whole or not at all."""
        header = np.zeros((), _HEADER)
        header["magic"], header["version"] = _MAGIC, _VERSION
        header["encoding"], header["dims"] = self.encoding.encode(), self.dims
        header["num_lists"], header["num_limits"] = self.num_lists, self.limits.size
        header["checksum"] = self.checksum
        body = self.centroids_LD.tobytes() + self.limits.tobytes()
        record.write_bytes(path, header.tobytes() + body)

    @classmethod
    def read(cls, path: Path) -> Quantizer:
        """Read what `write` wrote. Raises FormatError naming the file when it is not that."""
        remedy = "build the index again"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise FormatError(f"cannot read {path}: {error.strerror}", remedy=remedy) from error
        if len(data) < _HEADER.itemsize or data[: len(_MAGIC)] != _MAGIC:
            raise FormatError(f"{path} is not a quantizer file", remedy=remedy)
        header = np.frombuffer(data, _HEADER, 1)[0]
        if header["version"] != _VERSION:
            raise FormatError(
                f"{path} is version {header['version']}, this toolkit reads version {_VERSION}",
                remedy=remedy,
            )
        body = np.frombuffer(data, np.uint8)[_HEADER.itemsize :]
        num_lists, dims = int(header["num_lists"]), int(header["dims"])
        encoding = header["encoding"].decode(errors="replace")
        wanted = 4 * (num_lists * dims + int(header["num_limits"]))
        if len(body) != wanted or encoding not in get_args(Encoding):
            raise FormatError(
                f"{path} is torn: {len(body)} bytes where its header says {wanted}", remedy=remedy
            )
        values = body.view(np.float32)
        split = num_lists * dims
        found = cls(encoding, values[:split].reshape(num_lists, dims), values[split:])
        if found.checksum != header["checksum"]:
            raise FormatError(f"{path} was altered: its checksum is another", remedy=remedy)
        return found


class Scan:
    """The best candidates of one query among the codes scanned so far.

    FAISS's heap keeps the `size` best scores and, at the last place, any of those that are equal.
    So of what it holds, everything above the last score is certain, in whatever order the lists
    came; `best` says when that is not enough.
    """

    def __init__(
        self, ivf: Any, query_D: np.ndarray, size: int, alive: Any  # noqa: N803
    ) -> None:  # fmt: skip
        faiss = require("faiss", extra="rag")
        self._pointer = faiss.swig_ptr
        # The scanner keeps pointers, so what they point to must live as long as it does.
        self._kept = (ivf, np.ascontiguousarray(query_D, np.float32), alive)
        self._scanner = ivf.get_InvertedListScanner(False, alive, None)
        self._scanner.set_query(faiss.swig_ptr(self._kept[1]))
        self._scanner.set_list(0, 0.0)  # no residuals, so any list will do
        self._scores = np.full(size, -np.inf, np.float32)
        self._ids = np.full(size, -1, np.int64)
        self._heap = (faiss.swig_ptr(self._scores), faiss.swig_ptr(self._ids), size)

    def __del__(self) -> None:
        # FAISS leaves the scanner to us, and handing it to SWIG (`thisown`) crashed when collected.
        self._scanner.__swig_destroy__(self._scanner)

    def add(self, ids: np.ndarray, codes: np.ndarray) -> None:
        """Score codes (contiguous uint8 [n, C]) with their ids (int64 [n])."""
        point = self._pointer
        self._scanner.scan_codes(len(ids), point(codes), point(ids), *self._heap)

    def best(self, k: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return (scores, ids) of the best `k` by score down, then id up.

        None when equal scores at the k-th place may have been crowded out of the candidates, and a
        scan with more of them is needed.
        """
        found = self._ids >= 0
        scores, ids = self._scores[found], self._ids[found]
        order = np.lexsort((ids, -scores))
        scores, ids = scores[order], ids[order]
        crowded = found.all() and k <= len(ids) and scores[k - 1] == scores[-1]
        return None if crowded else (scores[:k], ids[:k])


def _scalar_kind(encoding: Encoding) -> int:
    scalar = require("faiss", extra="rag").ScalarQuantizer
    return int({"f16": scalar.QT_fp16, "sq8": scalar.QT_8bit}[encoding])


def _tour(centroids_LD: np.ndarray) -> np.ndarray:  # noqa: N803
    """Return an order of the centroids that goes on to the nearest one not visited yet.

    >>> _tour(np.array([[1, 0], [0, 1], [0.9, 0.1], [0.1, 0.9]], np.float32)).tolist()
    [0, 2, 3, 1]
    """
    order = np.empty(len(centroids_LD), np.int64)
    left = np.zeros(len(centroids_LD), np.float32)  # -inf once visited
    here = 0
    for step in range(len(order)):
        order[step] = here
        left[here] = -np.inf
        here = int(np.argmax(centroids_LD @ centroids_LD[here] + left))
    return order
