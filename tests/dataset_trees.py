"""Small trees in the exact layouts of the published datasets, with their quirks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco

from revseg_jax.data.frames import encode_frame

HEIGHT, WIDTH = 48, 80
Masks = list[np.ndarray | None]


def frames_in(folder: Path, names: Sequence[str], height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for name in names:
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        (folder / f"{name}.jpg").write_bytes(encode_frame(np.kron(coarse, np.ones((8, 8, 1), np.uint8))))


def box(x: int, y: int, size: int = 12, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[y : y + size, x : x + size] = True
    return mask


def moving(frames: int, x: int, y: int, absent: Sequence[int] = ()) -> Masks:
    return [None if t in absent else box(x + 3 * t, y) for t in range(frames)]


def palette(folder: Path, names: Sequence[str], objects: dict[int, Masks], void: np.ndarray | None = None) -> None:
    """Palette images whose pixel values are the objects' ids, as YouTube-VOS and DAVIS have them."""
    folder.mkdir(parents=True)
    for t, name in enumerate(names):
        pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
        for value, masks in objects.items():
            if masks[t] is not None:
                pixels[masks[t]] = value
        if void is not None:
            pixels[void] = 255
        image = Image.fromarray(pixels, "P")
        image.putpalette([channel for value in range(256) for channel in (value, 255 - value, value * 7 % 256)])
        image.save(folder / f"{name}.png")


def rle(mask: np.ndarray | None) -> dict | None:
    if mask is None:
        return None
    encoded = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def uncompressed(mask: np.ndarray | None) -> dict | None:
    """COCO's other form: the lengths of runs, column by column, beginning with zeros."""
    if mask is None:
        return None
    flat = mask.ravel("F").astype(np.int8)
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *ends, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": ([0] if flat[0] else []) + runs}


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


YTVOS_NAMES = ["00000", "00005", "00010", "00015"]
YTVOS_OBJECTS = {1: moving(4, 2, 4), 2: moving(4, 20, 30, absent=[0, 3])}


def ref_youtube_vos(root: Path) -> Path:
    """obj_id as ONE text, ids sorted as texts (so "10" before "2"), a file of test videos inside valid's."""
    expressions = {str(n): {"exp": f"thing {n}", "obj_id": "1" if n % 2 else "2"} for n in range(12)}
    train = {"videos": {"0a1b": {"expressions": dict(sorted(expressions.items())), "frames": YTVOS_NAMES}}}
    write_json(root / "meta_expressions/train/meta_expressions.json", train)
    # Whoever has the download of all frames has four more between those that are annotated.
    frames_in(root / "train/JPEGImages/0a1b", [*YTVOS_NAMES, "00001", "00002", "00003", "00004"])
    palette(root / "train/Annotations/0a1b", YTVOS_NAMES, YTVOS_OBJECTS)
    write_json(root / "train/meta.json", {"videos": {}})
    hidden = {name: {"expressions": {"0": {"exp": "a dog"}}, "frames": YTVOS_NAMES} for name in ("val", "test")}
    write_json(root / "meta_expressions/valid/meta_expressions.json", {"videos": hidden})
    write_json(root / "meta_expressions/test/meta_expressions.json", {"videos": {"test": hidden["test"]}})
    frames_in(root / "valid/JPEGImages/val", YTVOS_NAMES, seed=1)
    frames_in(root / "valid/JPEGImages/test", YTVOS_NAMES, seed=2)
    return root


DAVIS_NAMES = [f"{t:05d}" for t in range(3)]
DAVIS_OBJECTS = {1: moving(3, 2, 4), 2: moving(3, 20, 30), 3: moving(3, 40, 10)}


