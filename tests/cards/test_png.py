# Copyright 2026 The hf-unlearn authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
import io
import random
import struct
import zlib

import pytest

from hf_unlearn.cards.figures import draw_heat_map, draw_recovery_curves
from hf_unlearn.cards.png import check_png, strip_png


SECRET = b"Hsiao Yun-Hwa"


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def header(width=3, height=2, depth=8, colour=2, interlaced=0):
    return struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)


def png(*extra, pixels=b"\0" * 20, head=None, end=b""):
    """A picture of 3 x 2 pixels in RGB: two rows of a filter byte and nine samples."""
    parts = [chunk(b"IHDR", head or header()), *extra, chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + end


def rules(content):
    return [finding.rule for finding in check_png("figures/a.png", content)]


def test_a_picture_is_clean():
    pytest.importorskip("PIL")
    from PIL import Image

    assert rules(png(chunk(b"pHYs", b"\0" * 9))) == []
    assert Image.open(io.BytesIO(png())).getpixel((0, 0)) == (0, 0, 0)  # the test's own picture is one


@pytest.mark.parametrize(
    "content, rule",
    [
        (png(chunk(b"tEXt", b"Comment\0" + SECRET)), "png-chunk"),
        (png(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(SECRET))), "png-chunk"),
        (png(chunk(b"iTXt", b"Comment\0\0\0\0\0" + SECRET)), "png-chunk"),
        (png(chunk(b"eXIf", SECRET)), "png-chunk"),
        (png(chunk(b"prIv", SECRET)), "png-chunk"),
        (png(end=SECRET), "png-trailing"),
        (png(end=b"\0"), "png-trailing"),
        (png(pixels=b"\0" * 20 + SECRET), "png-trailing"),
        (png()[:-12] + chunk(b"IEND", SECRET), "png-chunk"),
        (png(chunk(b"pHYs", SECRET)), "png-format"),
        (png(chunk(b"pHYs", b"\0" * 9), chunk(b"pHYs", b"\1" * 9)), "png-format"),
        (png(chunk(b"tRNS", SECRET)), "png-format"),
        (png(chunk(b"PLTE", SECRET)), "png-format"),
        (png(pixels=b"\0" * 19), "png-format"),
        (png(head=header(interlaced=1)), "png-format"),
        (png(head=header(width=2**31 - 1, height=2**31 - 1)), "png-format"),
        (png(chunk(b"IHDR", header())), "png-format"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""), "png-format"),
        (png()[:-4], "png-format"),
        (b"GIF89a", "png-format"),
        (b"", "png-format"),
    ],
)
def test_whatever_travels_with_a_picture_is_found(content, rule):
    findings = check_png("figures/a.png", content)
    assert rule in [finding.rule for finding in findings]
    assert all(finding.file == "figures/a.png" and SECRET.decode() not in finding.message for finding in findings)


def test_bytes_behind_the_compressed_pixels_are_found():
    data = zlib.compress(b"\0" * 20) + SECRET
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header()) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    assert rules(content) == ["png-trailing"]
    # In a chunk of its own as well
    parts = [chunk(b"IHDR", header()), chunk(b"IDAT", data[:-13]), chunk(b"IDAT", SECRET), chunk(b"IEND", b"")]
    assert rules(b"\x89PNG\r\n\x1a\n" + b"".join(parts)) == ["png-trailing"]


def test_a_bomb_is_not_unpacked():
    import tracemalloc

    data = zlib.compress(b"\0" * 50_000_000)
    parts = [chunk(b"IDAT", data[:20]), chunk(b"IDAT", data[20:40]), chunk(b"IDAT", data[40:]), chunk(b"IEND", b"")]
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header()) + b"".join(parts)
    tracemalloc.start()
    assert rules(bomb) == ["png-trailing"]
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("draw", [draw_heat_map, draw_recovery_curves])
def test_what_matplotlib_draws_passes_once_it_is_stripped(report, tmp_path, draw):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    assert draw(report, tmp_path / "figure.png")
    drawn = (tmp_path / "figure.png").read_bytes()
    stripped = strip_png(drawn)
    assert rules(stripped) == []
    assert strip_png(stripped) == stripped
    before, after = (matplotlib_image.imread(io.BytesIO(content)) for content in (drawn, stripped))
    assert before.size > 1000 and (before == after).all()


def test_savefig_without_software_needs_no_stripping():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    figure.subplots().plot([1, 2])
    kept, left_out = io.BytesIO(), io.BytesIO()
    figure.savefig(kept, format="png")
    figure.savefig(left_out, format="png", metadata={"Software": None})
    assert rules(kept.getvalue()) == ["png-chunk"] and rules(left_out.getvalue()) == []


def test_stripping_takes_out_what_was_hidden():
    hidden = png(chunk(b"tEXt", SECRET), end=SECRET)
    assert strip_png(hidden) == png()
    with pytest.raises(ValueError, match="signature"):
        strip_png(b"text")


def test_a_thousand_damaged_pictures():
    generator = random.Random(0)
    original = png(chunk(b"pHYs", b"\0" * 9), chunk(b"tEXt", b"a\0b"))
    for _ in range(1000):
        content = bytearray(original)
        for _ in range(generator.randint(1, 5)):
            place = generator.randrange(len(content))
            content[place : place + generator.randint(0, 4)] = generator.randbytes(generator.randint(0, 4))
        assert check_png("a", bytes(content))  # the text chunk, if nothing else
        try:
            assert "png-chunk" not in rules(strip_png(bytes(content)))
        except ValueError as error:
            assert "\n" not in str(error)
