"""compress, plans, coverage, order, replay, and errors that lose nothing."""

import json
import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import lightning_compress as lc
from lightning_compress import codes
from lightning_compress.codes import Code, same_bits
from lightning_compress.plans import Plan, from_json, to_json
from lightning_compress.transform import OrderError, Step, Transform, applied, replay


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


@dataclass(frozen=True)
class Truncate(Transform):
    """A structural transform of a user: keeps the first ``keep`` outputs of every Linear."""

    keep: int = 2
    structural: ClassVar[bool] = True

    def plan(self, model, data=None):
        names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        return Plan({n: {"keep": list(range(self.keep))} for n in names})

    def apply(self, model, plan):
        for name, decided in plan.layers.items():
            layer = model.get_submodule(name)
            rows = decided["keep"]
            layer.weight = nn.Parameter(layer.weight.detach()[rows].clone())
            layer.bias = nn.Parameter(layer.bias.detach()[rows].clone())
            layer.out_features = len(rows)


def test_compress_leaves_the_model_alone_and_keeps_parameters_in_place_when_asked():
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = lc.compress(model, [lc.Prune(0.5)])
    assert all(same_bits(before[k], v) for k, v in model.state_dict().items())
    assert not list(codes.of(model)) and not list(applied(model))
    ids = [id(p) for p in model.parameters()]
    inplace = lc.compress(model, [lc.Prune(0.5)], inplace=True)
    assert inplace.model is model and [id(p) for p in model.parameters()] == ids
    assert list(model.state_dict()) == list(before)
    assert all(
        same_bits(a, b)
        for a, b in zip(model.state_dict().values(), result.model.state_dict().values(), strict=True)
    )
    assert [s.name for _, s in applied(model)] == ["Prune"]


def test_an_error_half_way_leaves_an_inplace_model_as_it_was():
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match="fits no layer"):
        lc.compress(model, [lc.Prune(0.5), lc.Prune(0.6, include="head")], inplace=True)
    assert all(same_bits(before[k], v) for k, v in model.state_dict().items()) and not list(applied(model))


def test_the_result_says_what_was_done():
    result = lc.compress(net(), [lc.Prune(0.5)], example_input=torch.randn(1, 1, 4, 4))
    weights = 36 + 48
    assert (
        result.before.zeros == 4 and result.after.zeros == 42 + 4
    )  # the four BatchNorm biases start at zero
    assert set(result.coverage.changed) == {"0.weight", "4.weight"}
    assert result.coverage.share == pytest.approx(weights * 4 / sum(p.nbytes for p in net().parameters()))
    assert result.after.macs == result.before.macs == 4 * 9 * 4 + 48
    text = str(result)
    assert (
        "46" in text
        and "0.weight" not in text.split("left alone")[0].splitlines()[0]
        and "not a registered weight" in text
    )
    assert len(result.plan) == 1 and result.steps[0].config["sparsity"] == 0.5


def test_sparse_buffers_do_no_harm():
    model = net()
    model.register_buffer("graph", torch.eye(3).to_sparse())
    assert lc.compress(model, [lc.Prune(0.5)], example_input=torch.randn(1, 1, 4, 4)).coverage.changed
    with pytest.raises(lc.archive.ArchiveError, match=r"'graph' has dtype .* and layout torch.sparse_coo"):
        lc.save(model, "net.lcz")


def test_nothing_changed_is_an_error_with_the_reasons():
    with pytest.raises(lc.NothingChangedError, match="Prune changed nothing: the model has no parameters"):
        lc.compress(nn.ReLU(), [lc.Prune(0.5)])
    with pytest.raises(
        lc.NothingChangedError, match=r"(?s)no layer fits:.*weight, bias: not a registered weight"
    ):
        lc.compress(nn.BatchNorm1d(3), [lc.Prune(0.5)])
    with pytest.raises(lc.NothingChangedError, match=r"0\.weight, 0\.bias: excluded by '0'"):
        lc.compress(nn.Sequential(nn.Linear(2, 2)), [lc.Prune(0.5, exclude="0")])


def test_a_transform_that_throws_its_work_away_is_caught():
    @dataclass(frozen=True)
    class NoOp(Transform):
        def plan(self, model, data=None):
            return Plan({"0.weight": {}})

        def apply(self, model, plan):
            _ = model[0].weight * 0

    with pytest.raises(lc.NothingChangedError, match="NoOp changed nothing"):
        lc.compress(net(), [NoOp()])


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "has 1 of 36 entries that are not finite"), (-float("inf"), "has 1 of 36")],
)
def test_non_finite_weights_are_named(value, message):
    model = net()
    model[0].weight.data[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"0\.weight " + message):
        lc.compress(model, [lc.Prune(0.5)])


