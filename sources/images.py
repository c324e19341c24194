"""Images inside questions: <image> marks each one's place; embedded ones become files beside the rows."""

import os
import re
from pathlib import Path

from sources.files import on_disk, relative_to_file
from sources.shapes import RowFault

MARK = re.compile(r"<image(?:[ _]?(\d+))?>")
SIGNATURES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}


def place_images(question, images):
    """(question with <image> for each, the images in order, notes) of a text with <image 1> or <image>.

    images: {number: a file's path or {"bytes", "path"}}. One that the text does not mention comes before it.
    A text that mentions images where there are none stays as it is, and a note says so. Raises RowFault where
    some are missing."""
    images = {number: image for number, image in images.items() if image}
    marks = [int(mark or place) for place, mark in enumerate(MARK.findall(question), 1)]
    if not images:
        return question, [], [("the question's image is not in the file", "")] if marks else []
    if not marks:
        return "<image>\n" * len(images) + question, [images[number] for number in sorted(images)], []
    if lacking := [number for number in marks if number not in images]:
        raise RowFault("an image of the question is missing", f"<image {lacking[0]}>")
    return MARK.sub("<image>", question), [images[number] for number in marks], []


def save_image(image, annotations, out, name):
    """The path of an image as rows of `out` have it: of a file beside the annotations, or of its bytes, which
    are written beside `out`. Raises RowFault."""
    if isinstance(image, str):
        image = {"path": image}
    content = image.get("bytes")
    if not content:
        file = on_disk(Path(annotations).parent / str(image.get("path")))
        if not os.path.isfile(file):
            raise RowFault("an image of the question is missing", str(file)[:200])
        return relative_to_file(file, out)
    suffix = next((kind for start, kind in SIGNATURES.items() if content.startswith(start)), None)
    if suffix is None:
        raise RowFault("an image of the question cannot be read", "neither PNG, JPEG, GIF, WebP nor BMP")
    file = Path(out).parent / f"{Path(out).stem}_images" / (re.sub(r"[^\w.-]", "_", name) + suffix)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    return relative_to_file(file, out)
