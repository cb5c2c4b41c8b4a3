"""Class folders: DIR/train/CLASS/x.jpg and DIR/val/CLASS/y.jpg, or DIR/CLASS/x.jpg.

    find_images       the images of a split with their labels and the class names (data.Folder)
    note_untrained    a note if validation data have none of the classes of the training data
    refuse_address    an error if the data are on another machine

A folder with another layout would give wrong classes, and therefore wrong captions and accuracies.
So it is refused with a message. Files and folders that are not used are counted and named.
"""
import os
import re
import unicodedata
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from ..augment import ASSETS
from ..dist import print0, printable
from .images import SUFFIXES, is_image

LAYOUTS = ("expected DIR/train/CLASS/x.jpg and DIR/val/CLASS/y.jpg, or DIR/CLASS/x.jpg (images "
           "with a caption each are read from tars)")
# Folders of operating systems and file servers, in lower case. They can hold thumbnails or deleted
# images. Names that begin with a dot are ignored without a message.
SYSTEM_FOLDERS = {"__macosx", "lost+found", "@eadir", "#recycle", "@recycle", "@recycler",
                  "$recycle.bin", "recycler", "system volume information", "__pycache__"}
# words in the name of a split; FILLERS may accompany them, as in Training_Set or val2017
SPLIT_WORDS = {
    "train": "train", "training": "train", "trainset": "train",
    "val": "val", "valid": "val", "validation": "val", "valset": "val", "dev": "val",
    "eval": "val", "evaluation": "val",
    "test": "test", "testing": "test", "testset": "test"}
FILLERS = {"set", "data", "dataset", "split", "images", "image", "imgs", "img"}
# kind of an address -> commands that mount or copy the folder X
ADDRESSES = {
    "s3": "mount-s3 BUCKET DIR, or aws s3 sync X DIR",
    "gs": "gcsfuse BUCKET DIR, or gcloud storage rsync -r X DIR",
    "hdfs": "hdfs dfs -get X DIR",
    "http": "wget -r X", "https": "wget -r X",
    "pipe": "the command after pipe:, with its output in a file",
}
NOWHERE = "links lead nowhere"
IGNORED = "files are ignored, because they have no image suffix or are not in a class folder"


def find_images(spec, split, whole):
    """The images of data.Folder; its docstring describes the classes

    -> root (the folder of the split), files (bytes, relative to root), labels, class names
    ValueError if the folder holds no images, or if its layout is not one of LAYOUTS.
    """
    base = Path(spec)
    root = find_split(base, split, whole)
    left_out = defaultdict(list)                           # {reason: names}
    folders = class_folders(root, left_out)                # {class: [its folder]}
    if root != base / "val":                               # its classes are those of train/
        check_split_names(root, list(folders))
    images = {}                                            # {class: files}
    for name, places in folders.items():
        images[name] = [f for place in places for f in images_below(root, place, left_out)]
    if not any(images.values()):
        notes = "".join(f"; {text}" for text in notes_of(left_out))
        raise ValueError(f"{root} holds no class folders with images ({' '.join(SUFFIXES)}); "
                         f"{LAYOUTS}{notes}")
    check_inner_folders(root, images)
    check_captions(root, images, left_out)
    classes = choose_classes(base, root, folders, images, left_out)
    for text in notes_of(left_out):
        print0(f"{printable(root)}: {text}")
    files, labels = [], []
    for label, name in enumerate(classes):
        files += [os.fsencode(file) for file in images.get(name, ())]
        labels += [label] * len(images.get(name, ()))
    return root, files, labels, class_names(base, classes)


def refuse_address(spec):
    """ValueError if spec is an address, such as s3://bucket/x.tar or WebDataset's pipe:command.
    Samples are read in random order from files, and a stream has one order only."""
    kind, colon, rest = spec.partition(":")
    if not (rest.startswith("//") or kind == "pipe") or os.path.exists(spec):
        return
    folder = spec.rpartition("/")[0] if spec.endswith(".tar") else spec
    command = ADDRESSES.get(kind, "rclone mount, or rclone copy").replace("X", folder)
    raise ValueError(f"{printable(spec)} is an address, but data are read from files of this "
                     f"machine, in random order. Mount the data, or copy them to a fast disk (for "
                     f"example: {printable(command)}), and give that folder or its tars as --data")


