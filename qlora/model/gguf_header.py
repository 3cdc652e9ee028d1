"""A GGUF file's header, checked against the file's true size before any library reads it.

    magic, version, tensor count, entry count
    entries: key, type, value                              strings and arrays bear their own lengths
    tensors: name, dimensions, type, offset                of data that begins at the next multiple of the alignment

Readers take each of these lengths at its word, and allocate or loop by it. Here every length is looked at before it is
followed, so that time and memory follow the bytes that are there.

Source: GGUF specification, ggml/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from qlora.errors import ModelError

VERSIONS = (2, 3)
MOST_ENTRIES = 1 << 16  # metadata entries, and tensors; the largest models have some thousands
MOST_ELEMENTS = 1 << 22  # of all arrays; the largest tokenizers have 1.3 million. Readers make an object of each
MOST_DIMENSIONS = 4

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<B",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


def check_gguf(path: Path) -> dict[str, int | float]:
    """Read a GGUF file's header; returns its numbers by key, without those in arrays.

    Raises ModelError that names the file, the byte, and what is wrong there.
    """
    try:
        with path.open("rb") as f:
            size = f.seek(0, 2)
            if size < 24:
                raise ModelError(f"{path}: not a GGUF file: it has {size} bytes, its header alone takes 24")
            with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Header(path, content).check()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error


class _Header:
    """A header that is being read. at: the next byte."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.size, self.at = path, content, len(content), 0
        self.elements = 0

    def check(self) -> dict[str, int | float]:
        if self.content[:4] != b"GGUF":
            raise ModelError(f"{self.path}: not a GGUF file (it does not begin with the letters GGUF)")
        self.at = 4
        version = self.number("<I")
        if version not in VERSIONS:
            big = version & 0xFFFF == 0
            raise self.wrong("its bytes are in big-endian order" if big else f"version {version} is not one of 2 and 3")
        tensors = self.count(self.number("<Q"), 24, MOST_ENTRIES, "tensors")
        entries = self.count(self.number("<Q"), 13, MOST_ENTRIES, "metadata entries")
        numbers: dict[str, int | float] = {}
        keys: set[str] = set()
        for _ in range(entries):
            key = self.name("key", keys)
            kind = self.kind()
            value = self.value(kind)
            if key == "general.alignment" and kind is not GGUFValueType.UINT32:
                raise self.wrong("general.alignment is not a 32-bit number")
            if value is not None:
                numbers[key] = value
        alignment = int(numbers.get("general.alignment", GGUF_DEFAULT_ALIGNMENT))
        if alignment < 1 or alignment & (alignment - 1):
            raise self.wrong(f"general.alignment is {alignment}, not a power of two")
        self.tensors(tensors, alignment)
        return numbers

    def tensors(self, count: int, alignment: int) -> None:
        names: set[str] = set()
        places: list[tuple[int, int, str]] = []
        for _ in range(count):
            name = self.name("tensor name", names)
            dimensions = self.number("<I")
            if not 1 <= dimensions <= MOST_DIMENSIONS:
                raise self.wrong(f"{name} has {dimensions} dimensions")
            shape = [self.number("<Q") for _ in range(dimensions)]
            kind = self.number("<I")
            try:
                block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            except (ValueError, KeyError):
                raise self.wrong(f"{name} has the unknown type {kind}") from None
            if shape[0] % block or not all(shape):
                raise self.wrong(f"{name} has rows of {shape[0]}, its type comes in blocks of {block}")
            offset = self.number("<Q")
            if offset % alignment:
                raise self.wrong(f"{name} begins at {offset}, not at a multiple of {alignment}")
            places.append((offset, math.prod(shape) // block * nbytes, name))
        data = -(-self.at // alignment) * alignment
        end = 0
        for offset, nbytes, name in sorted(places):
            if data + offset + nbytes > self.size:
                raise ModelError(
                    f"{self.path}: truncated or damaged: {name} is said to end at byte {data + offset + nbytes:,}, "
                    f"the file has {self.size:,}"
                )
            if offset < end:
                raise ModelError(f"{self.path}: {name} overlaps another tensor, at byte {data + offset:,}")
            end = offset + nbytes

    def value(self, kind: GGUFValueType) -> int | float | None:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind is GGUFValueType.STRING:
            self.skip(self.number("<Q"), "a text")
            return None
        inner = self.kind()
        if inner is GGUFValueType.ARRAY:
            raise self.wrong("a list of lists, which no model has")
        width = 8 if inner is GGUFValueType.STRING else struct.calcsize(_SCALARS[inner])
        length = self.count(self.number("<Q"), width, MOST_ELEMENTS - self.elements, "values in lists")
        self.elements += length
        if inner is GGUFValueType.STRING:
            for _ in range(length):
                self.skip(self.number("<Q"), "a text")
        else:
            self.skip(length * width, "a list")
        return None

    def name(self, what: str, seen: set[str]) -> str:
        """A key or name, which is short, UTF-8, and not one of `seen`."""
        length = self.number("<Q")
        if length > 0xFFFF:
            raise self.wrong(f"a {what} of {length:,} bytes")
        self.skip(length, f"a {what}")
        try:
            text = self.content[self.at - length : self.at].decode()
        except UnicodeDecodeError:
            raise self.wrong(f"a {what} is not UTF-8") from None
        if text in seen:
            raise self.wrong(f"the {what} {text!r} is there twice")
        seen.add(text)
        return text

    def kind(self) -> GGUFValueType:
        number = self.number("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self.wrong(f"{number} is no type of value") from None

    def number(self, layout: str) -> Any:
        try:
            [number] = struct.unpack_from(layout, self.content, self.at)
        except struct.error:
            raise self.wrong("the header goes on") from None
        self.at += struct.calcsize(layout)
        return number

    def skip(self, nbytes: int, what: str) -> None:
        if nbytes > self.size - self.at:
            raise self.wrong(f"{what} of {nbytes:,} bytes, {self.size - self.at:,} are left")
        self.at += nbytes

    def count(self, number: int, least: int, most: int, what: str) -> int:
        """A count of things of at least `least` bytes each."""
        if number > most or number * least > self.size - self.at:
            raise self.wrong(f"{number:,} {what}, more than there can be")
        return number

    def wrong(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: truncated or damaged at byte {self.at:,} of {self.size:,}: {what}")