def ref_davis17(root: Path) -> Path:
    """Two objects, four annotators each, object by object; a third that nobody names; void pixels of 255."""
    expressions = {str(n): {"exp": f"object {n // 4} by {n % 4}", "obj_id": str(n // 4 + 1)} for n in range(8)}
    for split in ("train", "valid"):
        content = {"videos": {"blackswan": {"expressions": expressions, "frames": DAVIS_NAMES}}}
        write_json(root / f"meta_expressions/{split}/meta_expressions.json", content)
        frames_in(root / split / "JPEGImages/blackswan", DAVIS_NAMES)
        palette(root / split / "Annotations/blackswan", DAVIS_NAMES, DAVIS_OBJECTS, void=box(60, 20, 6))
    return root


MEVIS_OBJECTS = {"4": moving(4, 2, 4), "17": moving(4, 20, 30, absent=[1]), "23": moving(4, 40, 10)}


def mevis(root: Path) -> Path:
    """Lists of obj_id and anno_id, null masks, valid without any truth."""
    names = [f"{t:05d}" for t in range(4)]
    expressions = {
        "0": {"exp": "both that move right", "obj_id": [0, 1], "anno_id": [4, 17]},
        "1": {"exp": "the last one", "obj_id": [2], "anno_id": [23]},
    }
    for split in ("train", "valid_u"):
        content = {"videos": {"377b1c5f365c": {"expressions": expressions, "vid_id": 0, "frames": names}}}
        write_json(root / split / "meta_expressions.json", content)
        write_json(root / split / "mask_dict.json", {k: [rle(mask) for mask in m] for k, m in MEVIS_OBJECTS.items()})
        frames_in(root / split / "JPEGImages/377b1c5f365c", names)
    plain = {name: {"exp": expression["exp"]} for name, expression in expressions.items()}
    content = {"videos": {"d56a6ec78cfa": {"expressions": plain, "vid_id": 0, "frames": names}}}
    write_json(root / "valid/meta_expressions.json", content)
    frames_in(root / "valid/JPEGImages/d56a6ec78cfa", names)
    return root


def revos(root: Path) -> Path:
    """Video ids that are paths, type_id, an expression about nothing, the masks of all that is an object. An absent
    object is null here and an empty mask there."""
    names = [f"{t:05d}" for t in range(4)]
    expressions = {
        "0": {"exp": "the lower one", "obj_id": [1], "anno_id": [17], "type_id": 0},
        "1": {"exp": "what could one eat?", "obj_id": [0, 1], "anno_id": [4, 17], "type_id": 1},
        "2": {"exp": "a zebra", "obj_id": [], "anno_id": [], "type_id": 2},
    }
    for split in ("train", "valid"):
        video = f"OVIS/{split}/3ba3"
        content = {"videos": {video: {"expressions": expressions, "vid_id": 0, "frames": names}}}
        write_json(root / f"meta_expressions_{split}_.json", content)
        frames_in(root / "JPEGImages" / video, names)
    masks = {k: [rle(mask) for mask in m] for k, m in MEVIS_OBJECTS.items()}
    masks["17"][1] = rle(np.zeros((HEIGHT, WIDTH), bool))
    write_json(root / "mask_dict.json", masks)
    # Either one mask a frame or the list of its parts.
    parts = [[rle(MEVIS_OBJECTS[k][t]) for k in ("4", "17", "23") if MEVIS_OBJECTS[k][t] is not None] for t in range(4)]
    write_json(root / "mask_dict_foreground.json", {"OVIS/valid/3ba3": {"masks_rle": parts, "vid_id": 0}})
    return root


def lv_vis_by_visa(root: Path) -> Path:
    names = [f"{t:05d}" for t in range(4)]
    expressions = {"0": {"exp": "horse", "obj_id": [0, 1], "anno_id": [4, 17]}, "1": {"exp": "cart", "anno_id": [23]}}
    content = {"videos": {"00007": {"expressions": expressions, "vid_id": 7, "frames": names}}}
    write_json(root / "train/meta_expressions.json", content)
    write_json(root / "train/mask_dict.json", {k: [rle(mask) for mask in m] for k, m in MEVIS_OBJECTS.items()})
    frames_in(root / "train/JPEGImages/00007", names)
    return root


def lv_vis_official(root: Path) -> Path:
    """YouTube-VIS json; masks with compressed and with plain run lengths."""
    files = [f"00007/{t:05d}.jpg" for t in range(4)]
    video = {"id": 7, "file_names": files, "height": HEIGHT, "width": WIDTH, "length": 4}
    categories = {"4": 31, "17": 31, "23": 2}
    annotations = [
        {"id": int(k), "video_id": 7, "category_id": categories[k], "segmentations": [form(mask) for mask in m]}
        for (k, m), form in zip(MEVIS_OBJECTS.items(), (rle, uncompressed, uncompressed), strict=True)
    ]
    names = [{"id": 31, "name": "horse"}, {"id": 2, "name": "toy_cart"}]
    write_json(root / "train_instances.json", {"videos": [video], "annotations": annotations, "categories": names})
    frames_in(root / "train/JPEGImages/00007", [f"{t:05d}" for t in range(4)])
    return root


def reason_vos(root: Path) -> Path:
    """Expressions as a LIST; one folder of images an object, named by source, video and object."""
    names = [f"{t:05d}" for t in range(4)]
    expressions = [
        {"obj_id": 2, "exp_id": 0, "exp_text": "who wins?", "is_sent": 1},
        {"obj_id": 1, "exp_id": 1, "exp_text": "who loses?", "is_sent": 1},
    ]
    content = {"videos": {"race": {"source": "MeViS", "is_sent": 1, "expressions": expressions}}}
    write_json(root / "meta_expressions.json", content)
    frames_in(root / "JPEGImages/race", names)
    for obj, key in ((1, "4"), (2, "17")):
        folder = root / f"Annotations/MeViS_race_{obj}"
        folder.mkdir(parents=True)
        for name, mask in zip(names, MEVIS_OBJECTS[key], strict=True):
            pixels = np.zeros((HEIGHT, WIDTH), np.uint8) if mask is None else mask.astype(np.uint8) * 255
            Image.fromarray(pixels).save(folder / f"{name}.png")
    return root


def reason_seg(root: Path) -> Path:
    """Polygons beside each image; one file in Windows' code page, a region to ignore, an annotators' mark."""
    for split in ("train", "val", "test"):
        frames_in(root / split, ["12_a", "9"])
        shapes = [
            {"label": "target", "points": [[4, 4], [20, 4], [20, 20], [4, 20]]},
            {"label": "target", "points": [[40.0, 10.0], [50.0, 10.0], [50.0, 18.0], [40.0, 18.0]]},
            {"label": "ignore", "points": [[60, 30], [70, 30], [70, 40], [60, 40]]},
            {"label": "flag", "points": [[0, 0]]},
        ]
        annotation = {"text": ["what keeps one warm?", "something of wool"], "is_sentence": True, "shapes": shapes}
        write_json(root / split / "12_a.json", annotation)
        content = json.dumps({**annotation, "text": ["the caf\u00e9\u2019s sign"]}, ensure_ascii=False)
        (root / split / "9.json").write_bytes(content.encode("cp1252"))
    return root


def many_videos(root: Path, count: int) -> Path:
    names = [f"{t:05d}" for t in range(4)]
    masks = {str(v): [rle(mask) for mask in moving(4, v % 40, 3)] for v in range(count)}
    expression = {"exp": "it", "obj_id": [0]}
    videos = {f"{v:04d}": {"expressions": {"0": {**expression, "anno_id": [v]}}, "frames": names} for v in range(count)}
    write_json(root / "train/meta_expressions.json", {"videos": videos})
    write_json(root / "train/mask_dict.json", masks)
    for v in range(count):
        frames_in(root / f"train/JPEGImages/{v:04d}", names, seed=v)
    return root