def test_meta_weights_and_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"weight is on the meta device"):
        lc.compress(nn.Linear(2, 2, device="meta"), [lc.Prune(0.5)])
    with pytest.raises(TypeError, match=r"transforms holds 'prune'; allowed are instances of: .*Prune"):
        lc.compress(net(), ["prune"])


@dataclass(frozen=True, eq=False)
class Grid(Code):
    """A code of the stage "grid"."""

    kind: ClassVar[str] = ""
    stage: ClassVar[str] = "grid"

    def arrays(self, weight):
        return {"w": weight}

    def rebuild(self, arrays, dtype):
        return arrays["w"]

    def bits(self, weight):
        return 8 * weight.numel()


def test_illegal_orders_are_refused_before_any_work():
    model = net()
    codes.attach(model[4], "weight", Grid())
    with pytest.raises(
        OrderError, match=r"Prune after the .* code of 4\.weight is refused: new zeros would leave the grid"
    ):
        lc.compress(model, [lc.Prune(0.5)])


def test_plans_and_steps_survive_json():
    tensors = {
        "mask": torch.tensor([[True, False, True]]),
        "empty": torch.zeros(0, 3, dtype=torch.bool),
        "kept": torch.tensor([1, 5], dtype=torch.int64),
        "scale": torch.tensor(0.1),
    }
    plan = Plan(
        {"a.weight": {**tensors, "rank": 3, "names": ["x", None], "deep": {"y": [1.5]}}},
        {"b": "why"},
        True,
        "data",
    )
    back = from_json(json.loads(json.dumps(to_json(plan))))
    for key, tensor in tensors.items():
        assert same_bits(back.layers["a.weight"][key], tensor)
    assert {k: v for k, v in back.layers["a.weight"].items() if k not in tensors} == {
        "rank": 3,
        "names": ["x", None],
        "deep": {"y": [1.5]},
    }
    assert (back.skipped, back.identity, back.data) == (plan.skipped, plan.identity, plan.data)
    with pytest.raises(TypeError, match="not set"):
        to_json(Plan({"a": {"x": {1}}}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.pop("layers"),
        lambda p: p.update(layers=[1]),
        lambda p: p["layers"]["a"]["m"].update(shape=[9]),
        lambda p: p["layers"]["a"]["m"].update(shape=[-1]),
        lambda p: p["layers"]["a"]["m"].update(dtype="object"),
        lambda p: p["layers"]["a"]["m"].update(zlib="!!"),
        lambda p: p["layers"]["a"]["m"].update(zlib="AAAA"),
    ],
)
def test_damaged_plans_are_refused(damage):
    plan = to_json(Plan({"a": {"m": torch.ones(100, dtype=torch.bool)}}))
    damage(plan)
    with pytest.raises(ValueError, match="stored"):
        from_json(plan)


def test_structure_is_replayed_on_a_fresh_model_once():
    result = lc.compress(net(), [Truncate(keep=2), lc.Prune(0.5)])
    fresh = net()
    steps = [
        (prefix, Step.from_json(json.loads(json.dumps(s.to_json())))) for prefix, s in applied(result.model)
    ]
    assert [s.name for s in replay(fresh, steps)] == ["Truncate"]
    assert replay(fresh, steps) == []
    fresh.load_state_dict(result.model.state_dict())
    wrapped = nn.ModuleDict({"body": net()})
    assert replay(wrapped, [("body", s) for _, s in steps]) and wrapped["body"][4].out_features == 2
    assert [p for p, _ in applied(wrapped)] == ["body"]
    with pytest.raises(ValueError, match="applied to 'head', which this Sequential does not have"):
        replay(net(), [("head", steps[0][1])])


def test_two_equal_structural_steps_are_both_replayed():
    model = net()
    for keep in (2, 1):
        lc.compress(model, [Truncate(keep)], inplace=True)
    fresh = net()
    assert len(replay(fresh, applied(model))) == 2


def test_unknown_and_malformed_steps_are_refused():
    step = lc.compress(net(), [Truncate()]).steps[0].to_json()
    with pytest.raises(ValueError, match=r"transform 'Shrink' is unknown here; known: .*Prune"):
        Step.from_json({**step, "name": "Shrink"})
    for key in ("name", "plan", "coverage", "config"):
        with pytest.raises(ValueError, match="malformed"):
            Step.from_json({k: v for k, v in step.items() if k != key})


def test_steps_and_codes_travel_with_copies():
    model = lc.compress(net(), [Truncate(), lc.Prune(0.5)]).model
    back = pickle.loads(pickle.dumps(model))
    assert [s.name for _, s in applied(back)] == ["Truncate", "Prune"]
    assert list(back.state_dict()) == list(model.state_dict())
    assert all(a == b for (*_, a), (*_, b) in zip(codes.of(back), codes.of(model), strict=True))
