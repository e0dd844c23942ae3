"""The labelled sets that torchvision reads, their classes matched to labels.json by name.

torchvision orders and names classes in its own way. A row of SETS gives its names, and ALIASES
translates those that differ from labels.json by more than case and punctuation. A class without a
partner is an error, on either side.
"""

import os
import re
from dataclasses import dataclass

import torchvision.datasets as tv
from torch.utils.data import Dataset

from decoding import to_rgb
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

# ISO 3166 codes, the folders of Country211, and the names of these countries in labels.json.
COUNTRIES = """
AD Andorra; AE United Arab Emirates; AF Afghanistan; AG Antigua and Barbuda; AI Anguilla;
AL Albania; AM Armenia; AO Angola; AQ Antarctica; AR Argentina; AT Austria; AU Australia; AW Aruba;
AX Aland Islands; AZ Azerbaijan; BA Bosnia and Herzegovina; BB Barbados; BD Bangladesh; BE Belgium;
BF Burkina Faso; BG Bulgaria; BH Bahrain; BJ Benin; BM Bermuda; BN Brunei Darussalam; BO Bolivia;
BQ Bonaire, Saint Eustatius and Saba; BR Brazil; BS Bahamas; BT Bhutan; BW Botswana; BY Belarus;
BZ Belize; CA Canada; CD DR Congo; CF Central African Republic; CH Switzerland; CI Cote d'Ivoire;
CK Cook Islands; CL Chile; CM Cameroon; CN China; CO Colombia; CR Costa Rica; CU Cuba;
CV Cabo Verde; CW Curacao; CY Cyprus; CZ Czech Republic; DE Germany; DK Denmark; DM Dominica;
DO Dominican Republic; DZ Algeria; EC Ecuador; EE Estonia; EG Egypt; ES Spain; ET Ethiopia;
FI Finland; FJ Fiji; FK Falkland Islands; FO Faeroe Islands; FR France; GA Gabon; GB United Kingdom;
GD Grenada; GE Georgia; GF French Guiana; GG Guernsey; GH Ghana; GI Gibraltar; GL Greenland;
GM Gambia; GP Guadeloupe; GR Greece; GS South Georgia and South Sandwich Is.; GT Guatemala; GU Guam;
GY Guyana; HK Hong Kong; HN Honduras; HR Croatia; HT Haiti; HU Hungary; ID Indonesia; IE Ireland;
IL Israel; IM Isle of Man; IN India; IQ Iraq; IR Iran; IS Iceland; IT Italy; JE Jersey; JM Jamaica;
JO Jordan; JP Japan; KE Kenya; KG Kyrgyz Republic; KH Cambodia; KN St. Kitts and Nevis;
KP North Korea; KR South Korea; KW Kuwait; KY Cayman Islands; KZ Kazakhstan; LA Laos; LB Lebanon;
LC St. Lucia; LI Liechtenstein; LK Sri Lanka; LR Liberia; LT Lithuania; LU Luxembourg; LV Latvia;
LY Libya; MA Morocco; MC Monaco; MD Moldova; ME Montenegro; MF Saint-Martin; MG Madagascar;
MK Macedonia; ML Mali; MM Myanmar; MN Mongolia; MO Macau; MQ Martinique; MR Mauritania; MT Malta;
MU Mauritius; MV Maldives; MW Malawi; MX Mexico; MY Malaysia; MZ Mozambique; NA Namibia;
NC New Caledonia; NG Nigeria; NI Nicaragua; NL Netherlands; NO Norway; NP Nepal; NZ New Zealand;
OM Oman; PA Panama; PE Peru; PF French Polynesia; PG Papua New Guinea; PH Philippines; PK Pakistan;
PL Poland; PR Puerto Rico; PS Palestine; PT Portugal; PW Palau; PY Paraguay; QA Qatar; RE Reunion;
RO Romania; RS Serbia; RU Russia; RW Rwanda; SA Saudi Arabia; SB Solomon Islands; SC Seychelles;
SD Sudan; SE Sweden; SG Singapore; SH St. Helena; SI Slovenia; SJ Svalbard and Jan Mayen Islands;
SK Slovakia; SL Sierra Leone; SM San Marino; SN Senegal; SO Somalia; SS South Sudan; SV El Salvador;
SX Sint Maarten; SY Syria; SZ Eswatini; TG Togo; TH Thailand; TJ Tajikistan; TL Timor-Leste;
TM Turkmenistan; TN Tunisia; TO Tonga; TR Turkey; TT Trinidad and Tobago; TW Taiwan; TZ Tanzania;
UA Ukraine; UG Uganda; US United States; UY Uruguay; UZ Uzbekistan; VA Vatican; VE Venezuela;
VG British Virgin Islands; VI United States Virgin Islands; VN Vietnam; VU Vanuatu; WS Samoa;
XK Kosovo; YE Yemen; ZA South Africa; ZM Zambia; ZW Zimbabwe
"""
ALIASES["country211"] = dict(pair.split(maxsplit=1) for pair in COUNTRIES.split(";"))