# ---------------------------------------------------------------- splits
def find_split(base, split, whole):
    """-> the folder that contains the class folders of this split"""
    if not base.is_dir():
        raise ValueError(f"there is no folder {base}; {LAYOUTS} (the name of a tar file must end "
                         f"in .tar; without --data the built-in shapes are used)")
    check_siblings(base)
    if (base / split).is_dir():
        return base / split
    kinds = [split] if split == "train" else ["val", "test"]
    similar = [f for f in folders_in(base) if split_kind(f)[0] in kinds]
    hint = ""
    if similar:
        hint = (f"; the folder {printable(similar[0])} looks like one: if it is, rename it to "
                f"{split}")
    if split == "train" and (base / "val").is_dir():
        raise ValueError(f"{base} has no train/ folder{hint}; to train on its val/ folder, type "
                         f"--data {base / 'val'}")
    # a folder without splits holds training images, unless --val-data names it
    if split == "val" and ((base / "train").is_dir() or not whole):
        raise ValueError(f"{base} has no val/ folder{hint}; give another data set with --val-data")
    return base


def check_siblings(base):
    """ValueError if train/ or val/ seems to be a class, as in bus/, car/, train/. A note if other
    folders with images are beside train/ and val/."""
    if not ((base / "train").is_dir() or (base / "val").is_dir()):
        return
    folders = folders_in(base)
    splits = [f for f in folders if is_split(f)]
    others = [f for f in folders if f not in splits and has_images(base, [f])]
    if not others:
        return
    if len(splits) == 1:
        split, = splits
        inner = {f for f in folders_in(base / split) if has_images(base / split, [f])}
        # a split holds class folders, and no folder beside it holds the same ones
        if not inner or any(inner & set(folders_in(base / other)) for other in others):
            raise ValueError(
                f"{base} holds {split}/ and other folders with images ({listed(others)}). A folder "
                f"called {split} is taken for a split of the data. If {split} is a class here, "
                f"move all classes into {base}/train/, or rename it (its name for captions can "
                f"stand in classnames.txt). If it is the split, type --data {base / split}")
    print0(f"{printable(base)}: {len(others)} folders with images are beside {' and '.join(splits)}"
           f" and are not used ({listed(others)})")


def split_kind(folder):
    """'Training_Set' -> 'train', (); 'seg_test2' -> 'test', ('seg',); 'cat' -> None, ('cat',)"""
    words = [word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", folder)]
    kinds = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    rest = tuple(word for word in words if word not in SPLIT_WORDS and word not in FILLERS)
    return (kinds.pop() if len(kinds) == 1 else None), rest


def is_split(folder):
    kind, rest = split_kind(folder)
    return kind is not None and not rest


def split_pair(folders):
    """-> the folders that are splits of the same data, such as training and test, or seg_train and
    seg_test; [] if there are none"""
    groups = defaultdict(lambda: defaultdict(list))        # {rest of the name: {kind: folders}}
    for folder in folders:
        kind, rest = split_kind(folder)
        if kind:
            groups[rest][kind].append(folder)
    for group in groups.values():
        if len(group) > 1:
            return [folder for same_kind in group.values() for folder in same_kind]
    return []


def check_split_names(root, folders):
    """ValueError if class folders are splits under other names than train and val"""
    splits = split_pair(folders)
    if folders and all(is_split(folder) for folder in folders):
        splits = folders
    if not splits:
        return
    by_kind = {split_kind(folder)[0]: folder for folder in reversed(splits)}
    train = by_kind.get("train", splits[0])
    command = f"--data {root / train}"
    val = by_kind.get("val", by_kind.get("test"))
    if val not in (None, train):
        command += f" --val-data {root / val}"
    raise ValueError(f"{root}: the folders {listed(splits)} look like splits of the data, not like "
                     f"classes. Rename them to train and val, or type {command}. If they are "
                     f"classes, give them other names")


def check_inner_folders(root, images):
    """ValueError if a class folder contains splits: DIR/CLASS/train, or a data set in a folder"""
    for name, files in images.items():
        inner = sorted({file.split("/")[1] for file in files if file.count("/") > 1})
        splits = split_pair(inner)
        if splits:
            raise ValueError(f"{root}: the class folder {printable(name)} contains "
                             f"{listed(splits)}, which look like splits of the data. If it is the "
                             f"data set, type --data {root / name}; otherwise, {LAYOUTS}")


# ---------------------------------------------------------------- folders and files
def nfc(name):
    """A file name as text in Unicode form NFC. 'é' can be one character or two, and copies between
    systems change its form. Names are UTF-8, also if the locale decodes them otherwise."""
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "surrogateescape"))


