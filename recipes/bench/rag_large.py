"""Lookahead on an index larger than memory: real vectors, and copies of them moved a little.

    python recipes/bench/rag_large.py make REAL_INDEX LARGE --vectors 5200000 --nlist 2048
    python recipes/bench/rag_large.py run REAL_INDEX LARGE --queries FILE --url URL
        --nprobe 256 --memory 2GiB --output part-1.json
    python recipes/bench/rag_large.py report part-*.json

REAL_INDEX is an index that `toolkit rag build` made. LARGE gets its vectors and, to fill up,
distractors: real vectors plus noise of a given length, made unit again. They stand for no document;
when a search finds one, the passage of the vector it was made from is shown. So this measures
reading and scanning at a size, and says nothing about quality.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from toolkit import record, units
from toolkit.cli import view
from toolkit.cli.rag import ask
from toolkit.cli.rag import bench as showing
from toolkit.errors import require
from toolkit.rag import Encoder, Passage, Retriever, bench, changes
from toolkit.rag.prefetch import Ahead
from toolkit.rag.quantizer import Quantizer
from toolkit.rag.store import Store
from toolkit.rag.tiers import Tiers

_BATCH = 65_536
_NOISE = 0.35  # length of what is added to a unit vector: cosine to it about 0.94


def vectors_of(store: Store) -> np.ndarray:
    """Return all vectors of a store, float32 [N, D], by id."""
    out = np.zeros((store.manifest.next_id, store.quantizer.dims), np.float32)
    for segment in store.segments:
        for number in range(store.quantizer.num_lists):
            ids, codes = segment.read(number)
            out[ids] = store.quantizer.decode(codes)
    return out


def batches(real: np.ndarray, num_vectors: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the real vectors, then distractors: vector i is made from real vector i % len(real)."""
    draw = np.random.default_rng(seed)
    for start in range(0, num_vectors, _BATCH):
        rows = np.arange(start, min(start + _BATCH, num_vectors))
        part = real[rows % len(real)].copy()
        if rows[-1] >= len(real):
            noise = draw.standard_normal(part.shape, dtype=np.float32)
            noise *= _NOISE / np.linalg.norm(noise, axis=1, keepdims=True)
            noise[rows < len(real)] = 0
            part += noise
            part /= np.linalg.norm(part, axis=1, keepdims=True)
        yield part


class Large(Retriever):
    """Searches the large store; passages are those of the real one."""

    def __init__(self, store: Store, encoder: Encoder, tiers: Tiers, real: Store) -> None:
        super().__init__(store, encoder, tiers)
        self._real = real

    def passage(self, passage_id: int, store: Store | None = None) -> Passage:
        """Return the passage that an id stands for."""
        return self._real.passage(passage_id % self._real.manifest.next_id)


def make(options: argparse.Namespace) -> None:
    """Train, assign and write the large store."""
    torch.set_num_threads(2)
    require("faiss", extra="rag").omp_set_num_threads(2)
    real = vectors_of(Store.open(options.real))
    start_s = time.perf_counter()
    draw = np.random.default_rng(0)
    sample = real[draw.choice(len(real), min(len(real), 64 * options.nlist), replace=False)]
    quantizer = Quantizer.train(sample, options.nlist, options.encoding)
    trained_s = time.perf_counter()
    changes.create(options.large, quantizer)
    changes.add(options.large, batches(real, options.vectors, seed=1), memory_bytes=units.GIB)
    end_s = time.perf_counter()
    store = Store.open(options.large)
    sizes = store.segments[0].sizes
    print(
        f"{len(real):,} real vectors, {options.vectors:,} in all, "
        f"{units.format_bytes(store.num_bytes_held)}; lists of "
        f"{units.format_bytes(float(np.median(sizes)))} (median), largest "
        f"{units.format_bytes(float(sizes.max()))}; training {trained_s - start_s:.0f} s, "
        f"writing {end_s - trained_s:.0f} s, peak RSS {_peak()}"
    )