FEELINGS = ["angry", "disgusted", "fearful", "happy", "sad", "surprised", "neutral"]
VEHICLES = {"Car", "Van", "Truck"}


def distance_class(objects):
    """VTAB's class of a KITTI image, by the nearest vehicle: up to 8 m, up to 20 m, farther, none.

    objects: torchvision's target, dicts with "type" and "location" (x, y, z) in metres.
    """
    depths = [o["location"][2] for o in objects if o["type"] in VEHICLES]
    nearest = min(depths, default=1000.0)
    return next((i for i, limit in enumerate((8.0, 20.0, 999.0)) if nearest <= limit), 3)


@dataclass(frozen=True)
class TorchvisionSet:
    """A set as torchvision reads it."""

    build: callable  # (root, split, **download) -> a torchvision dataset
    train: str | None = "train"  # the default split; None: it has no training split of its own
    test: str = "test"  # the default split
    names: callable = lambda dataset: dataset.classes  # by number; a range if it has no names
    number: callable = int  # of a class, from the dataset's target
    unseen: tuple = ()  # classes of labels.json without an image
    splits: tuple = ("train", "test")  # those with labels


THREE, ALL = ("train", "val", "test"), ("all",)


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
    "sun397": TorchvisionSet(whole(tv.SUN397), None, "all", splits=ALL),
    "cars": TorchvisionSet(with_split(tv.StanfordCars)),
    "aircraft": TorchvisionSet(
        with_split(tv.FGVCAircraft), "trainval", splits=(*THREE, "trainval")
    ),
    "dtd": TorchvisionSet(with_split(tv.DTD), splits=THREE),
    "pets": TorchvisionSet(with_split(tv.OxfordIIITPet), "trainval", splits=("trainval", "test")),
    "caltech101": TorchvisionSet(
        whole(tv.Caltech101),
        None,
        "all",
        lambda d: d.categories,
        unseen=("background",),
        splits=ALL,
    ),
    "flowers": TorchvisionSet(with_split(tv.Flowers102), splits=THREE),
    # MNIST's classes are "0 - zero" and so on.
    "mnist": TorchvisionSet(
        with_flag(tv.MNIST), names=lambda d: [name.split(" - ")[0] for name in d.classes]
    ),
    "fer2013": TorchvisionSet(with_split(tv.FER2013), names=lambda d: FEELINGS),
    "stl10": TorchvisionSet(with_split(tv.STL10)),
    "eurosat": TorchvisionSet(whole(tv.EuroSAT), None, "all", splits=ALL),
    # Its signs have numbers only, by which labels.json lists them: 0 is 20 km/h, 14 stop, 42 the
    # end of "no passing" for trucks. A test pins the list, so only its length is checked.
    "gtsrb": TorchvisionSet(with_split(tv.GTSRB), names=lambda d: range(43)),
    "kitti_distance": TorchvisionSet(
        whole(tv.Kitti, train=True),  # the images with known objects
        None,
        "all",
        lambda d: ["near", "middle", "far", "none"],
        distance_class,
        splits=ALL,
    ),
    "country211": TorchvisionSet(with_split(tv.Country211), splits=("train", "valid", "test")),
    "patch_camelyon": TorchvisionSet(
        with_split(tv.PCAM), test="val", names=lambda d: ["no tumor", "tumor"], splits=THREE
    ),
    # Counts of 3 to 10 objects.
    "clevr_counts": TorchvisionSet(
        with_split(tv.CLEVRClassification),
        test="val",
        names=lambda d: [str(3 + i) for i in range(8)],
        number=lambda count: count - 3,
        splits=("train", "val"),
    ),
    "rendered_sst2": TorchvisionSet(with_split(tv.RenderedSST2), splits=THREE),
}


