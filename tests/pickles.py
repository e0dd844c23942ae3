"""Pickles written by hand, opcode by opcode, and the files that hold them."""

import io
import pickle
import struct
import warnings
import zipfile

import numpy as np

# Checkpoints of both kinds, TorchScript's two pickles, metadata of both kinds.
FORMS = ("zip", "legacy", "script", "constants", "pkl", "npy")
CHECKPOINTS, SCRIPTS, METADATA = FORMS[:4], FORMS[2:3], FORMS[4:]

# ---------------------------------------------------------------------------------------------
# Pickles by hand: whatever stands between the protocol and the stop


def data(value):
    return pickle.dumps(value, 2)[2:-1]


def named(name):
    """A name, "module:qualified name", as protocol 2 writes it."""
    return "c{}\n{}\n".format(*name.split(":")).encode()


def stacked(name):
    """A name as protocol 4 writes it, dots and all."""
    return b"".join(map(data, name.split(":"))) + b"\x93"


def call(name, *args):
    return named(name) + data(args) + b"R"


def built(instance, state):
    """An instance that is handed its state, which __setstate__ or __dict__ takes."""
    return instance + state + b"b"


def tuple_of(*parts):
    return b"(" + b"".join(parts) + b"t"


def dict_of(**parts):
    return b"}(" + b"".join(data(key) + value for key, value in parts.items()) + b"u"


def namespace(**parts):
    return built(named("argparse:Namespace") + b")\x81", dict_of(**parts))


def checkpoint_of(args=None, **parts):
    args = namespace(model=data("CLIP_VITTINY8")) if args is None else args
    return dict_of(**{"state_dict": b"}", "args": args, **parts})


def array_of(element):
    """NumPy's way to write an array of objects, with one element."""
    start = named("numpy.core.multiarray:_reconstruct") + tuple_of(
        named("numpy:ndarray"), data((0,)), data("b")
    )
    dtype = call("numpy:dtype", "O8", False, True)
    return built(start + b"R", tuple_of(data(1), data((1,)), dtype, b"\x89", b"]" + element + b"a"))


def storage(numbers, kind="torch:FloatStorage"):
    parts = data("storage"), named(kind), data("0"), data("cpu"), data(numbers)
    return lambda form: tuple_of(*parts, *([b"N"] if form == "legacy" else [])) + b"Q"


def bare_tensor(numbers, shape, stride=(1,)):
    def write(form):
        parts = storage(numbers)(form), data(0), data(shape), data(stride), b"\x89"
        hooks = call("collections:OrderedDict")
        return named("torch._utils:_rebuild_tensor_v2") + tuple_of(*parts, hooks) + b"R"

    return write


def tensor(numbers, shape, stride=(1,)):
    write = bare_tensor(numbers, shape, stride)
    is_bare = {"script", "constants"}
    return lambda form: (
        write(form) if form in is_bare else checkpoint_of(state_dict=dict_of(a=write(form)))
    )


def module(**attributes):
    """An instance of a class of TorchScript's."""
    return built(named("__torch__.model:Clip") + b")\x81", dict_of(**attributes))


def run_of(args):
    """A checkpoint that is plain data, with one weight."""
    write = bare_tensor(1, (1,))
    return lambda form: checkpoint_of(args=args, state_dict=dict_of(a=write(form)))


def length(opcode, size, bytes_of_it):
    """An opcode that claims `size` bytes to follow, of which there are ten."""
    return opcode + struct.pack("<Q", size)[:bytes_of_it] + b"0123456789"


# ---------------------------------------------------------------------------------------------
# Files


def archive(members, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as file:
        warnings.simplefilter("ignore")  # of two members of one name
        for name, content in members:
            file.writestr(name, content)
    return buffer.getvalue()


def pickled(body):
    return b"\x80\x02" + body + b"."


def as_zip(body):
    members = {"data.pkl": pickled(body), "version": b"3\n", "byteorder": b"little"}
    return archive([(f"c/{name}", text) for name, text in (members | {"data/0": b"abcd"}).items()])


def as_script(body, constants=b")"):
    """TorchScript's archive of a module with one attribute; its code is no code."""
    members = {"data.pkl": pickled(module(visual=body)), "constants.pkl": pickled(constants)}
    members |= {
        "data/0": b"abcd",
        "constants/0": b"abcd",
        "code/__torch__/model.py": "import payload",
    }
    members |= {"code/__torch__/model.py.debug_pkl": b"cos\nsystem\n", "version": b"3\n"}
    return archive([(f"c/{name}", text) for name, text in members.items()])


def as_constants(body):
    return as_script(data(1), body)


def as_legacy(body):
    head = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {}))
    stored = pickle.dumps(["0"], 2) + struct.pack("<q", 1) + b"abcd"
    return head + pickled(body) + (stored if b"FloatStorage" in body else pickle.dumps([], 2))


def npy(descr, shape, content=b"01234567"):
    buffer = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + content


def as_npy(body):
    return npy("|O", (1,), pickled(body))


WRITE = {"zip": as_zip, "legacy": as_legacy, "script": as_script, "constants": as_constants}
WRITE |= {"pkl": pickled, "npy": as_npy, "run": as_zip}
