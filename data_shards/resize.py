"""Pictures made smaller before they are written, so that shards are small."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO

from PIL import Image

from mmtrain.data.codec import decode_image, image_size
from mmtrain.errors import DataError
from mmtrain.tasks.interface import ImageBytes, Sample

_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
_QUALITY = 95  # of formats that lose some


def resized(sample: Sample, side: int) -> Sample:
    """A sample whose images have a shortest side of at most `side` pixels; none is enlarged.

    What cannot be decoded stays as it is: whoever looks at the sample says why.
    """
    try:
        images = tuple(_smaller(image, side, sample.id) for image in sample.images)
    except DataError:
        return sample
    return replace(sample, images=images)


def _smaller(image: ImageBytes, side: int, sample_id: str) -> ImageBytes:
    width, height = image_size(image.data, sample_id)
    if min(width, height) <= side or image.extension not in _FORMATS:
        return image
    # Of the pixels that training would see: turned upright, without transparency.
    pixels = decode_image(image.data, sample_id)
    scale = side / min(pixels.size)
    size = (round(pixels.width * scale), round(pixels.height * scale))
    file = BytesIO()
    smaller = pixels.resize(size, Image.Resampling.LANCZOS)
    smaller.save(file, _FORMATS[image.extension], quality=_QUALITY)
    return ImageBytes(image.extension, file.getvalue())
