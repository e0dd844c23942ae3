"""Payloads: pickles and files made to run code or to exhaust memory, with the refusal of each."""

import struct
import zipfile

from pickles import (
    CHECKPOINTS,
    FORMS,
    METADATA,
    SCRIPTS,
    WRITE,
    archive,
    array_of,
    built,
    call,
    checkpoint_of,
    data,
    dict_of,
    length,
    named,
    namespace,
    npy,
    pickled,
    run_of,
    stacked,
    storage,
    tensor,
    tuple_of,
)
from script_payloads import SCRIPT_PAYLOADS

RUNS = ("run",)  # plain data, of no model
MAKE, TOUCH = "open('canary', 'w')", "touch canary"
CALLS = {  # each would make the canary, or reach out, if it were called
    "os:system": [TOUCH],
    "posix:system": [TOUCH],
    "nt:system": [TOUCH],
    "os:popen": [TOUCH],
    "os:mkdir": ["canary"],
    "posix:execv": ["/usr/bin/touch", ["touch", "canary"]],
    "subprocess:Popen": [["touch", "canary"]],
    "subprocess:getoutput": [TOUCH],
    "commands:getoutput": [TOUCH],
    "pty:spawn": [["touch", "canary"]],
    "builtins:eval": [MAKE],
    "builtins:exec": [MAKE],
    "builtins:compile": [MAKE, "x", "exec"],
    "builtins:getattr": ["x", "upper"],
    "builtins:setattr": ["x", "y", "z"],
    "builtins:__import__": ["payload"],
    "builtins:open": ["canary", "w"],
    "builtins:map": ["x", "y"],
    "builtins:bytearray": [10**12],
    "builtins:range": [10**12],
    "__builtin__:eval": [MAKE],  # Python 2's name
    "importlib:import_module": ["payload"],
    "runpy:run_path": ["payload.py"],
    "runpy:run_module": ["payload"],
    "payload:anything": [],  # to import the module is enough
    "functools:partial": ["x"],
    "functools:reduce": ["x", "y"],
    "operator:attrgetter": ["system"],
    "operator:methodcaller": ["system", TOUCH],
    "itertools:starmap": ["x", "y"],
    "types:CodeType": [],
    "types:FunctionType": [],
    "copyreg:_reconstructor": [],
    "copy_reg:_reconstructor": [],
    "copyreg:add_extension": ["os", "system", 1],
    "pickle:loads": [b"cos\nsystem\n(S'touch canary'\ntR."],
    "_pickle:loads": [b"cos\nsystem\n(S'touch canary'\ntR."],
    "marshal:loads": [b""],
    "shelve:open": ["canary"],
    "dbm.dumb:open": ["canary"],
    "ctypes:CDLL": ["./payload.so"],
    "cProfile:run": [MAKE],
    "timeit:timeit": [MAKE],
    "pdb:run": [MAKE],
    "code:interact": [],
    "shutil:copyfile": ["payload.py", "canary"],
    "pathlib:Path.touch": ["canary"],
    "socket:create_connection": [("127.0.0.1", 9)],
    "urllib.request:urlopen": ["http://127.0.0.1:9/"],
    "webbrowser:open": ["http://127.0.0.1:9/"],
    "logging.config:fileConfig": ["payload.ini"],
    "pip._internal:main": [["install", "payload"]],
    "numpy:load": ["payload.npy", None, True],
    "numpy:memmap": ["canary", "u1", "w+", 0, 1],
    "numpy.testing._private.utils:runstring": [MAKE, {}],
    "numpy.f2py.crackfortran:myeval": [MAKE],
    "torch:load": ["payload.pt"],
    "torch:save": ["x", "canary"],
    "torch:classes": [],
    "torch.hub:load": [".", "entry", True, True],
    "torch.hub:load_state_dict_from_url": ["http://127.0.0.1:9/x.pt"],
    "torch.storage:_load_from_bytes": [b""],
    "torch.serialization:load": ["payload.pt"],
    "torch.jit:load": ["payload.pt"],
    "torch.utils.cpp_extension:load_inline": ["x", "y"],
    "torch.utils._config_module:load_config": [b""],
    "torch._inductor.codecache:compile_file": ["x", "y", "z"],
    "torch.package:PackageImporter": ["payload.pt"],
    "torch.distributed.rpc:remote": ["x", "y"],
    "torch._utils:_rebuild_qtensor": [],
    "torch._utils:_rebuild_nested_tensor": [],
    "torch._utils:_rebuild_wrapper_subclass": [],
    "torch._utils:_rebuild_meta_tensor_no_storage": [],
    "torch._tensor:_rebuild_from_type_v2": [],
    "timm.models._helpers:load_checkpoint": [],
    "utils:InputError": ["x"],
    "infra.untrusted:memory_limit": [0],
}
DOTTED = (  # names that lead from allowed modules to others
    "argparse:Namespace.__init__.__globals__",
    "argparse:_sys.modules",
    "collections:OrderedDict.__subclasses__",
    "collections:_sys.modules",
    "torch._utils:torch.hub.load",
    "torch:serialization.os.system",
    "pathlib:PosixPath.unlink",
    "pathlib:os.system",
    "numpy:ctypeslib.ctypes.CDLL",
    "numpy.core.multiarray:scalar.__self__",
    "_codecs:encode.__self__",
    "os:path.os.system",
)
RUN = call("posix:system", TOUCH)