def run(options: argparse.Namespace) -> None:
    """Compare the arms; print the table, and save everything where asked."""
    torch.set_num_threads(1)
    require("faiss", extra="rag").omp_set_num_threads(options.threads)
    real, store = Store.open(options.real), Store.open(options.large)
    recipe = real.manifest.recipe
    assert recipe is not None
    encoder = Encoder.matching(recipe.encoder)
    speaker = ask.generator(options.url, None, 120.0)
    chosen = bench.find_arms(options.arms)
    retrievers: dict[bench.Arm, Retriever] = {}
    budget_bytes = units.parse_bytes(options.memory)
    shared = Large(store, encoder, Tiers(store, budget_bytes=budget_bytes), real)
    for arm in chosen:
        if arm == "faiss":
            folder = options.large.with_name(options.large.name + "-faiss")
            retrievers[arm] = bench.FaissOnDisk(shared, folder, threads=options.threads)
        elif arm == "ram":
            tiers = Tiers(store, budget_bytes=store.num_bytes_held + units.MIB)
            retrievers[arm] = Large(store, encoder, tiers, real)
        else:
            retrievers[arm] = shared
    texts = [line for line in options.queries.read_text().splitlines() if line.strip()]
    texts = texts[options.skip : options.skip + options.num_queries]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    runs = bench.measure(
        retrievers, lambda question: speaker, texts, pipeline=options.pipeline,
        nprobe=options.nprobe, multiple=options.multiple, answer_tokens=options.answer_tokens,
        progress=lambda done: view.err.print(f"{done} of {len(texts)}"),
    )  # fmt: skip
    title = f"{options.pipeline}, {len(texts)} questions, nprobe {options.nprobe}, "
    showing.show(runs, title + options.memory, as_json=False)
    print(f"peak RSS {_peak()}, before the first question {units.format_bytes(1024 * before)}")
    if options.output:
        body = {"options": {k: str(v) for k, v in vars(options).items()},
                "runs": [asdict(each) for each in runs]}  # fmt: skip
        record.write(options.output, kind="rag-bench", version=1, body=json.loads(json.dumps(body)))


def report(options: argparse.Namespace) -> None:
    """Print one table of runs that were saved in parts."""
    runs: list[bench.Run] = []
    for part in options.parts:
        body = record.read(part, kind="rag-bench", version=1)["body"]
        for each in body["runs"]:
            aheads = tuple(Ahead(**ahead) for ahead in each.pop("aheads"))
            ids = tuple(each.pop("ids"))
            runs.append(bench.Run(**each, aheads=aheads, ids=ids))
    title = f"{len(runs)} runs of {', '.join(part.name for part in options.parts)}"
    showing.show(runs, title, as_json=False)
    arms = [each.arm for each in bench.summarise(runs)]
    for over in arms:
        for under in arms:
            if over != under and arms.index(over) < arms.index(under):
                found = np.array(bench.ratios(runs, over, under))
                low, middle, high = np.percentile(found, [10, 50, 90])
                print(f"{over} / {under}: {middle:.2f} (10 % {low:.2f}, 90 % {high:.2f})")


def _peak() -> str:
    return units.format_bytes(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    verbs = parser.add_subparsers(required=True)
    making = verbs.add_parser("make")
    making.add_argument("real", type=Path)
    making.add_argument("large", type=Path)
    making.add_argument("--vectors", type=int, default=5_200_000)
    making.add_argument("--nlist", type=int, default=2048)
    making.add_argument("--encoding", default="f32")
    making.set_defaults(do=make)
    running = verbs.add_parser("run")
    running.add_argument("real", type=Path)
    running.add_argument("large", type=Path)
    running.add_argument("--queries", type=Path, required=True)
    running.add_argument("--url", required=True)
    running.add_argument("--pipeline", default="hyde")
    running.add_argument("--arms", default=",".join(bench.ARMS))
    running.add_argument("--num-queries", type=int, default=20)
    running.add_argument("--skip", type=int, default=0)
    running.add_argument("--nprobe", type=int, default=256)
    running.add_argument("--multiple", type=float, default=2.0)
    running.add_argument("--memory", default="2GiB")
    running.add_argument("--answer-tokens", type=int, default=32)
    running.add_argument("--threads", type=int, default=1)
    running.add_argument("--output", type=Path)
    running.set_defaults(do=run)
    reporting = verbs.add_parser("report")
    reporting.add_argument("parts", type=Path, nargs="+")
    reporting.set_defaults(do=report)
    options = parser.parse_args()
    options.do(options)


if __name__ == "__main__":
    main()
