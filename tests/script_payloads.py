"""Payloads of TorchScript's archives alone, each the attribute of a module."""

from pickles import bare_tensor, built, call, data, dict_of, module, named, tuple_of

PUT, GET = b"q\xff", b"h\xff"  # a place in the memo that no other part takes


def doubled(levels):
    """A module of two that are one, of two that are one, and so on."""
    body = module(a=data(1)) + PUT
    for _ in range(levels):
        body = module(a=body, b=GET) + PUT
    return body


SCRIPT_PAYLOADS = {  # name: (text of its refusal, its pickle)
    "modules without end": ("without an end", doubled(40)),
    "a module in itself": (
        "without an end",
        built(named("__torch__:A") + b")\x81" + PUT, dict_of(a=GET)),
    ),
    "a module with a number for a name": (
        "attribute is 7",
        built(named("__torch__:A") + b")\x81", b"}" + data(7) + module() + b"s"),
    ),
    "a C++ class": (
        "__torch__.torch.classes.quantized.Packed",
        named("__torch__.torch.classes.quantized:Packed") + b")\x81",
    ),
    "a step beyond the storage": ("beyond its storage", bare_tensor(1, (2,), (1,))),
    "a step backwards": ("no plain tensor", bare_tensor(1, (1,), (-1,))),
    "steps without sizes": ("no plain tensor", bare_tensor(1, (1,), ())),
    "a tensor of no storage": (
        "no plain tensor",
        call("torch._utils:_rebuild_tensor_v2", 1, 0, (1,), (1,), False, None),
    ),
    "a storage of no kind": (
        "unknown kind",
        tuple_of(*map(data, ("storage", "torch.FloatStorage", "0", "cpu", 1))) + b"Q",
    ),
    "a storage outside": (
        "no item named 'c/data/../../x'",
        tuple_of(data("storage"), named("torch:FloatStorage"), *map(data, ("../../x", "cpu", 1)))
        + b"Q",
    ),
    "TorchScript's other helpers": (
        "torch.jit._pickle.build_tensor_from_id",
        call("torch.jit._pickle:build_tensor_from_id", 1),
    ),
}