# {payload: (texts of which its refusal has one, joined by |; its pickle, or a function of the kind
# of file that returns it; the kinds of file)}
TABLE = {name: (name.replace(":", "."), call(name, *args), FORMS) for name, args in CALLS.items()}
TABLE |= {
    f"{name}, dotted": (name.replace(":", "."), stacked(name) + data((TOUCH,)) + b"R", FORMS)
    for name in DOTTED
}
TABLE |= {
    # the same name by other opcodes, and in other places
    "the name alone": ("posix.system", named("posix:system"), FORMS),
    "STACK_GLOBAL": ("posix.system", stacked("posix:system") + data((TOUCH,)) + b"R", FORMS),
    "INST": ("posix.system", b"(" + data(TOUCH) + b"iposix\nsystem\n", FORMS),
    "OBJ": ("posix.system", b"(" + named("posix:system") + data(TOUCH) + b"o", FORMS),
    "NEWOBJ": ("posix.system", named("posix:system") + data((TOUCH,)) + b"\x81", FORMS),
    "NEWOBJ_EX": ("posix.system", named("posix:system") + data((TOUCH,)) + b"}\x92", FORMS),
    "EXT1": ("extension code 7", b"\x82\x07" + data((TOUCH,)) + b"R", FORMS),
    "as a dict's key": ("posix.system", b"}" + RUN + b"Ns", FORMS),
    "before another": ("posix.system", RUN + b"0N", FORMS),
    "as an argument": (
        "posix.system",
        named("collections:OrderedDict") + tuple_of(RUN) + b"R",
        CHECKPOINTS,
    ),
    "as a state": ("posix.system", built(namespace(), RUN), CHECKPOINTS),
    "in Namespace": ("posix.system", checkpoint_of(args=namespace(gpu=RUN)), CHECKPOINTS),
    "in Namespace in Namespace": (
        "posix.system",
        checkpoint_of(args=namespace(a=namespace(b=b"]" + RUN + b"a"))),
        CHECKPOINTS,
    ),
    "in state_dict": ("posix.system", checkpoint_of(state_dict=dict_of(a=RUN)), CHECKPOINTS),
    "beside the checkpoint": ("posix.system", checkpoint_of(extra=RUN), CHECKPOINTS),
    "in an object array": ("posix.system", array_of(RUN), METADATA),
    "in an array in an array": ("posix.system", array_of(array_of(RUN)), METADATA),
    "an object array": (
        "numpy.core.multiarray._reconstruct|no weights",
        array_of(b"N"),
        CHECKPOINTS,
    ),
    # persistent ids
    "a persistent id": ("persistent id", data("cos\nsystem") + b"Q", FORMS),
    "a persistent id as text": ("persistent id", b"Pcos system\n", FORMS),
    "a persistent module": ("'module'", data(("module", "a", "b", "c", "d")) + b"Q", CHECKPOINTS),
    "a persistent number": ("persistent id 7", data(7) + b"Q", CHECKPOINTS),
    "an empty persistent id": ("persistent id ()", data(()) + b"Q", CHECKPOINTS),
    # hostile states of allowed classes
    "Namespace of another class": (
        "__class__",
        checkpoint_of(
            args=built(namespace(), tuple_of(b"N", dict_of(__class__=named("builtins:set"))))
        ),
        CHECKPOINTS,
    ),
    "Namespace with attributes of a class": (
        "which model",
        run_of(namespace(__class__=data(1), __dict__=data({"model": "x"}))),
        RUNS,
    ),
    "Namespace with another __dict__": (
        "args is of another kind",
        checkpoint_of(
            args=built(namespace(), tuple_of(b"N", dict_of(__dict__=b"}" + data(1) + b"Ns")))
        ),
        CHECKPOINTS,
    ),
    "Namespace with self": (
        "which model",
        run_of(namespace(self=data(1))),
        RUNS,
    ),
    "OrderedDict that hides its items": (
        "state_dict or args is of another kind",
        checkpoint_of(
            state_dict=built(
                call("collections:OrderedDict") + data("a") + data(1) + b"s",
                dict_of(items=named("builtins:set"), values=named("builtins:set")),
            )
        ),
        CHECKPOINTS,
    ),
    "a checkpoint that hides its keys": (
        "state_dict or args is absent",
        built(call("collections:OrderedDict"), dict_of(keys=named("builtins:set"))),
        CHECKPOINTS,
    ),
    "a dtype of objects": (
        "no checkpoint|no list",
        built(call("numpy:dtype", "O8", False, True), data((3, "|", None, None, None, -1, -1, 63))),
        FORMS,
    ),
    "a void dtype": ("'V8'", call("numpy:dtype", "V8", False, True), FORMS),
    "a structured dtype": ("dtype", call("numpy:dtype", [("a", "O")], False, True), FORMS),
    "a dtype's state of no kind": (
        "NoneType",
        built(call("numpy:dtype", "f8", False, True), b"N"),
        FORMS,
    ),
    "a number of a wide dtype": (
        "dtype|buffer|size|type",
        named("numpy.core.multiarray:scalar")
        + tuple_of(call("numpy:dtype", f"S{10**12}", False, True), data("x"))
        + b"R",
        FORMS,
    ),
    "a number of no bytes": (
        "buffer|index",
        named("numpy.core.multiarray:scalar")
        + tuple_of(call("numpy:dtype", "f8", False, True), call("_codecs:encode", "", "latin1"))
        + b"R",
        FORMS,
    ),
    "another codec": ("zlib", call("_codecs:encode", "x", "zlib"), METADATA),
    # sizes that are not there
    "a storage of 1 TB": ("claims 274877906944 numbers", storage(2**38), CHECKPOINTS),
    "a tensor of 1 TB": ("claims 274877906944", tensor(2**38, (2**38,)), CHECKPOINTS),
    "a shape of 1 TB": (
        "resizable|more memory|beyond",
        tensor(1, (2**38,)),
        CHECKPOINTS,
    ),
    "one number, 1 TB of times": ("claims 274877906944", tensor(1, (2**38,), (0,)), CHECKPOINTS),
    "a storage of less than nothing": ("claims -5 numbers", storage(-5), CHECKPOINTS),
    "a storage of text": ("claims 'x' numbers", storage("x"), CHECKPOINTS),
    "a head of 4 TB": (
        "model cannot be built",
        run_of(namespace(model=data("SLIP_VITTINY8"), ssl_mlp_dim=data(10**9))),
        RUNS,
    ),
    "a head of text": (
        "model cannot be built",
        run_of(namespace(model=data("SLIP_VITTINY8"), ssl_mlp_dim=data("x"))),
        RUNS,
    ),
    "a model of 7 GB": (
        "model cannot be built",
        run_of(namespace(model=data("CLIP_vit_gigantic_patch14_224"))),
        RUNS,
    ),
    "a model from the network": (
        "unknown model",
        run_of(namespace(model=data("CLIP_hf-hub:payload/model"))),
        RUNS,
    ),
    "a text of 1 TB": ("truncated|memory", length(b"\x8d", 2**40, 8), FORMS),
    "bytes of 1 TB": ("truncated|memory|exhausted", length(b"\x8e", 2**40, 8), FORMS),
    "a bytearray of 1 TB": ("truncated|memory|exhausted", length(b"\x96", 2**40, 8), FORMS),
    "a frame of 1 TB": ("truncated|memory|exhausted", length(b"\x95", 2**40, 8), FORMS),
    "a text of 4 GB": ("truncated|memory", length(b"X", 2**32 - 1, 4), FORMS),
    "bytes of 4 GB": ("truncated|memory", length(b"B", 2**32 - 1, 4), FORMS),
    "a string of 2 GB": ("truncated|memory", length(b"T", 2**31 - 1, 4), FORMS),
    "a number of 2 GB": ("truncated|memory", length(b"\x8b", 2**31 - 1, 4), FORMS),
    "a place in the memo at 64 GB": ("memory", b"Nr" + struct.pack("<I", 2**32 - 1), FORMS),
    "a number of 5000 digits": ("to int", b"I" + b"1" * 5000 + b"\n", FORMS),
    "lists in lists": ("no checkpoint|row 0", b"]" * 10**5 + b"a" * (10**5 - 1), FORMS),
    "a list in itself": ("no checkpoint|row 0", b"]q\x00h\x00a", FORMS),
    "an epoch of no kind": ("epoch is 'x'", checkpoint_of(epoch=data("x")), CHECKPOINTS),
    "an epoch of 400 digits": ("epoch is 1000", checkpoint_of(epoch=data(10**400)), CHECKPOINTS),
    "an epoch before the first": ("epoch is -1", checkpoint_of(epoch=data(-1)), CHECKPOINTS),
    "a best value of no kind": ("best_acc1 is [", checkpoint_of(best_acc1=b"]"), CHECKPOINTS),
}
TABLE |= {name: (*refusal, SCRIPTS) for name, refusal in SCRIPT_PAYLOADS.items()}

