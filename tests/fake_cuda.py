"""A CUDA device that is not there: its tensors have shape, type and place, but no numbers.

Tensors on the CPU stay real. Operations on tensors of two devices raise, and so does, within
`no_wait`, all that has the program wait for the device. Otherwise a copy to the CPU brings ones.
Streams and random states are stood in for. Backward runs in Python: PyTorch's engine asks for the
driver.
"""

import contextlib
from collections import Counter, defaultdict
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import losses
import models
import towers
import transforms
from benchmarks.memory import CUDA, FusedAttention

aten = torch.ops.aten
VALUES = (aten._local_scalar_dense.default, aten.equal.default)
COPIES = (aten._to_copy.default, aten.copy_.default)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
real_backward = torch.autograd.backward


class Wait(Exception):
    """The program would wait for the device."""


class MixedDevices(Exception):
    """An operation on tensors of two devices."""


def is_on_cuda(x):
    """Whether x is a tensor on the device, or the device."""
    place = x.device if isinstance(x, torch.Tensor) else x
    return isinstance(place, torch.device) and place.type == "cuda"


def is_fake(x):
    return isinstance(x, torch.Tensor) and is_on_cuda(x)


def is_on_cpu(x):
    """Not for numbers without dimensions, which may be mixed with tensors of any device."""
    return isinstance(x, torch.Tensor) and not is_on_cuda(x) and x.ndim > 0


class Device(TorchDispatchMode):
    """Fakes operations on CUDA, and runs those on the CPU; counts the former and their waits."""

    def __init__(self):
        super().__init__()
        self.may_wait, self.counts, self.waits = True, Counter(), Counter()
        self.pinned = []  # storages
        self.latest = 0  # number of the latest event

    @contextlib.contextmanager
    def no_wait(self):
        self.may_wait = False
        try:
            yield
        finally:
            self.may_wait = True

    def wait(self, reason):
        self.waits[str(reason)] += 1
        if not self.may_wait:
            raise Wait(str(reason))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if func is aten._pin_memory.default:
            self.pinned.append(args[0].untyped_storage())
            return args[0]
        if not any(map(is_on_cuda, leaves)):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        self.counts[func] += 1
        if func in VALUES:
            self.wait(func)
            return 1
        if func in COPIES:
            return self.copy(func, args, kwargs)
        if func in INDEXED:
            self.check_index(func, *args)
        elif any(map(is_on_cpu, leaves)) and any(map(is_fake, leaves)):
            raise MixedDevices(str(func))
        elif torch.Tag.dynamic_output_shape in func.tags:
            self.wait(func)
        elif func is aten._fused_sgd_.default:  # in place; PyTorch cannot fake it
            return None
        return func(*args, **kwargs)

    def copy(self, func, args, kwargs):
        """A copy between devices waits unless it is non-blocking, to or from pinned memory."""
        source, result = args[func is aten.copy_.default], func(*args, **kwargs)
        is_free = kwargs.get("non_blocking", False)
        if is_on_cuda(source) and not is_on_cuda(args[0] if func is aten.copy_.default else result):
            if not is_free or func is aten.copy_.default:  # the other takes pinned memory itself
                self.wait("copy to the CPU")
            with unset_fake_temporarily():
                return torch.ones(result.shape, dtype=result.dtype)
        if is_on_cuda(result) and not is_on_cuda(source):
            own = source.untyped_storage()._cdata
            if not is_free or own not in [storage._cdata for storage in self.pinned]:
                self.wait("copy to the device that blocks, or of memory that is not pinned")
        return result

    def check_index(self, func, tensor, indices, values=None, *_):
        """An index on the CPU is copied to the device; the rows of a mask are counted there."""
        if not is_on_cuda(tensor):
            raise MixedDevices(str(func))
        if any(map(is_on_cpu, [*indices, values])):
            self.wait("index or values on the CPU")
        is_mask = any(x is not None and x.dtype == torch.bool for x in indices)
        if is_mask and (values is None or values.numel() != 1):
            self.wait("mask as an index")


# ---------------------------------------------------------------------------------------------
# Stand-ins


class Stream:
    """Does all at once."""

    def __init__(self, device=None):
        pass

    def record_event(self, event=None):
        event = event or torch.cuda.Event()
        event.record()
        return event

    def wait_stream(self, stream):
        pass


