"""The cost model: more units are never slower, and the memory is shared out once."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit import ir, models
from toolkit.cost.roofline import Saturation, default_coefficients
from toolkit.errors import UsageError
from toolkit.hardware import find_device
from toolkit.ir import formulas
from toolkit.serve.batch import Slice
from toolkit.serve.request import Phase, Request, SamplingParams
from toolkit.serve.split.correction import Correction
from toolkit.serve.split.cost_model import NOTHING, CostModel
from toolkit.serve.split.traced import model_work
from toolkit.serve.split.work import Load

sys.path.append(str(Path(__file__).parent))
from split_cases import cost_model

COST = cost_model()

prefills = st.builds(
    lambda start, num: Load.chunk(start, start + num, samples=1),
    st.integers(0, 20_000),
    st.integers(1, 4096),
)
decodes = st.builds(
    lambda num, mean: Load.decoding(num, num * mean), st.integers(1, 256), st.integers(1, 20_000)
)
shares = st.floats(0.02, 1.0)


class TestWork:
    def test_a_load_counts_what_its_slices_compute(self) -> None:
        request = Request("a", range(10), SamplingParams())
        pieces = (Slice(request, Phase.PREFILL, 0, 4), Slice(request, Phase.PREFILL, 4, 10))
        assert Load.of(pieces) == Load(2, 10, 14, 55, 1)
        # In chunks or at once, as many pairs are attended to.
        assert Load.of(pieces).pairs == Load.chunk(0, 10).pairs

    def test_decoding_is_a_chunk_of_one_token_each(self) -> None:
        one = Load.chunk(6, 7, samples=1) + Load.chunk(11, 12, samples=1)
        assert one == Load.decoding(2, 19)


@pytest.fixture(scope="module")
def traced() -> ir.OpGraph:
    return ir.trace_model(models.load("llama-tiny"), training=False, targets=False)


class TestTraced:
    def test_products_cost_what_the_graph_says(self, traced: ir.OpGraph) -> None:
        made = model_work(traced)
        graph = traced.at(batch=3, tokens=5, context=40)
        load = Load(3, 15, 120, 600, 15)  # all pairs and all logits, as the graph counts
        works = [formulas.work(op, graph) for op in graph.ops]
        for op_class in ("matmul", "attention", "gather"):
            wanted = [work for work in works if work.op_class == op_class]
            kernels = [kernel for kernel in made.kernels if kernel.op_class == op_class]
            assert sum(kernel.count for kernel in kernels) == len(wanted)
            assert sum(k.count * k.flops.at(load) for k in kernels) == pytest.approx(
                sum(work.flops for work in wanted)
            )
            assert sum(k.count * k.moved_bytes.at(load) for k in kernels) == pytest.approx(
                sum(work.moved_bytes for work in wanted)
            )

    def test_what_lies_between_products_is_fused(self, traced: ir.OpGraph) -> None:
        made = model_work(traced)
        graph = traced.at(batch=1, tokens=8, context=8)
        load = Load(1, 8, 8, 64, 8)
        eager = sum(formulas.work(op, graph).moved_bytes for op in graph.ops)
        assert 0.4 * eager < made.moved_bytes(load) < eager
        # A layer: norm, q, k, v, rotation, attention, heads joined, o, norm, gate, its silu, up,
        # their product, down; and an embedding, a norm and a head.
        assert made.num_launches == 4 * 14 + 3
        assert len(made.kernels) <= 16

    def test_weights_and_cache_are_the_models(self, traced: ir.OpGraph) -> None:
        made = model_work(traced)
        assert made.weight_bytes == sum(each.num_bytes for each in traced.parameters())
        assert made.kv_bytes_per_token == 2 * 4 * 2 * 32 * 4  # layers, heads, head size, float32
        per_step = sum(kernel.count * kernel.moved_bytes.constant for kernel in made.kernels)
        embedding = 512 * 128 * 4
        assert per_step == pytest.approx(made.weight_bytes - embedding, rel=0.01)

    def test_logits_are_of_the_tokens_drawn(self, traced: ir.OpGraph) -> None:
        made = model_work(traced)
        one, all_ = (made.flops(Load(1, 100, 100, 5050, num)) for num in (1, 100))
        assert all_ - one == pytest.approx(99 * 2 * 128 * 512)

    def test_other_architectures(self) -> None:
        graph = ir.trace_model(models.load("gpt-tiny"), training=False, targets=False)
        made = model_work(graph)
        assert made.kv_bytes_per_token == 2 * 4 * 128 * 4

    def test_what_is_no_decoder_is_refused(self, traced: ir.OpGraph) -> None:
        with pytest.raises(UsageError, match="no decoder"):
            model_work(ir.trace_model(models.load("swin-nano"), training=False, targets=False))
        with pytest.raises(UsageError, match="inference"):
            model_work(replace(traced, training=True))


class TestAlone:
    @settings(max_examples=300, deadline=None)
    @given(prefills | decodes, shares, shares, st.sampled_from([None, *Phase]))
    def test_more_units_are_never_slower(self, load, one, two, phase) -> None:
        low, high = sorted((one, two))
        assert COST.alone(load, phase, high).seconds <= COST.alone(load, phase, low).seconds * (
            1 + 1e-12
        )

    @given(prefills | decodes, st.floats(0.01, 0.99))
    def test_it_is_continuous_at_the_saturation(self, load, point) -> None:
        bends = Saturation(point, 0.3)
        profile = {
            kind: replace(
                default_coefficients(kind, COST.device),
                compute_saturation=bends,
                memory_saturation=bends,
            )
            for kind in ("matmul", "attention")
        }
        cost = CostModel(COST.model, COST.device, profiles={Phase.PREFILL: profile})
        below, above = (cost.alone(load, Phase.PREFILL, point + by).seconds for by in (-1e-9, 1e-9))
        assert below == pytest.approx(above, rel=1e-6)

    @given(prefills, st.integers(1, 500))
    def test_more_tokens_are_never_faster(self, load, more) -> None:
        longer = load + Load(0, more, more, more * load.context, 0)
        assert COST.alone(longer).seconds >= COST.alone(load).seconds

    def test_nothing_takes_nothing(self) -> None:
        assert COST.alone(Load()) is NOTHING
        assert COST.undivided(Load(), Load()) == 0

    def test_weights_are_read_once_in_a_mixed_step(self) -> None:
        chunk, tokens = Load.chunk(0, 256, samples=1), Load.decoding(8, 8000)
        apart = COST.alone(chunk).seconds + COST.alone(tokens).seconds
        assert COST.undivided(chunk, tokens) < 0.8 * apart

    def test_a_mixed_step_may_be_known_to_be_slower(self) -> None:
        chunk, tokens = Load.chunk(0, 256, samples=1), Load.decoding(8, 8000)
        slow = cost_model(mixed_factor=1.7)
        assert slow.undivided(chunk, tokens) == pytest.approx(1.7 * COST.undivided(chunk, tokens))
        assert slow.undivided(chunk, Load()) == COST.undivided(chunk, Load())
        with pytest.raises(UsageError, match="1 or more"):
            cost_model(mixed_factor=0.5)


class TestBeside:
    @settings(max_examples=300, deadline=None)
    @given(prefills, decodes, st.floats(0.05, 0.95))
    def test_the_other_phase_only_slows(self, prefill, decode, share) -> None:
        first = COST.alone(prefill, Phase.PREFILL, share)
        second = COST.alone(decode, Phase.DECODE, 1 - share)
        with_prefill, with_decode = COST.divided(prefill, decode, share)
        assert with_prefill >= first.seconds * (1 - 1e-12)
        assert with_decode >= second.seconds * (1 - 1e-12)
        assert COST.decode_bandwidth(first, second) <= COST.bandwidth * (1 + 1e-9)

    @settings(max_examples=300, deadline=None)
    @given(prefills, decodes, st.floats(0.05, 0.95), st.floats(0.05, 0.95))
    def test_more_units_for_a_phase_never_slow_it(self, prefill, decode, one, two) -> None:
        """Though the other then has fewer: it draws less on the memory, too."""
        low, high = sorted((one, two))
        few, many = COST.divided(prefill, decode, low), COST.divided(prefill, decode, high)
        assert many[0] <= few[0] * (1 + 1e-9)
        assert few[1] <= many[1] * (1 + 1e-9)

    def test_nothing_beside_is_nothing(self) -> None:
        decode = COST.alone(Load.decoding(8, 16_000), Phase.DECODE, 0.5)
        assert COST.beside(decode, NOTHING) == decode.seconds
        free = COST.decode_bandwidth(NOTHING, decode)
        quiet = COST.alone(Load.chunk(0, 1), Phase.PREFILL, 1.0)
        quiet = replace(
            quiet, attention=NOTHING.attention, dense=quiet.dense._replace(moved_bytes=1.0)
        )
        assert COST.decode_bandwidth(quiet, decode) == pytest.approx(free)

    def test_what_draws_more_slows_more(self) -> None:
        """Small chunks read the weights for fewer FLOPs, and so draw more on the memory."""
        decode = COST.alone(Load.decoding(16, 16 * 2000), Phase.DECODE, 0.5)
        slowed = [
            COST.beside(decode, COST.alone(Load.chunk(0, num), Phase.PREFILL, 0.5)) / decode.seconds
            for num in (2048, 512, 128, 32)
        ]
        assert slowed == sorted(slowed)
        assert 1.0 <= slowed[0] < 1.1 < slowed[-1] < 2.0

    def test_decode_is_nearly_flat_beyond_half_of_the_units(self) -> None:
        """Nexus, section 3: less than 3 % for each further tenth."""
        decode = Load.decoding(32, 32 * 3000)
        times = [COST.alone(decode, Phase.DECODE, tenth / 10).seconds for tenth in (5, 6, 7, 8)]
        for before, after in itertools.pairwise(times):
            assert 1.0 <= before / after < 1.04


class TestCorrection:
    @given(st.floats(0.2, 5.0), st.floats(0.05, 1.0))
    def test_a_constant_error_is_learnt(self, bias, weight) -> None:
        correction = Correction(weight=weight, kept=8)
        for _ in range(int(12 / weight) + 8):
            correction.observe(model_s=2.0, measured_s=2.0 * bias)
        assert correction.apply(1.0) == pytest.approx(bias, rel=1e-3)
        assert correction.errors is not None
        assert correction.errors.maximum < 0.01

    def test_a_fault_of_the_clock_does_little(self) -> None:
        correction = Correction(weight=0.1)
        correction.observe(model_s=1e-9, measured_s=1e3)
        assert correction.ratio <= 2.0
        correction.observe(model_s=0.0, measured_s=1.0)
        correction.observe(model_s=1.0, measured_s=0.0)
        assert correction.num_observed == 1
        assert Correction().errors is None


def test_a_device_without_the_dtype_says_so() -> None:
    volta = CostModel(COST.model, find_device("v100"))
    with pytest.raises(UsageError, match="bfloat16"):
        volta.alone(Load.chunk(0, 8))