# ---------------------------------------------------------------------------------------------
# WHOLE: files that are hostile as a whole


def members(*more):
    sound = [("c/data.pkl", pickled(checkpoint_of())), ("c/version", "3\n")]
    return [*sound, *((name, b"x") for name in more)]


def claiming(size):
    """A zip whose directory says that its first member has another size."""
    whole = bytearray(archive(members("c/data/0")))
    at = whole.index(b"PK\1\2")
    whole[at + 20 : at + 28] = struct.pack("<LL", size, size)
    return bytes(whole)


WHOLE = {  # file name: (texts of which its refusal has one, its content)
    "absolute.zip": ("'/tmp/canary'", archive(members("/tmp/canary"))),
    "climbing.zip": ("'../canary'", archive(members("../canary"))),
    "climbing late.zip": ("'c/data/../../../canary'", archive(members("c/data/../../../canary"))),
    "climbing in DOS.zip": (r"'..\\canary'", archive(members("..\\canary"))),
    "twice.zip": ("two members 'c/data.pkl'", archive(members("c/data.pkl"))),
    "bomb.zip": (
        "unpack to 671|is packed",
        archive([*members(), ("c/data/0", bytes(2**26))], zipfile.ZIP_DEFLATED),
    ),
    "claim.zip": ("unpack to 4294967|ends behind", claiming(2**32 - 2)),
    "modest.zip": ("damaged", claiming(3)),
    "hidden.zip": (
        "posix.system|2 members data.pkl",
        archive([*members(), ("d/data.pkl", pickled(RUN))]),
    ),
    "script.zip": (
        "'c/constants.pkl'",
        archive([*members(), ("c/constants.pkl", pickled(b")")), ("c/code/x.py", MAKE)]),
    ),
    "1 TB.npy": ("claims more memory", npy("<f8", (2**37,))),
    "wide.npy": ("claims more memory|parse", npy("|S2147483647", (1000,))),
    "fields.npy": ("is not of|no|parse", npy([("a", "|O")], (1,))),
    "less than nothing.npy": ("parse|memory", npy("<f8", (-1,))),
    "code for a header.npy": (
        "parse",
        b"\x93NUMPY\x01\x00" + struct.pack("<H", len(MAKE) + 1) + MAKE.encode() + b"\n",
    ),
}


PAYLOADS = [*WHOLE, *TABLE]
READERS = dict.fromkeys(("zip", "legacy"), ("model", "weights"))
READERS |= {
    "run": ("model",),
    "script": ("weights",),
    "constants": ("weights",),
    "pkl": ("pkl",),
    "npy": ("npy",),
}


def files_of(payload):
    """{kind of file: its content} of a payload."""
    if payload in WHOLE:
        return {payload[-3:]: WHOLE[payload][1]}
    _, body, forms = TABLE[payload]
    return {form: WRITE[form](body(form) if callable(body) else body) for form in forms}
