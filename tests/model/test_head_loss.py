"""A head's loss in chunks is the loss, with its gradients; a linear head's are made by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from mft_lightning.errors import UserError
from mft_lightning.model import logit_buffer
from mft_lightning.model.head_loss import TokenLosses, head_loss
from mft_lightning.model.logit_buffer import LogitBuffer
from mft_lightning.model.objective import Objective
from tests.model.largest import Largest

TOKENS, HIDDEN, VOCABULARY = 13, 5, 11
OBJECTIVES = st.builds(
    Objective,
    label_smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    z_loss=st.sampled_from([0.0, 1e-4, 0.3]),
    focal_gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
Case = tuple[nn.Module, Tensor, Tensor, Tensor]


class Wrapped(nn.Module):
    """A head that is not known to be linear, as one with adapters is not."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden)


def case(seed: int = 0, *, bias: bool = False, dtype: torch.dtype = torch.float64, tokens: int = TOKENS) -> Case:
    """A head, hidden states, targets and factors."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias)
    for parameter in head.parameters():
        nn.init.normal_(parameter, generator=generator)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator)
    return head.to(dtype), hidden, targets, torch.rand(tokens, generator=generator, dtype=torch.float64)


def plain(head: nn.Module, hidden: Tensor, targets: Tensor, factors: Tensor, objective: Objective) -> TokenLosses:
    """As the papers have it, from whole logits; label smoothing is torch's own."""
    logits = head(hidden)
    nll = F.cross_entropy(logits, targets, reduction="none")
    value = (1 - torch.exp(-nll)) ** objective.focal_gamma * nll if objective.focal_gamma else nll
    smooth = F.cross_entropy(logits, targets, reduction="none", label_smoothing=objective.label_smoothing)
    value = (1 - objective.label_smoothing) * (value - nll) + smooth
    value = value + objective.z_loss * torch.log(torch.exp(logits).sum(-1)) ** 2
    return TokenLosses((factors * value).sum(), nll, (logits.argmax(-1) == targets).long())


def gradients(case: Case, losses: TokenLosses) -> list[Tensor]:
    head, hidden, *_ = case
    wanted = [one for one in (hidden, *head.parameters()) if one.requires_grad]
    return list(torch.autograd.grad(losses.loss, wanted))