def plain(name):
    """A name without case and punctuation."""
    return " ".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def match_classes(name, found, labels, unseen=()):
    """The number in `labels` of each class that torchvision found, in torchvision's order.

    Args:
        name: name of the set.
        found: list of class names, or a range if the classes are numbered as in `labels`.
        labels: list of names or lists of synonyms.
        unseen: classes of `labels` that need no partner.

    Raises InputError with the classes that have no partner.
    """
    if isinstance(found, range):
        if len(found) != len(labels):
            raise InputError(
                f"{name}: torchvision has {len(found)} classes, but labels.json {len(labels)}; "
                "correct the labels"
            )
        return list(found)
    ours = {}
    for i, label in enumerate(labels):
        for synonym in [label] if isinstance(label, str) else label:
            ours.setdefault(plain(synonym), i)
    aliases = ALIASES.get(name, {})
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
    """A torchvision dataset as (transform(RGB image), class number of labels.json).

    Args:
        name: of the set.
        dataset: torchvision's; most convert their images to RGB, but keep the EXIF data.
        numbers: list of the class number of labels.json of each of torchvision's classes.
        transform: function of a PIL image.
        archived: bool, whether pixels are those of the archived code (decoding.py).
    """

    def __init__(self, name, dataset, numbers, transform, archived=False):
        self.name, self.dataset, self.numbers, self.transform = name, dataset, numbers, transform
        self.archived = archived

    def __len__(self):
        return len(self.dataset)

    @property
    def samples(self):
        """All files below the root, as torchvision has no common way to list a set's own.

        Their labels are None; the first row is the root with the matched class numbers.
        """
        folders = sorted(os.walk(self.dataset.root, followlinks=True))
        files = (
            os.path.join(folder, file) for folder, _, names in folders for file in sorted(names)
        )
        return [(str(self.dataset.root), self.numbers), *((file, None) for file in files)]

    def __getitem__(self, index):
        try:
            image, target = self.dataset[index]
            image, number = to_rgb(image, self.archived), SETS[self.name].number(target)
        except Exception as error:  # decoders of many formats raise of many kinds
            reason = f"{self.name}: image {index} cannot be read: {error}"
            raise InputError(f"{reason}; replace or remove it") from error
        return self.transform(image), self.numbers[number]


# torchvision's errors name an argument of Python.
PYTHONS_ADVICE = r"You (can|may) (use|set) download=True to download( and prepare)? it\.?"


def build(row, root, split, download):
    """torchvision's dataset; FER2013, which it cannot download, says where it is to be had."""
    if download:
        try:
            return row.build(root, split, download=True)
        except TypeError as error:
            if "'download'" not in str(error):
                raise
    return row.build(root, split)


def open_torchvision(name, entry, split, transform, labels, download=False):
    """Opens a set of the catalog's type `torchvision` as a Labelled dataset.

    Args:
        name: a name of SETS.
        entry: the set's entry of the catalog.
        split: name of the split, or None if torchvision's set lacks it.
        transform: function of a PIL image.
        labels: list of the set's classes, each a text or a list of synonyms.
        download: bool, whether torchvision may download the set.

    Raises InputError if the set is unknown, absent or damaged, or its classes are others.
    """
    if name not in SETS:
        raise InputError(
            f"unknown torchvision set {name!r}; choose from {', '.join(SETS)}, or use another type"
        )
    row = SETS[name]
    if split is None:
        raise InputError(
            f"{name}: torchvision's set has no training split of its own; use imagefolder or "
            "filelist"
        )
    if split not in row.splits:
        raise InputError(
            f"{name}: unknown torchvision split {split!r}; choose from {', '.join(row.splits)} "
            "and correct the catalog"
        )
    try:
        dataset = build(row, entry["path"], split, download)
    except Exception as error:  # a damaged file can raise anything
        is_told = isinstance(error, (RuntimeError, OSError, ValueError, TypeError))
        reason = str(error).partition("\n")[0] if is_told else f"it is damaged: {error!r}."
        reason = re.sub(PYTHONS_ADVICE, "make_dataset.py can download it.", reason)
        raise InputError(f"{name}: {reason} Looked in {entry['path']}") from error
    numbers = match_classes(name, row.names(dataset), labels, row.unseen)
    return Labelled(name, dataset, numbers, transform, entry.get("pixels") == "archived")
