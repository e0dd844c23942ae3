"""Tiny copies of every set that torchvision reads: each picture's colour is its label's number."""

import csv
import json
import pickle

import h5py
import numpy as np
import scipy.io
from PIL import Image

import catalog
import utils
from torchvision_sets import ALIASES

LABELS = utils.read_json(catalog.LABELS, "labels")


def paint(path, number, mode="RGB", size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = (number // 256, number % 256, 7) if mode == "RGB" else number
    Image.new(mode, size, colour).save(path, "PPM" if path.suffix == ".ppm" else "PNG")


def seen(image):
    red, green, blue = image.getpixel((0, 0))
    return green if red == green == blue else 256 * red + green  # gray, or colour


def theirs(name):
    """torchvision's name of each label, in labels.json's order."""
    back = {ours: name for name, ours in ALIASES.get(name, {}).items()}
    return [back.get(label, label.replace(" ", "_")) for label in LABELS[name]]


def food101(root):
    names = theirs("food101")
    for i, name in enumerate(names):
        paint(root / f"food-101/images/{name}/1.jpg", i)
    (root / "food-101/meta").mkdir()
    for split in ("train", "test"):
        table = {name: [f"{name}/1"] for name in reversed(names)}
        (root / f"food-101/meta/{split}.json").write_text(json.dumps(table))


def sun397(root):
    names = [
        n.replace("_outdoor", "/outdoor").replace("_indoor", "/indoor") for n in theirs("sun397")
    ]
    for i, name in enumerate(names):
        paint(root / f"SUN397/{name[0]}/{name}/sun_{i}.jpg", i)
    lines = [f"/{name[0]}/{name}" for name in sorted(names)]
    (root / "SUN397/ClassName.txt").write_text("\n".join(lines) + "\n")


def cars(root):
    names = LABELS["cars"][::-1]
    devkit = root / "stanford_cars/devkit"
    devkit.mkdir(parents=True)
    meta = {"class_names": np.array(names, dtype=object)}
    scipy.io.savemat(devkit / "cars_meta.mat", meta)
    rows = np.array(
        [(f"{i}.jpg", i + 1) for i in range(len(names))], [("fname", object), ("class", int)]
    )
    for folder, file in (
        ("cars_train", devkit / "cars_train_annos.mat"),
        ("cars_test", devkit.parent / "cars_test_annos_withlabels.mat"),
    ):
        scipy.io.savemat(file, {"annotations": rows})
        for i in range(len(names)):
            paint(root / f"stanford_cars/{folder}/{i}.jpg", len(names) - 1 - i)


def aircraft(root):
    data = root / "fgvc-aircraft-2013b/data"
    for i in range(len(LABELS["aircraft"])):
        paint(data / f"images/{i:07d}.jpg", i)
    (data / "variants.txt").write_text("\n".join(LABELS["aircraft"][::-1]) + "\n")
    lines = [f"{i:07d} {name}" for i, name in enumerate(LABELS["aircraft"])]
    for split in ("trainval", "test"):
        (data / f"images_variant_{split}.txt").write_text("\n".join(lines) + "\n")


def dtd(root):
    names = theirs("dtd")
    for i, name in enumerate(names):
        paint(root / f"dtd/dtd/images/{name}/{name}_1.jpg", i)
    (root / "dtd/dtd/labels").mkdir()
    for split in ("train", "test"):
        lines = "".join(f"{name}/{name}_1.jpg\n" for name in names)
        (root / f"dtd/dtd/labels/{split}1.txt").write_text(lines)


def pets(root):
    """Cats and dogs in one alphabet, the cats' names in capitals."""
    names = theirs("pets")
    order = sorted(range(len(names)), key=lambda i: names[i].lower())
    base = root / "oxford-iiit-pet"
    for i, name in enumerate(names):
        paint(base / f"images/{name}_1.jpg", i)
    (base / "annotations").mkdir()
    lines = "".join(f"{names[i]}_1 {k + 1} 1 1\n" for k, i in enumerate(order))
    for split in ("trainval", "test"):
        (base / f"annotations/{split}.txt").write_text(lines)


def caltech101(root):
    base = root / "caltech101/101_ObjectCategories"
    paint(base / "BACKGROUND_Google/image_0001.jpg", 0)
    for i, name in enumerate(theirs("caltech101")):
        if i:
            paint(base / f"{name.replace('__', '_')}/image_0001.jpg", i)


def flowers(root):
    base = root / "flowers-102"
    for i in range(102):
        paint(base / f"jpg/image_{i + 1:05d}.jpg", i)
    scipy.io.savemat(base / "imagelabels.mat", {"labels": np.arange(1, 103)})
    numbers = np.arange(1, 103)
    scipy.io.savemat(base / "setid.mat", {"trnid": numbers, "tstid": numbers, "valid": numbers})


def mnist(root):
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    pixels = np.repeat(np.arange(10, dtype=np.uint8), 28 * 28)
    for part in ("train", "t10k"):
        head = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (10, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        head = bytes([0, 0, 8, 1]) + (10).to_bytes(4, "big")
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + bytes(range(10)))


def fer2013(root):
    order = [0, 1, 2, 3, 5, 6, 4]  # theirs ends with "neutral"
    (root / "fer2013").mkdir()
    with open(root / "fer2013/fer2013.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["emotion", "pixels", "Usage"])
        for usage in ("Training", "PrivateTest"):
            for emotion, number in enumerate(order):
                writer.writerow([emotion, " ".join([str(number)] * 48 * 48), usage])


def stl10(root):
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    names = LABELS["stl10"][::-1]
    (folder / "class_names.txt").write_text("\n".join(names))
    pixels = np.zeros((10, 3, 96, 96), dtype=np.uint8)
    pixels[:, 1] = np.arange(10)[::-1, None, None]
    for part in ("train", "test"):
        (folder / f"{part}_X.bin").write_bytes(pixels.tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes(range(1, 11)))


def cifar(root, name, folder, files, meta, key, labels_key):
    base = root / folder
    base.mkdir(parents=True)
    names = theirs(name)
    pixels = np.zeros((len(names), 3, 32, 32), dtype=np.uint8)
    pixels[:, 1] = np.arange(len(names))[::-1, None, None]
    batch = {"data": pixels.reshape(len(names), -1), labels_key: list(range(len(names)))}
    for file in files:
        (base / file).write_bytes(pickle.dumps(batch))
    (base / meta).write_bytes(pickle.dumps({key: names[::-1]}))


def cifar10(root):
    files = ["test_batch", *(f"data_batch_{i}" for i in range(1, 6))]
    cifar(root, "cifar10", "cifar-10-batches-py", files, "batches.meta", "label_names", "labels")


def cifar100(root):
    names = "fine_label_names", "fine_labels"
    cifar(root, "cifar100", "cifar-100-python", ["train", "test"], "meta", *names)


def eurosat(root):
    for i, name in enumerate(theirs("eurosat")):
        paint(root / f"eurosat/2750/{name}/{name}_1.jpg", i)


def gtsrb(root):
    base = root / "gtsrb"
    for i in range(43):
        paint(base / f"GTSRB/Training/{i:05d}/1.ppm", i)
        paint(base / f"GTSRB/Final_Test/Images/{i:05d}.ppm", i)
    lines = "".join(f"{i:05d}.ppm;{i}\n" for i in range(43))
    (base / "GT-final_test.csv").write_text(f"Filename;ClassId\n{lines}")


def kitti_distance(root):
    """Far, nearer, close and no car at all, as labels.json orders them, and other objects."""
    lines = {
        0: [("Car", 20.5), ("Pedestrian", 3.0)],
        1: [("Truck", 40.0), ("Van", 19.9)],
        2: [("Car", 7.9)],
        3: [("Pedestrian", 5.0), ("DontCare", -1000.0)],
    }
    for i, objects in lines.items():
        paint(root / f"Kitti/raw/training/image_2/{i}.png", i)
        text = "".join(f"{kind} 0 0 0 0 0 1 1 1 1 1 0 1 {z} 0\n" for kind, z in objects)
        (root / "Kitti/raw/training/label_2").mkdir(exist_ok=True)
        (root / f"Kitti/raw/training/label_2/{i}.txt").write_text(text)


def country211(root):
    for i, code in enumerate(ALIASES["country211"]):
        for split in ("train", "test"):
            paint(root / f"country211/{split}/{code}/1.jpg", i)


def patch_camelyon(root):
    pixels = np.zeros((2, 96, 96, 3), dtype=np.uint8)
    pixels[1, ..., 1] = 1
    (root / "pcam").mkdir()
    for split in ("train", "valid"):
        for part, data in (("x", pixels), ("y", np.arange(2).reshape(2, 1, 1, 1))):
            path = root / f"pcam/camelyonpatch_level_2_split_{split}_{part}.h5"
            with h5py.File(path, "w") as file:
                file[part] = data


def clevr_counts(root):
    base = root / "clevr/CLEVR_v1.0"
    (base / "scenes").mkdir(parents=True)
    for split in ("train", "val"):
        scenes = []
        for i, label in enumerate(LABELS["clevr_counts"]):
            paint(base / f"images/{split}/{i}.png", i)
            scenes.append({"image_filename": f"{i}.png", "objects": [0] * int(label)})
        text = json.dumps({"scenes": scenes})
        (base / f"scenes/CLEVR_{split}_scenes.json").write_text(text)


def rendered_sst2(root):
    for i, name in enumerate(LABELS["rendered_sst2"]):
        for split in ("train", "test"):
            paint(root / f"rendered-sst2/{split}/{name}/1.png", i)


WRITERS = [food101, sun397, cars, aircraft, dtd, pets, caltech101, flowers, mnist, fer2013, stl10]
WRITERS += [cifar10, cifar100, eurosat, gtsrb, kitti_distance, country211, patch_camelyon]
WRITERS += [clevr_counts, rendered_sst2]
WRITERS = {writer.__name__: writer for writer in WRITERS}
