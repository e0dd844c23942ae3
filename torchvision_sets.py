"""The labelled sets that torchvision reads, their classes matched to labels.json by name.

torchvision orders and names classes in its own way: a row of SETS says what its names are, and
ALIASES what labels.json calls those that differ by more than case and punctuation. A class without
a partner is an error, on either side.
"""

from dataclasses import dataclass

import torchvision.datasets as tv
from torch.utils.data import Dataset

from utils import InputError

ALIASES = {
    "caltech101": {
        "Faces": "off-center face", "Faces_easy": "centered face", "Leopards": "leopard",
        "Motorbikes": "motorbike", "airplanes": "airplane", "car_side": "side of a car",
        "cougar_body": "body of a cougar cat", "cougar_face": "face of a cougar cat",
        "crocodile_head": "head of a  crocodile", "flamingo_head": "head of a flamingo",
        "snoopy": "snoopy (cartoon beagle)", "yin_yang": "yin and yang symbol",
    },
    "eurosat": {
        "AnnualCrop": "annual crop land", "Forest": "forest", "Highway": "highway or road",
        "HerbaceousVegetation": "brushland or shrubland", "Pasture": "pasture land",
        "Industrial": "industrial buildings or commercial buildings", "River": "river",
        "PermanentCrop": "permanent crop land", "SeaLake": "lake or sea",
        "Residential": "residential buildings or homes or apartments",
    },
    "flowers": {"ball moss": "air plant", "pink-yellow dahlia?": "pink and yellow dahlia"},
    "kitti_distance": {
        "near": "a photo i took of a car on my left or right side.",
        "middle": "a photo i took with a car nearby.",
        "far": "a photo i took with a car in the distance.",
        "none": "a photo i took with no car.",
    },
    "patch_camelyon": {
        "no tumor": "lymph node", "tumor": "lymph node containing metastatic tumor tissue",
    },
}  # fmt: skip

# ISO 3166 codes, the folders of Country211, in the order of labels.json.
COUNTRY_CODES = """
AD AE AF AG AI AL AM AO AQ AR AT AU AW AX AZ BA BB BD BE BF BG BH BJ BM BN BO BQ BR BS BT BW BY BZ
CA CD CF CH CI CK CL CM CN CO CR CU CV CW CY CZ DE DK DM DO DZ EC EE EG ES ET FI FJ FK FO FR GA GB
GD GE GF GG GH GI GL GM GP GR GS GT GU GY HK HN HR HT HU ID IE IL IM IN IQ IR IS IT JE JM JO JP KE
KG KH KN KP KR KW KY KZ LA LB LC LI LK LR LT LU LV LY MA MC MD ME MF MG MK ML MM MN MO MQ MR MT MU
MV MW MX MY MZ NA NC NG NI NL NO NP NZ OM PA PE PF PG PH PK PL PR PS PT PW PY QA RE RO RS RU RW SA
SB SC SD SE SG SH SI SJ SK SL SM SN SO SS SV SX SY SZ TG TH TJ TL TM TN TO TR TT TW TZ UA UG US UY
UZ VA VE VG VI VN VU WS XK YE ZA ZM ZW
"""

FEELINGS = ["angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral"]
VEHICLES = {"Car", "Van", "Truck"}


def distance_class(objects):
    """VTAB's class of a KITTI image, by the nearest vehicle: under 8 m, under 20 m, farther, none.

    objects: torchvision's target, dicts with "type" and "location" (x, y, z) in metres.
    """
    depths = [o["location"][2] for o in objects if o["type"] in VEHICLES]
    nearest = min(depths, default=1000.0)
    return next((i for i, limit in enumerate((8.0, 20.0, 999.0)) if nearest < limit), 3)


@dataclass(frozen=True)
class TorchvisionSet:
    """How torchvision reads a set.

    build: (root, split, **download) -> a torchvision dataset; train, test: names of its splits, the
    former None where it has no split of its own; names: dataset -> class names, by number;
    number: its target -> the number; unseen: classes of labels.json that it has no images of.
    """

    build: callable
    train: str | None = "train"
    test: str = "test"
    names: callable = lambda dataset: dataset.classes
    number: callable = int
    unseen: tuple = ()


def with_split(dataset, **options):
    return lambda root, split, **download: dataset(root, split=split, **options, **download)


def with_flag(dataset):
    return lambda root, split, **download: dataset(root, train=split == "train", **download)


def whole(dataset, **options):
    return lambda root, split, **download: dataset(root, **options, **download)


