"""Where a tensor lies, and whether it has values: no branch on values that are not there.

    pytest tests/test_device.py
"""
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from heads import lovasz_softmax
from ops.device import descending, has_data


def test_only_eager_tensors_have_data():
    """True for a tensor and a view, also one that wants a gradient; False when fake or compiled."""
    x = torch.ones(2, 3, requires_grad=True)
    assert has_data(x) and has_data(x[0]) and has_data(2 * x)
    with FakeTensorMode():
        assert not has_data(torch.ones(2, 3))
    seen = []

    def note(x):
        seen.append(has_data(x))
        return x + 1
    torch.compile(note, backend="eager", fullgraph=True)(torch.ones(2))
    assert seen == [False]


def test_descending_sorts_rows():
    """In the order found the values fall, whichever library sorts; a fake tensor works, too."""
    x = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    order = descending(x)
    assert torch.equal(x.gather(1, order), x.sort(dim=1, descending=True).values)
    with FakeTensorMode():
        assert descending(torch.ones(5, 200)).shape == (5, 200)


def test_the_loss_of_fixed_shapes_is_the_loss():
    """Lovasz-softmax over all classes, as compiled, equals that over the present ones only; a fake
    batch goes through it.
    """
    torch.manual_seed(0)
    logits, target = torch.randn(2, 9, 6, 5), torch.randint(0, 4, (2, 6, 5))
    fixed = torch.compile(lovasz_softmax, backend="eager", fullgraph=True)
    torch.testing.assert_close(fixed(logits, target), lovasz_softmax(logits, target))
    with FakeTensorMode():
        assert lovasz_softmax(torch.randn(2, 9, 6, 5), torch.zeros(2, 6, 5).long()).shape == ()