def event_of(device):
    class Event:
        """The program waits for the latest one alone: after any other the device still has work."""

        number = None

        def __init__(self, enable_timing=False, blocking=False):
            pass

        def record(self, stream=None):
            self.number = device.latest = device.latest + 1

        def elapsed_time(self, other):
            return 1.0

        def synchronize(self):
            if self.number == device.latest:
                device.wait("the latest event")

    return Event


class Generator(torch.Generator):
    def __new__(cls, device=None):
        return super().__new__(cls)


def backward(roots, grads=None, *args, **options):
    """As torch.autograd.backward, one node after another."""
    roots = [roots] if isinstance(roots, torch.Tensor) else list(roots)
    grads = [None] * len(roots) if grads is None else grads
    grads = [grads] if isinstance(grads, torch.Tensor) else list(grads)
    edges = [torch.autograd.graph.get_gradient_edge(root) for root in roots]
    waiting, stack, seen = Counter(), [edge.node for edge in edges], set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            following = [other for other, _ in node.next_functions if other is not None]
            waiting.update(following)
            stack += following
    sums = defaultdict(dict)  # {node: {output: gradient}}

    def add(node, slot, grad):
        if grad is not None:
            sums[node][slot] = sums[node][slot] + grad if slot in sums[node] else grad

    # Checkpoints run forward again; Tensor.backward switches off the mode that it was called in.
    task = patch("torch._C._current_graph_task_id", lambda: id(sums))
    with torch.no_grad(), FusedAttention(), task:
        for root, edge, grad in zip(roots, edges, grads, strict=True):
            add(edge.node, edge.output_nr, torch.ones_like(root) if grad is None else grad)
        ready = [node for node in {edge.node for edge in edges} if not waiting[node]]
        while ready:
            node = ready.pop()
            results = call(node, sums.pop(node, {}))
            for (other, slot), grad in zip(node.next_functions, results, strict=True):
                if other is not None:
                    add(other, slot, grad)
                    waiting[other] -= 1
                    if not waiting[other]:
                        ready.append(other)


def call(node, grads):
    """The gradients of a node's inputs by those of its outputs, {output: gradient}."""
    if not grads:
        return [None] * len(node.next_functions)
    own = []
    for slot, place in enumerate(node._input_metadata):
        grad = grads.get(slot)
        if grad is not None and grad.device.type != place.device.type:
            raise MixedDevices(f"the gradient of {node.name()} is on {grad.device}")
        own.append(grad if grad is None else grad.sum_to_size(place.shape).to(place.dtype))
    results = node(*own)
    return results if isinstance(results, tuple) else (results,)


def either_backward(roots, *args, **options):
    first = roots if isinstance(roots, torch.Tensor) else roots[0]
    return (backward if is_on_cuda(first) else real_backward)(roots, *args, **options)


def stand_ins(device):
    return {
        "torch.Generator": Generator,
        "torch.accelerator.is_available": lambda: True,  # for the loaders, which then pin
        "torch.autograd.backward": either_backward,
        "torch.cuda.Event": event_of(device),
        "torch.cuda.Stream": Stream,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.current_stream": Stream,
        "torch.cuda.get_rng_state": lambda device: torch.zeros(16, dtype=torch.uint8),
        "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
        "torch.cuda.mem_get_info": lambda device: (2**34, 2**34),
        "torch.cuda.set_rng_state": lambda state, device: None,
        "torch.cuda.stream": contextlib.nullcontext,
        "torch.cuda.synchronize": lambda _=None: device.wait("synchronize"),
        # Fake tensors keep some, and modules then refuse to change the layout of a parameter.
        "torch.utils.weakref.getweakrefs": lambda tensor: [],
    }


def clear_caches():
    """Forgets constants that are kept on the device."""
    for module in (losses, models, towers, transforms):
        for value in vars(module).values():
            getattr(value, "cache_clear", lambda: None)()


@contextlib.contextmanager
def fake_cuda():
    """Yields the Device; within, torch.device("cuda") is there."""
    device = Device()
    record_stream = patch.object(torch.Tensor, "record_stream", lambda *_: None, create=True)
    clear_caches()
    try:
        with contextlib.ExitStack() as stack:
            for name, value in stand_ins(device).items():
                stack.enter_context(patch(name, value))
            stack.enter_context(record_stream)
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(device)
            stack.enter_context(FusedAttention())
            yield device
    finally:
        clear_caches()


__all__ = ["CUDA", "Device", "MixedDevices", "Wait", "aten", "backward", "fake_cuda"]