SETS = {
    "food101": TorchvisionSet(with_split(tv.Food101)),
    "cifar10": TorchvisionSet(with_flag(tv.CIFAR10)),
    "cifar100": TorchvisionSet(with_flag(tv.CIFAR100)),
    "sun397": TorchvisionSet(whole(tv.SUN397), None, "all"),
    "cars": TorchvisionSet(with_split(tv.StanfordCars)),
    "aircraft": TorchvisionSet(with_split(tv.FGVCAircraft), "trainval"),
    "dtd": TorchvisionSet(with_split(tv.DTD)),
    "pets": TorchvisionSet(with_split(tv.OxfordIIITPet), "trainval"),
    "caltech101": TorchvisionSet(
        whole(tv.Caltech101), None, "all", lambda d: d.categories, unseen=("background",)
    ),
    "flowers": TorchvisionSet(with_split(tv.Flowers102)),
    # MNIST's classes are "0 - zero" and so on.
    "mnist": TorchvisionSet(
        with_flag(tv.MNIST), names=lambda d: [name.split(" - ")[0] for name in d.classes]
    ),
    "fer2013": TorchvisionSet(with_split(tv.FER2013), names=lambda d: FEELINGS),
    "stl10": TorchvisionSet(with_split(tv.STL10)),
    "eurosat": TorchvisionSet(whole(tv.EuroSAT), None, "all"),
    # Its signs have numbers only, which are those of labels.json.
    "gtsrb": TorchvisionSet(with_split(tv.GTSRB), names=lambda d: None),
    "kitti_distance": TorchvisionSet(
        whole(tv.Kitti, train=True),  # the images whose objects are known
        None,
        "all",
        lambda d: ["near", "middle", "far", "none"],
        distance_class,
    ),
    "country211": TorchvisionSet(with_split(tv.Country211)),
    "patch_camelyon": TorchvisionSet(
        with_split(tv.PCAM), test="val", names=lambda d: ["no tumor", "tumor"]
    ),
    # Counts of 3 to 10 objects.
    "clevr_counts": TorchvisionSet(
        with_split(tv.CLEVRClassification),
        test="val",
        names=lambda d: [str(3 + i) for i in range(8)],
        number=lambda count: count - 3,
    ),
    "rendered_sst2": TorchvisionSet(with_split(tv.RenderedSST2)),
}


def plain(name):
    """A name without case and punctuation."""
    return " ".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def match_classes(name, found, labels, unseen=()):
    """The number in `labels` of each class that torchvision found, in its order.

    labels: names or lists of synonyms. Raises InputError naming classes without a partner.
    """
    ours = {}
    for i, label in enumerate(labels):
        for synonym in [label] if isinstance(label, str) else label:
            ours.setdefault(plain(synonym), i)
    aliases = dict(ALIASES.get(name, {}))
    codes = COUNTRY_CODES.split()
    if name == "country211" and len(labels) == len(codes):
        aliases = dict(zip(codes, labels, strict=True))
    numbers = [ours.get(plain(aliases.get(c, c))) for c in found]
    unknown = [c for c, number in zip(found, numbers, strict=True) if number is None]
    skipped = {ours.get(plain(label)) for label in unseen}
    absent = [i for i in range(len(labels)) if i not in numbers and i not in skipped]
    if unknown or absent or len(set(numbers)) < len(numbers):
        raise InputError(
            f"{name}: torchvision's classes and labels.json do not match: {unknown[:5]} have no "
            f"label, {[labels[i] for i in absent[:5]]} no class"
        )
    return numbers


class Labelled(Dataset):
    """A torchvision dataset as (transform(RGB image), class number of labels.json)."""

    def __init__(self, name, dataset, numbers, transform):
        self.name, self.dataset, self.numbers, self.transform = name, dataset, numbers, transform

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, target = self.dataset[index]
        return self.transform(image.convert("RGB")), self.numbers[SETS[self.name].number(target)]


def open_torchvision(name, entry, split, transform, labels, download=False):
    """The catalog's type `torchvision`. Raises InputError as datasets.get_downstream_dataset."""
    if name not in SETS:
        raise InputError(f"{name}: torchvision reads {', '.join(SETS)}; use another type")
    row = SETS[name]
    if split is None:
        raise InputError(
            f"{name}: torchvision's has no training split of its own; use imagefolder or filelist"
        )
    try:
        dataset = row.build(entry["path"], split, **({"download": True} if download else {}))
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{name}: {reason} Looked in {entry['path']}") from error
    found = row.names(dataset)
    if found is None:  # numbered as in labels.json
        numbers = list(range(len(labels)))
    else:
        numbers = match_classes(name, list(found), labels, row.unseen)
    return Labelled(name, dataset, numbers, transform)