def assert_same(ours: Case, found: TokenLosses, theirs: Case, expected: TokenLosses, **tolerance: float) -> None:
    torch.testing.assert_close(found.loss, expected.loss, **tolerance)
    torch.testing.assert_close(found.nll, expected.nll.detach(), **tolerance)
    assert found.correct.tolist() == expected.correct.tolist()
    for one, other in zip(gradients(ours, found), gradients(theirs, expected), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@given(objective=OBJECTIVES, seed=st.integers(0, 99), rows=st.sampled_from([1, 4, 13, 50]), bias=st.booleans())
@settings(deadline=None, max_examples=150)
def test_it_is_the_loss_of_whole_logits(objective: Objective, seed: int, rows: int, bias: bool) -> None:
    given_ = case(seed, bias=bias)
    expected = plain(*given_, objective)
    assert_same(given_, head_loss(*given_, objective, rows), given_, expected)
    head, *others = given_
    wrapped = (Wrapped(head), *others)
    assert_same(wrapped, head_loss(*wrapped, objective, rows), given_, plain(*given_, objective))


@given(objective=OBJECTIVES, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_its_gradients_are_those_of_small_differences(objective: Objective, seed: int) -> None:
    head, hidden, targets, factors = given_ = case(seed, bias=True)
    wanted = gradients(given_, head_loss(*given_, objective, 4))
    inputs = (hidden, *head.parameters())
    generator = torch.Generator().manual_seed(seed)
    steps = [torch.randn(one.shape, generator=generator, dtype=torch.float64) * 1e-6 for one in inputs]
    values = []
    with torch.no_grad():
        for sign in (1, -2):  # to one side, and from there to the other
            for one, step in zip(inputs, steps, strict=True):
                one.add_(step, alpha=sign)
            values.append(float(head_loss(head, hidden, targets, factors, objective, 4).loss))
    expected = sum(float((one * step).sum()) for one, step in zip(wanted, steps, strict=True))
    assert (values[0] - values[1]) / 2 == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_a_head_that_is_watched_is_called() -> None:
    head, *others = case()
    seen = []
    head.register_forward_hook(lambda module, inputs, logits: seen.append(len(logits)))
    assert_same(
        (head, *others), head_loss(head, *others, Objective(), 4), (head, *others), plain(head, *others, Objective())
    )
    assert seen[:4] == [4, 4, 4, 1]


@pytest.mark.parametrize(("trains", "reaches"), [*itertools.product([True, False], repeat=2)])
def test_what_does_not_train_gets_no_gradient(trains: bool, reaches: bool) -> None:
    given_ = case()
    given_[0].requires_grad_(trains)
    given_[1].requires_grad_(reaches)
    found = head_loss(*given_, Objective(), 4)
    assert found.loss.requires_grad is (trains or reaches)
    if trains or reaches:
        assert_same(given_, found, given_, plain(*given_, Objective()))


def test_without_gradients_it_is_the_same_numbers() -> None:
    given_ = case()
    expected = head_loss(*given_, Objective(), 4)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            found = head_loss(*given_, Objective(), 4)
        torch.testing.assert_close(tuple(found), tuple(one.detach() for one in expected))


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_reduced_in_float32_whatever_computes(dtype: torch.dtype, mixed: bool) -> None:
    """And keeps the gradient of a conversation that counts for little, which float16 alone would round to nothing."""
    head, hidden, targets, factors = case(dtype=torch.float32, tokens=400)
    factors = factors * 1e-7
    exact = (head.double(), hidden.detach().double().requires_grad_(), targets, factors)
    expected = plain(*exact, Objective())
    wanted = gradients(exact, expected)
    kind = torch.float32 if mixed else dtype
    ours = (head.to(kind), hidden.detach().to(kind).requires_grad_(), targets, factors)
    with torch.autocast("cpu", dtype=dtype, enabled=mixed):
        found = head_loss(*ours, Objective(), 32)
    assert found.loss.dtype == found.nll.dtype == torch.float32
    torch.testing.assert_close(found.loss.double(), expected.loss, rtol=1e-2, atol=0)
    scaled = found._replace(loss=found.loss * 1e4)  # as a loss scaler does it
    for one, other in zip(gradients(ours, scaled), wanted, strict=True):
        assert one.dtype == kind
        assert float((one.double() / 1e4 - other).norm() / other.norm()) < 1e-2


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("tokens", [40, 400])
def test_no_more_logits_stand_in_memory_than_of_so_many_rows(tokens: int, wrapped: bool) -> None:
    head, *others = case(tokens=tokens)
    rows = 400 // VOCABULARY + HIDDEN  # more than the hidden states of all tokens
    with Largest() as largest:
        head_loss(Wrapped(head) if wrapped else head, *others, Objective(label_smoothing=0.1), rows).loss.backward()
    assert largest.elements == max(min(rows, tokens) * VOCABULARY, tokens * HIDDEN)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_of_no_tokens_it_is_nothing(dtype: torch.dtype) -> None:
    given_ = case(dtype=dtype, tokens=0)
    found = head_loss(*given_, Objective(), 4)
    assert found.loss == 0 and len(found.nll) == len(found.correct) == 0
    assert all(not one.any() for one in gradients(given_, found))


def test_logits_lie_where_those_of_the_step_before_lay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_buffer, "MAPPED_ANEW", 4 * VOCABULARY * 8)
    buffer, places = LogitBuffer(), set()
    for tokens in (13, 7, 13, 12):
        given_ = case(tokens, tokens=tokens)
        found = head_loss(*given_, Objective(z_loss=0.1), 13, buffer)
        places.add(buffer.of(given_[1], VOCABULARY).data_ptr())
        assert_same(given_, found, given_, plain(*given_, Objective(z_loss=0.1)))
    assert len(places) == 1


def test_a_second_backward_pass_is_refused() -> None:
    loss = head_loss(*case(), Objective(), 4).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward pass"):
        loss.backward()


def test_the_harder_of_two_tasks_counts_more_under_the_focal_loss() -> None:
    """Its share of the gradient grows with gamma; without it, tokens count by how far off they are."""
    head = nn.Linear(2, 2, bias=False)
    nn.init.eye_(head.weight)
    hidden = torch.tensor([[3.0, 0.0], [0.5, 0.0]], requires_grad=True)  # one nearly known, one not
    shares = []
    for gamma in (0.0, 1.0, 2.0, 5.0):
        loss = head_loss(
            head, hidden, torch.zeros(2, dtype=torch.int64), torch.ones(2), Objective(focal_gamma=gamma), 2
        )
        (gradient,) = torch.autograd.grad(loss.loss, [hidden])
        easy, hard = gradient.norm(dim=1).tolist()
        shares.append(hard / (easy + hard))
    assert shares == sorted(shares) and shares[0] > 0.5 and shares[2] > 0.99


@pytest.mark.parametrize(
    ("key", "value"),
    [("label_smoothing", 1.0), ("label_smoothing", -0.1), ("z_loss", float("nan")), ("focal_gamma", -1)],
)
def test_values_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^model.{key}: "):
        Objective(**{key: value})