def as_text(name):
    """A name of nfc -> text that can be encoded; bytes that are not UTF-8 become U+FFFD"""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def class_folders(root, left_out):
    """-> {name of the class: its folders}, sorted by bytes, which is the same order in any locale.
    A class has two folders if their names differ in their Unicode form only.

    left_out  {reason: names}, to which all that is not used is added, or None
    """
    found = defaultdict(list)
    for entry in sorted(os.scandir(root), key=lambda entry: os.fsencode(entry.name)):
        if entry.name[0] == ".":
            continue
        if entry.is_dir():
            if is_system_folder(entry.name, entry.name, left_out):
                continue
            found[nfc(entry.name)].append(entry.name)
        elif is_image(entry.name):                         # it has no label
            note(left_out, IGNORED, entry.name)
        elif is_broken_link(entry.path):
            note(left_out, NOWHERE, entry.name)
    for places in found.values():
        for place in places[1:]:
            note(left_out, "folders have the name of another one in another Unicode form, and are "
                           "read as the same class", place)
    return dict(found)


def folders_in(root):
    """-> names of the class folders"""
    return [place for places in class_folders(root, None).values() for place in places]


def note(left_out, reason, name):
    if left_out is not None:
        left_out[reason].append(name)


def is_system_folder(name, path, left_out):
    if name.lower() not in SYSTEM_FOLDERS:
        return False
    note(left_out, "folders of the operating system are ignored", path)
    return True


def is_broken_link(path):
    return os.path.islink(path) and not os.path.exists(path)


def has_images(root, places):
    """True if one of the folders contains an image"""
    return any(True for place in places for _ in images_below(root, place, None))


def images_below(root, folder, left_out):
    """Yield the paths of all images in root/folder and its subfolders, relative to root, sorted"""
    def fail(error):
        note(left_out, "folders cannot be read", os.path.relpath(error.filename, root))

    top = os.path.join(root, folder)
    followed = [os.path.realpath(top)]
    for directory, folders, files in os.walk(top, onerror=fail, followlinks=True):
        here = os.path.relpath(directory, root)
        # os.walk visits the folders that remain in this list, in its order
        folders[:] = [f for f in sorted(folders, key=os.fsencode)
                      if is_wanted(f, here, directory, followed, left_out)]
        for file in sorted(files, key=os.fsencode):
            if file[0] == ".":
                continue
            if is_image(file):
                yield f"{here}/{file}"
            elif left_out is not None:
                is_lost = is_broken_link(os.path.join(directory, file))
                left_out[NOWHERE if is_lost else IGNORED].append(f"{here}/{file}")


def is_wanted(folder, here, directory, followed, left_out):
    """True if images_below has to visit a subfolder

    followed  real paths of the class folder and of the links that are followed. A link to a folder
              that contains one of them would be a loop, and a link into one of them would give the
              same images twice.
    """
    path = f"{here}/{folder}"
    if folder[0] == "." or is_system_folder(folder, path, left_out):
        return False
    if not os.path.islink(os.path.join(directory, folder)):
        return True
    target = os.path.realpath(os.path.join(directory, folder))
    for other in followed:
        if os.path.commonpath([target, other]) in (target, other):
            note(left_out, "links are not followed, because they lead to a folder that is read "
                           "anyway, or around in a circle", path)
            return False
    followed.append(target)
    return True


def listed(names):
    """-> the first names, for a message"""
    return ", ".join([*(printable(name) for name in names[:3]), *["..."][:len(names) > 3]])


def notes_of(left_out):
    return [f"{len(names)} {reason} ({listed(names)})" for reason, names in left_out.items()]


# ---------------------------------------------------------------- captions
def check_captions(root, images, left_out):
    """Captions beside the images, as in img2dataset's format 'files', are not read: ValueError if
    the folders are numbers and thus no classes, else a note"""
    texts = set()
    for file in left_out.get(IGNORED, ()):
        stem, _, suffix = file.rpartition(".")
        if suffix.lower() in ("txt", "json", "caption"):
            texts.add(stem)
    captioned = [file for files in images.values() for file in files
                 if file.rpartition(".")[0] in texts]
    if not captioned:
        return
    reason = ("images have a text of the same name beside them. It is not read: captions are read "
              "from tars only")
    names = [name for name, files in images.items() if files]
    if all(name.isdigit() for name in names):
        raise ValueError(f"{root}: {len(captioned)} {reason} ({listed(captioned)}). The folders "
                         f"({listed(names)}) do not look like classes. Pack each folder into a "
                         f"tar, as in `tar -cf {root}/{names[0]}.tar -C {root} {names[0]}`, and "
                         f"type --data '{root}/*.tar'; or let img2dataset write --output_format "
                         f"webdataset. If the folders are classes, move the texts elsewhere")
    left_out[reason] = captioned


