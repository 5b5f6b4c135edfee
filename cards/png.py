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
"""PNG files: only the chunks that a picture needs, so that nothing travels with it."""

import struct
import zlib
from collections.abc import Iterator

from hf_unlearn.cards.findings import Finding


SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"pHYs", b"IEND")
_FIX = "draw it again, or strip it with `strip_png`"
# Bits of a pixel by colour type, for each bit depth that the format allows.
_SAMPLES = {0: (1, (1, 2, 4, 8, 16)), 2: (3, (8, 16)), 3: (1, (1, 2, 4, 8)), 4: (2, (8, 16)), 6: (4, (8, 16))}
_MAX_PIXEL_BYTES = 1 << 28


def check_png(file: str, content: bytes) -> list[Finding]:
    """
    Whether a PNG holds a picture and nothing else: signature, checksums, only the chunks IHDR, PLTE, tRNS, IDAT, pHYs
    and IEND, exactly the pixels that its header announces, and nothing after its end.

    Args:
        file (`str`):
            What the findings call it: its path relative to the folder.
        content (`bytes`):
            The file.

    Returns:
        `list[Finding]`: Rule `png-format` for what is no PNG, `png-chunk` for a chunk that is not in the list,
        `png-trailing` for bytes after the end of the picture or of its pixels. Empty where there is nothing to object.

    Source: [PNG specification](https://www.w3.org/TR/png-3/).
    """
    findings = []
    pixels = zlib.decompressobj()
    names, header, written, trailing = [], b"", 0, False
    try:
        for name, data, end in _chunks(content):
            if name not in CHUNKS:
                findings.append(
                    Finding("png-chunk", file, f"it has a chunk that is not needed to show the picture: {_FIX}.")
                )
            if name == b"IEND":
                trailing |= end < len(content)
                if data:
                    findings.append(Finding("png-chunk", file, f"its end chunk is not empty: {_FIX}."))
            if name == b"IHDR":
                header = data
                expected = _pixel_bytes(data) if not names else None
                if expected is None:
                    raise ValueError("its header is not one")
            elif not names:
                raise ValueError("its header is not its first chunk")
            elif name == b"pHYs" and len(data) != 9 or name == b"PLTE" and (len(data) % 3 or len(data) > 768):
                raise ValueError("a chunk has the wrong length")
            elif name == b"tRNS" and len(data) > {0: 2, 2: 6, 3: 256}.get(header[9], 0):
                raise ValueError("a chunk has the wrong length")
            elif name == b"IDAT":
                if b"IDAT" in names and names[-1] != b"IDAT":
                    raise ValueError("its pixels are not in one run of chunks")
                # One byte more than announced is enough to know: a small file cannot unpack to a large one
                written += len(pixels.decompress(data, expected + 1 - written))
                trailing |= bool(pixels.unused_data) or written > expected
                if written > expected:
                    break
            if name in names and name in (b"PLTE", b"tRNS", b"pHYs"):
                raise ValueError("a chunk comes twice")
            names.append(name)
        else:
            if not pixels.eof or written < expected:
                raise ValueError("its pixels do not fill the picture")
    except (ValueError, zlib.error) as error:
        reason = error if isinstance(error, ValueError) else "its pixels do not unpack"
        return [*findings, Finding("png-format", file, f"it is no valid PNG, {reason}: draw it again.")]
    if trailing:
        findings.append(Finding("png-trailing", file, f"it holds bytes after the end of the picture: {_FIX}."))
    # One finding per rule says it all
    return list(dict.fromkeys(findings))


def strip_png(content: bytes) -> bytes:
    """
    Keep only what [`check_png`] allows: its six chunks, and nothing after the last. Pixels stay as they are.

    matplotlib writes a `tEXt` chunk with its name and version; `savefig(metadata={"Software": None})` leaves it out.

    Args:
        content (`bytes`):
            A PNG.

    Returns:
        `bytes`: The PNG without other chunks. Stripping it again changes nothing.

    Raises:
        `ValueError`: It is no PNG, or is damaged.
    """
    kept = [SIGNATURE]
    for name, data, _ in _chunks(content):
        if name in CHUNKS:
            kept.append(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))
    return b"".join(kept)


def _chunks(content: bytes) -> Iterator[tuple[bytes, bytes, int]]:
    """Name, data and end of each chunk up to IEND, lengths and checksums verified."""
    if not content.startswith(SIGNATURE):
        raise ValueError("it has not the signature of a PNG")
    position, name = len(SIGNATURE), b""
    while name != b"IEND":
        head = content[position : position + 8]
        if len(head) < 8:
            raise ValueError("it ends before its end chunk")
        length, name = struct.unpack(">I4s", head)
        end = position + 12 + length
        if end > len(content):
            raise ValueError("a chunk is longer than the file")
        data = content[position + 8 : end - 4]
        if struct.unpack(">I", content[end - 4 : end])[0] != zlib.crc32(name + data):
            raise ValueError("the checksum of a chunk is wrong")
        position = end
        yield name, data, end


def _pixel_bytes(header: bytes) -> int | None:
    """Bytes of the unpacked pixels, each row with its filter byte; `None` where the header is not valid."""
    if len(header) != 13:
        return None
    width, height, depth, colour, compression, filtering, interlaced = struct.unpack(">IIBBBBB", header)
    samples, depths = _SAMPLES.get(colour, (0, ()))
    # What we draw is never interlaced; whoever interlaces can draw it again
    if depth not in depths or not width or not height or compression or filtering or interlaced:
        return None
    count = height * (1 + (width * samples * depth + 7) // 8)
    return count if count <= _MAX_PIXEL_BYTES else None
