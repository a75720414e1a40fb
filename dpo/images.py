"""Pictures in rows: found in columns and in messages, kept as bytes or paths, opened for a model's processor."""

import base64
import hashlib
import io
import os
from pathlib import Path

from PIL import Image, ImageOps
from transformers.image_utils import load_image

KINDS = ("image", "image_url")  # of a message's part that is the place of a picture
HOLDERS = ("image", "image_url", "url", "path", "base64", "bytes")  # keys under which such a part may hold it


def lift_images(row: dict) -> dict:
    """A row whose pictures, whether they stood in its columns image and images or in its messages, are all in its
    column images, each {"bytes", "path"}, in the order of their places in the messages: parts {"type": "image"}.

    Raises: ValueError in words where places and pictures are not equally many, completions show other pictures than
    their prompt, or one is nothing that can be read.
    """
    given = row.get("images") if row.get("images") is not None else row.get("image")
    given = [as_stored(each) for each in (given if isinstance(given, list) else [given]) if each is not None]
    lifted, places = {key: value for key, value in row.items() if key not in ("image", "images")}, []
    for column in ("prompt", "chosen", "rejected", "completions"):
        if isinstance(row.get(column), list):
            are_several = any(isinstance(each, list) for each in row[column])
            seen = [(_lifted(each, shown := []), shown) for each in (row[column] if are_several else [row[column]])]
            lifted[column] = [each for each, _ in seen] if are_several else seen[0][0]
            for _, shown in seen:  # conversations that begin with their prompt show its pictures again
                places = places or shown
                if shown and shown != places:
                    raise ValueError(f"column {column!r} shows other pictures than the prompt: they belong to it")
    empty = places.count(None)
    if places and len(given) != empty and given != places:
        raise ValueError(f"the row has {len(given)} pictures for {empty} places in its messages")
    rest = iter(given)
    pictures = [next(rest) if place is None else place for place in places] if places else given
    return lifted | ({"images": pictures} if pictures else {})


def _lifted(value, shown: list):
    """Messages, in any depth of lists, whose pictures are taken out of their parts into shown: None where there was
    the place alone."""
    if isinstance(value, list):
        return [_lifted(each, shown) for each in value]
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("content"), list):
        return {**value, "content": [_lifted(part, shown) for part in value["content"]]}
    if value.get("type") not in KINDS:
        return value
    key = next((key for key in HOLDERS if value.get(key) is not None), None)
    held = f"data:,{value[key]}" if key == "base64" else value.get(key)
    held = held["url"] if isinstance(held, dict) and "url" in held else held
    if value.get("index") not in (None, shown.count(None)):
        raise ValueError(f"a picture's index is {value['index']}: number the places in their order, or leave it out")
    shown.append(held if held is None else as_stored(held))
    return {"type": "image"}


def as_stored(picture) -> dict:
    """A picture as {"bytes", "path"}, one of them None: of a PIL image, an array, encoded bytes, a path, a URL (data:
    and base64, too), or such an object. Pixels are kept exactly."""
    if isinstance(picture, dict) and picture.keys() <= {"bytes", "path"} and any(picture.values()):
        picture = picture.get("bytes") or picture["path"]
    if isinstance(picture, bytes | bytearray):
        return {"bytes": bytes(picture), "path": None}
    if isinstance(picture, str) and picture.startswith("data:"):
        return {"bytes": base64.b64decode(picture.partition(",")[2]), "path": None}
    if isinstance(picture, str) and picture.startswith(("http://", "https://")):
        try:
            picture = load_image(picture)
        except Exception as error:  # of the network, or of somebody's server
            raise ValueError(f"the picture {picture[:60]!r} cannot be read: {error}") from error
    if isinstance(picture, str | os.PathLike):
        path = Path(picture).expanduser()
        if not os.path.isfile(path):  # Path.is_file raises where a name is too long, as somebody's base64 is
            raise ValueError(f"there is no picture {str(picture)[:100]!r}: check the path")
        return {"bytes": None, "path": str(path.resolve())}
    if is_in_memory(picture):
        file = io.BytesIO()
        open_image(picture).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}
    raise ValueError(f"a picture is {type(picture).__name__}: give a PIL image, a path, or encoded bytes")


def is_in_memory(value) -> bool:
    """Whether a value is an image of PIL or an array of NumPy."""
    return isinstance(value, Image.Image) or (hasattr(value, "__array_interface__") and value.ndim > 1)


def without_objects(value):
    """A row, or what is in it, with text (a data: URL) in place of all that JSON has no form for: images in memory, and
    bytes."""
    if isinstance(value, dict):
        return {key: without_objects(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_objects(each) for each in value]
    if isinstance(value, bytes | bytearray) or is_in_memory(value):
        return "data:;base64," + base64.b64encode(as_stored(value)["bytes"]).decode()
    return str(value) if isinstance(value, os.PathLike) else value


def open_image(picture) -> Image.Image:
    """A picture, of PIL, NumPy or as `as_stored` gives it, in RGB, upright. Raises: ValueError if it cannot be read."""
    try:
        if isinstance(picture, dict):
            picture = Image.open(picture["path"] or io.BytesIO(picture["bytes"] or b""))
        picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        if picture.mode.startswith(("I", "F")):  # of more than 8 bits, all of which would be white
            raise ValueError(f"its mode is {picture.mode}: save it with 8 bits a channel")
        return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"a picture cannot be read: {error}") from error


def digest(picture: dict) -> int:
    """A few digits that tell a stored picture from others, of what is in its file."""
    content = picture["bytes"] or Path(picture["path"]).read_bytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], signed=True)