# ---------------------------------------------------------------- classes
def choose_classes(base, root, folders, images, left_out):
    """-> {class: its folders} in the order of the labels

    The classes of both splits are the folders with images in train/, so that labels agree. Without
    train/, they are the folders with images in root. ValueError if val/ has none of the classes.
    """
    own = {name: places for name, places in folders.items() if images[name]}
    classes = {}
    if root == base / "val" and (base / "train").is_dir():
        trained = class_folders(base / "train", None)
        classes = {name: places for name, places in trained.items()
                   if has_images(base / "train", places)}
    classes = classes or own
    unknown = [name for name in own if name not in classes]
    if len(unknown) == len(own):
        raise ValueError(f"no class folder of {root} ({listed(unknown)}) is one of {base / 'train'}"
                         f" ({listed([*classes])}), so the labels of its images are unknown. Move "
                         f"the images into folders that are called as those of train/ (Tiny "
                         f"ImageNet lists their classes in val_annotations.txt), or give other "
                         f"images with --val-data; --val-data {root} uses these without labels "
                         f"of train/, which is enough for eval.py recon")
    for name in unknown:
        left_out["images are left out, because their folders are not classes of train/"] += (
            images[name])
    empty = [name for name in folders if name not in classes and name not in own]
    if empty:
        left_out["folders have no image and are not classes"] = empty
    missing = [name for name in classes if not images.get(name)]
    if missing:
        left_out[f"of {len(classes)} classes have no image here"] = missing
    if root == base / "train" and (base / "val").is_dir():
        unknown = [name for name in map(nfc, folders_in(base / "val")) if name not in classes]
        if unknown:
            left_out["folders of val/ are not classes of train/ and cannot be evaluated"] = unknown
    note_one_class(root, classes, images)
    return classes


def note_one_class(root, classes, images):
    if len(classes) > 1:
        return
    name, = classes
    inner = sorted({file.split("/")[1] for file in images[name] if file.count("/") > 1})
    note = (f"{root}: there is only one class, {name}, so CLIP, zero-shot classification and "
            f"probes have nothing to tell apart")
    if len(inner) > 1:
        note += f"; if the classes are in it ({listed(inner)}), type --data {root / name}"
    print0(printable(note))


def class_names(base, classes):
    """-> the name of each class, a list; data.Folder describes where it comes from"""
    wnids = (ASSETS / "imagenet_wnids.txt").read_text("utf-8").splitlines()
    imagenet = (ASSETS / "imagenet_classnames.txt").read_text("utf-8").splitlines()
    names = dict(zip(wnids, imagenet, strict=True))
    # base may be DIR/val, so DIR/classnames.txt is read too; the file in base takes precedence
    for folder in (base.parent, base):
        path = folder / "classnames.txt"
        if not path.exists():
            continue
        found, problem = read_class_names(path, classes)
        if problem and not found and folder == base:
            raise ValueError(f"{problem}; correct the file, or delete it to use the names of the "
                             f"folders")
        if problem:
            print0(problem)
        names |= found
    return [names.get(name, as_text(name).replace("_", " ")) for name in classes]


def read_class_names(path, classes):
    """-> {class: name} from lines of folder<TAB>name, and what is wrong with the file, or "" """
    found, wrong = {}, []
    lines = path.read_text("utf-8-sig", "replace").splitlines()
    for line in filter(str.strip, lines):
        folder, _, name = line.partition("\t")
        if name.strip():
            found[unicodedata.normalize("NFC", folder)] = name
        else:
            wrong.append(line)
    used = {folder: name for folder, name in found.items() if folder in classes}
    wanted = "wanted lines of folder, TAB, name"
    if wrong:
        return used, (f"{printable(path)}: {len(wrong)} of {len(lines)} lines have no TAB with a "
                      f"name behind it ({printable(wrong[0])}, ...); {wanted}")
    if not used:
        return used, (f"{printable(path)} names none of the class folders ({listed([*classes])}); "
                      f"{wanted}")
    return used, ""


def note_untrained(source, data):
    """Print a note if no class of the images that are evaluated is a class of the training data.

    source  data source of the images      data  --data of the training run, or None
    """
    if not data or not os.path.isdir(data) or str(data) == source.spec:
        return
    base = Path(data)
    with suppress(ValueError):                             # these are not the data that are read
        trained = class_names(base, class_folders(find_split(base, "train", False), None))
        if set(trained).isdisjoint(source.classes):
            print0(f"note         none of the {len(source.classes)} classes of "
                   f"{printable(source.spec)} ({listed(source.classes)}) is one of the "
                   f"{len(trained)} classes of {printable(data)} ({listed(trained)})")
