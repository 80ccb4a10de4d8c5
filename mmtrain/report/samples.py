"""Samples on a page: their pictures, small, in columns of cards."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from io import BytesIO

from PIL import Image

from mmtrain.report.html import section

_THUMBNAIL_PIXELS = 320
_JPEG_QUALITY = 85
_STYLE = """<style>
main { max-width: 80rem; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: 1rem; }
.sheet section { margin: 0; } dl { margin: 0; }
.shown { display: flex; flex-wrap: wrap; gap: .6rem; margin-bottom: .8rem; }
.shown figure { margin: 0; } figcaption, .count { color: #6b6963; font-size: .8rem; }
dt { color: #6b6963; font-size: .8rem; margin-top: .5rem; }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
dd.target, dd.right { color: #0b6e99; font-weight: 600; } dd.wrong { color: #a33b20; }
</style>"""


def sheet(cards: Sequence[str]) -> str:
    """Cards in columns."""
    return f'{_STYLE}<div class="sheet">{"".join(cards)}</div>'


def card(
    title: str,
    images: Sequence[Image.Image],
    texts: Sequence[tuple[str, str, str]],
    remark: str = "",
) -> str:
    """One sample: pictures, then (what it is, the text, its class or none), then a remark."""
    lines = "".join(
        f"<dt>{escape(name)}</dt><dd{_class(kind)}>{escape(text)}</dd>"
        for name, text, kind in texts
    )
    told = f'<div class="count">{escape(remark)}</div>' if remark else ""
    shown = "".join(map(_figure, images))
    return section(title, f'<div class="shown">{shown}</div><dl>{lines}</dl>{told}')


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _figure(image: Image.Image) -> str:
    size = f"{image.width} x {image.height}"
    image.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
    file = BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    caption = f"<figcaption>{size}</figcaption>"
    return f'<figure><img alt="picture" src="data:image/jpeg;base64,{data}">{caption}</figure>'
