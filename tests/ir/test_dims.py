"""Every annotation is true: an operator run in parts and put together is the operator run whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from toolkit import ir
from toolkit.errors import UsageError
from toolkit.ir import dims, interpret

# Drawn at random, so no two runs are equal.
_RANDOM = {"aten.dropout", "aten.rand"}


def _inputs(op: ir.Op, graph: ir.OpGraph) -> dict[str, torch.Tensor]:
    """Random values a tensor could hold; ids are small enough for any table."""
    found = {}
    for tensor in {t.name: t for t in graph.input_tensors(op)}.values():
        dtype = getattr(torch, tensor.dtype)
        if dtype == torch.bool:
            value = torch.rand(tensor.shape) > 0.5
        elif not dtype.is_floating_point:
            value = torch.randint(0, 2, tensor.shape, dtype=dtype)
        else:
            value = torch.randn(tensor.shape, dtype=torch.float64)
        found[tensor.name] = value
    return found


def _part(
    op: ir.Op, whole: dict[str, torch.Tensor], plan: dims.Partition, num: int, index: int
) -> dict[str, torch.Tensor] | None:
    """The tensors of one part; None when one tensor would have to be cut in two ways at once."""
    part: dict[str, torch.Tensor] = {}
    for name, how in zip(op.inputs, plan.inputs, strict=True):
        value = whole[name]
        if how == dims.VALUE:
            value = value / num
        elif how is not None:
            value = value.chunk(num, how)[index]
        if name in part and not torch.equal(part[name], value):
            return None
        part[name] = value
    return part


def check_splits(op: ir.Op, graph: ir.OpGraph) -> int:
    """Compare whole and parts along every identifier; return how many were compared."""
    found = dims.annotation(op, graph)
    whole_in = _inputs(op, graph)
    whole = interpret.call(op, {name: value.clone() for name, value in whole_in.items()})
    compared = 0
    for name in found.splittable:
        num = next(n for n in range(2, found.sizes[name] + 1) if found.sizes[name] % n == 0)
        plan = found.partition(name)
        arguments = dims.local_arguments(op, found, name, num)
        parts = [_part(op, whole_in, plan, num, index) for index in range(num)]
        if None in parts:
            continue
        outputs = [
            interpret.call(op, {key: value.clone() for key, value in part.items()}, arguments)
            for part in parts
            if part is not None
        ]
        for index, how in enumerate(plan.outputs):
            pieces = [made[index] for made in outputs]
            if how == dims.SUM:
                together = torch.stack(pieces).sum(0)
            else:
                together = pieces[0] if how is None else torch.cat(pieces, how)
            torch.testing.assert_close(
                together,
                whole[index],
                equal_nan=True,
                msg=lambda text: f"{op.name} {found}: {text}",
            )
        compared += 1
    return compared


def test_every_operator_of_every_model_splits_as_annotated(traced):
    torch.manual_seed(0)
    seen: set[tuple[str, str, str]] = set()
    compared = 0
    for op in traced.graph.ops:
        key = (op.target, str(dims.annotation(op, traced.graph)),
               str([traced.graph.tensors[name].shape for name in op.inputs]))  # fmt: skip
        if key in seen or op.kind in _RANDOM or op.arguments.get("dropout_p"):
            continue
        seen.add(key)
        compared += check_splits(op, traced.graph)
    assert compared > 30


def test_the_zoo_has_no_operator_without_a_rule(subject):
    for name in ("gpt-tiny", "llama-tiny", "swin-nano", "t5-tiny", "evoformer-tiny"):
        assert dims.unannotated(subject(f"zoo:{name}").graph) == ()


def _single(module: nn.Module, *inputs: torch.Tensor, kind: str) -> tuple[ir.Op, ir.OpGraph]:
    graph = ir.trace(module, inputs, name="model", axes={})
    (op,) = [op for op in graph.ops if op.kind == f"aten.{kind}"]
    return op, graph


def test_a_bias_is_shared_out_when_the_sum_is_split():
    op, graph = _single(nn.Linear(8, 6), torch.zeros(2, 5, 8), kind="linear")
    found = dims.annotation(op, graph)
    assert str(found) == "a b k+, n k+, ~n -> a b n"
    assert found.partition("k") == dims.Partition((2, 1, "value"), ("sum",))
    assert found.partition("n") == dims.Partition((None, 0, 0), (2,))
    assert found.partition("a") == dims.Partition((0, None, None), (0,))
    # The trap: copied instead of shared out, the bias would count twice.
    tensors = _inputs(op, graph)
    whole = interpret.call(op, tensors)[0]
    x, weight, bias = op.inputs
    wrong = sum(
        interpret.call(op, {x: tensors[x].chunk(2, 2)[i], weight: tensors[weight].chunk(2, 1)[i],
                            bias: tensors[bias]})[0]
        for i in range(2)
    )  # fmt: skip
    torch.testing.assert_close(wrong, whole + tensors[bias])
    assert check_splits(op, graph) == 4


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((2, 6, 12), (2, 6, 3, 4), "c b (d a^) -> c b d a^"),
        ((2, 6, 3, 4), (12, 12), "(d c^) (b a^) -> (d c^) (b a^)"),
        ((4, 6), (6, 4), None),
        ((5, 4, 6), (5, 6, 4), None),
        ((1, 8), (2, 1, 4), "1 (b a^) -> b 1 a^"),
    ],
)
def test_reshapes_share_factors(before, after, expected):
    class Model(nn.Module):
        def forward(self, x):
            return x.reshape(after)

    op, graph = _single(Model(), torch.zeros(before), kind="reshape")
    found = dims.annotation(op, graph)
    assert found.known
    check_splits(op, graph)
    for name in found.splittable:
        plan = found.partition(name)
        assert plan.inputs[0] is not None
        assert plan.outputs[0] is not None
    if expected and "d" in expected:
        merged = {axis[0] for spec in (*found.inputs, *found.outputs) for axis in spec if axis}
        assert set(found.splittable) <= merged
    if before == (5, 4, 6):
        # What does not factor spoils its own group only.
        assert len(found.splittable) == 1


def test_grouped_heads_split_by_group():
    class Model(nn.Module):
        def forward(self, q, k):
            return nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    shapes = torch.zeros(2, 8, 5, 4), torch.zeros(2, 2, 7, 4)
    op, graph = _single(Model(), *shapes, kind="scaled_dot_product_attention")
    found = dims.annotation(op, graph)
    assert str(found) == "b (g n^) t d^, b g s^ d^, b g s^ e^ -> b (g n^) t e^"
    assert check_splits(op, graph) == 3


def test_a_causal_mask_made_inside_ties_queries_to_their_places():
    class Model(nn.Module):
        def forward(self, q):
            return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    op, graph = _single(Model(), torch.zeros(2, 2, 6, 4), kind="scaled_dot_product_attention")
    assert dims.annotation(op, graph).splittable == ("b", "h")


def test_means_do_not_add_up_and_sums_do():
    class Model(nn.Module):
        def forward(self, x):
            return x.mean(-1), x.sum(-1)

    graph = ir.trace(Model(), (torch.zeros(4, 6),), name="model", axes={})
    mean, total = (dims.annotation(op, graph) for op in graph.ops)
    assert (str(mean), str(total)) == ("a b^ -> a", "a b+ -> a")
    assert all(check_splits(op, graph) for op in graph.ops)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_loss_splits_by_rows_unless_it_is_a_mean(reduction):
    class Model(nn.Module):
        def forward(self, logits, target):
            return nn.functional.cross_entropy(logits, target, reduction=reduction)

    op, graph = _single(Model(), torch.zeros(6, 5), torch.zeros(6, dtype=torch.long),
                        kind="cross_entropy_loss")  # fmt: skip
    assert len(dims.annotation(op, graph).splittable) == (0 if reduction == "mean" else 1)
    check_splits(op, graph)


class _Zoo(nn.Module):
    """Operators that the models above do not happen to split."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 4, 3, padding=1)
        self.table = nn.Parameter(torch.randn(8, 6))

    def forward(self, x, ids):
        y = self.conv(x)
        z = torch.einsum("bchw,bdhw->bcd", y, x)
        z = torch.baddbmm(z, z, torch.randn(2, 6, 6)) + torch.addmm(z[0], z[0], z[0].new_ones(6, 6))
        z = z + self.table[ids].sum(0) + torch.stack([z[0], z[1]]).flip(0)
        w = torch.gather(z, 1, ids.view(1, 2, 1).expand(2, 2, 6)).cumsum(1)
        a, b = z.split(3, dim=2)
        c, d = z.unbind(0)
        return (w.sort(-1)[0], torch.cat([a, b], 2).tril(), c.T @ d, z.roll(1, 2),
                nn.functional.pad(z, (1, 1)), z.squeeze(0), z.amax(2), z.var(2), z.logsumexp(1),
                z.unflatten(2, (2, 3)), torch.full_like(z, 2.0), z.repeat(1, 1, 1))  # fmt: skip


def test_other_operators_split_as_annotated():
    torch.manual_seed(0)
    inputs = torch.zeros(2, 6, 4, 4), torch.tensor([1, 0])
    graph = ir.trace(_Zoo(), inputs, name="zoo", axes={})
    assert sum(check_splits(op, graph) for op in graph.ops if op.kind != "aten.randn") > 20
    # What has no rule is named, and nothing of it can be split.
    unknown = {op.kind for op in dims.unannotated(graph)}
    assert unknown == {"aten.repeat"}
    for op in dims.unannotated(graph):
        assert dims.annotation(op, graph).splittable == ()


def test_what_cannot_be_split_is_an_error_that_says_what_can():
    op, graph = _single(nn.Linear(8, 6), torch.zeros(2, 8), kind="linear")
    found = dims.annotation(op, graph)
    with pytest.raises(UsageError, match="these can: a, k, n"):
        found.partition("z")
    with pytest.raises(UsageError, match="4 parts do not divide n=6"):
        dims.local_arguments(op, found, "n", 4)
