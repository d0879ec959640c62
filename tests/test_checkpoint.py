"""Files of arrays and settings: what goes in comes out, and anything else is refused."""

import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import save, save_file
from tolerance import assert_same_bits

from gpurnn import checkpoint
from gpurnn.checkpoint import FORMAT_VERSION, CheckpointError, Contents

DTYPES = [
    *(np.float16, np.float32, np.float64, np.bool_),
    *(np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
]
ARRAYS = {
    "W": np.array([[1.5, -0.0, np.inf], [3e-41, np.nan, 2.0]], np.float32),
    "updates": np.array([7], np.int64),
}
DOCUMENT = {"name": 'a "quoted" é\\ \N{SNOWMAN}', "lr": 0.1, "none": None, "list": [1, {"x": True}]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A name for a file that is not there yet."""
    return tmp_path / "a-file.safetensors"


@pytest.fixture
def written(path: Path) -> Path:
    """A small model file."""
    checkpoint.write(path, Contents("model", ARRAYS, DOCUMENT))
    return path


def assert_same_contents(found: Contents, expected: Contents) -> None:
    assert found.kind == expected.kind
    assert found.document == expected.document
    assert found.arrays.keys() == expected.arrays.keys()
    for name, a in expected.arrays.items():
        assert_same_bits(name, found.arrays[name], a)


def refused(path: Path, kind: str = "model") -> str:
    """Require that reading is refused by a message that begins with the path; return the rest."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(path, kind)
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    return message.removeprefix(f"{path} ")


def crafted(header: bytes | object, data: bytes = b"") -> bytes:
    """Return a file with any header, in safetensors' layout: length, header, data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def digest_of(kind: str, arrays: dict[str, Any], document: str) -> str:
    """Return the digest as the format defines it, written down a second time."""
    digest = hashlib.sha256(f"{kind}\n1\n{document}\n".encode())
    for name, a in sorted(arrays.items()):
        digest.update(f"{name} {a.dtype.str} {a.shape}\n".encode() + a.tobytes())
    return digest.hexdigest()


# What goes in comes out


@given(
    arrays=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        st.sampled_from(DTYPES).flatmap(
            lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=4))
        ),
        max_size=4,
    ),
    document=st.dictionaries(
        st.text(max_size=5),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
            ),
            max_leaves=6,
        ),
        max_size=3,
    ),
)
@example(arrays={"a": np.array(3.5, np.float32)}, document={})
@example(arrays={}, document={"state": 2**128 - 1, "loss": 1e-320})
def test_round_trip(
    arrays: dict[str, Any], document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.safetensors"
    contents = Contents("training", arrays, document)
    checkpoint.write(path, contents)
    assert_same_contents(checkpoint.read(path, "training"), contents)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (2, 3), (1, 2, 1, 3)])
def test_round_trip_of_every_dtype_and_shape(
    dtype: type, shape: tuple[int, ...], path: Path
) -> None:
    size = int(np.prod(shape))
    a = np.arange(size).reshape(shape).astype(dtype)
    checkpoint.write(path, Contents("model", {"a": a}, {}))
    assert_same_bits("a", checkpoint.read(path, "model").arrays["a"], a)


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a.T,
        lambda a: a[::2, ::-1],
        lambda a: a[:, 1],
        lambda a: np.broadcast_to(a[0], a.shape),
        np.asfortranarray,
    ],
    ids=["transposed", "strided", "column", "broadcast", "fortran"],
)
def test_round_trip_of_an_array_that_is_not_contiguous(
    view: Callable[[Any], Any], path: Path
) -> None:
    a = view(np.arange(12.0).reshape(4, 3))
    checkpoint.write(path, Contents("model", {"a": a}, {}))
    assert_same_bits("a", checkpoint.read(path, "model").arrays["a"], np.ascontiguousarray(a))


def test_round_trip_of_the_other_byte_order(path: Path) -> None:
    numbers = np.array([1.5, -2.0, 3.25])
    checkpoint.write(path, Contents("model", {"a": numbers.astype(">f8")}, {}))
    np.testing.assert_array_equal(checkpoint.read(path, "model").arrays["a"], numbers)


def test_round_trip_keeps_nan_zero_signs_and_subnormals(written: Path) -> None:
    assert_same_contents(checkpoint.read(written, "model"), Contents("model", ARRAYS, DOCUMENT))


def test_equal_contents_give_equal_files(path: Path) -> None:
    files = set()
    for _ in range(20):  # an order that hangs on a hash's seed differs now and then
        checkpoint.write(path, Contents("model", ARRAYS, DOCUMENT))
        files.add(path.read_bytes())
    assert len(files) == 1


def test_order_of_names_does_not_matter(path: Path) -> None:
    def file(arrays: dict[str, Any], document: dict[str, Any]) -> bytes:
        checkpoint.write(path, Contents("model", arrays, document))
        return path.read_bytes()

    backwards = dict(reversed(DOCUMENT.items()))
    assert file(ARRAYS, DOCUMENT) == file(dict(reversed(ARRAYS.items())), backwards)


def test_file_is_a_plain_safetensors_file(written: Path) -> None:
    with safe_open(written, "numpy") as f:
        metadata = json.loads(f.metadata()["gpurnn"])
        assert set(f.keys()) == set(ARRAYS)
        assert_same_bits("W", f.get_tensor("W"), ARRAYS["W"])
    assert metadata["format"] == "gpurnn-model"
    assert metadata["format_version"] == "1" == str(FORMAT_VERSION)
    assert json.loads(metadata["document"]) == DOCUMENT
    assert metadata["sha256"] == digest_of("model", ARRAYS, metadata["document"])


def test_what_cannot_be_written_leaves_the_old_file(written: Path) -> None:
    before = written.read_bytes()
    refused_contents = [
        ({"a": np.array(["text"])}, {}),
        ({"a": np.array([object()])}, {}),
        ({}, {"a": {1, 2}}),
        ({}, {"a": float("inf")}),
        ({}, {"a": float("nan")}),
    ]
    for arrays, document in refused_contents:
        with pytest.raises(Exception, match=r"dtype|serializable|JSON compliant"):
            checkpoint.write(written, Contents("model", arrays, document))
    assert written.read_bytes() == before
    assert [p.name for p in written.parent.iterdir()] == [written.name]


# Not there, not whole


MISSING = "does not exist: expected a file that gpurnn wrote"


def test_missing(path: Path) -> None:
    assert refused(path) == MISSING
    assert refused(path / "below") == MISSING


def test_folder(tmp_path: Path) -> None:
    assert refused(tmp_path) == "is a folder: expected a file that gpurnn wrote"


def test_empty_file(path: Path) -> None:
    path.touch()
    assert refused(path) == "is empty"


@pytest.mark.parametrize("arrays", [ARRAYS, {}], ids=["arrays", "no-arrays"])
def test_every_shorter_file_is_truncated(arrays: dict[str, Any], path: Path) -> None:
    checkpoint.write(path, Contents("model", arrays, DOCUMENT))
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    assert len(whole) - header == sum(a.nbytes for a in arrays.values())
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        reason = refused(path)
        assert reason.startswith("is truncated"), length
        if length < 9:
            assert reason == f"is truncated: it has {length} bytes"
        elif length < header:
            assert reason == "is truncated: it ends within its header"
        else:
            assert reason == f"is truncated: {length} bytes, its header tells {len(whole)}"
    path.write_bytes(whole)
    checkpoint.read(path, "model")


@pytest.mark.parametrize("more", [b"\0", b"\n", b"more"])
def test_longer_file_is_damaged(written: Path, more: bytes) -> None:
    whole = written.read_bytes()
    written.write_bytes(whole + more)
    expected = f"is damaged: {len(whole) + len(more)} bytes, its header tells {len(whole)}"
    assert refused(written) == expected


# Damaged and edited


@pytest.mark.parametrize("bits", [*(1 << b for b in range(8)), 0xFF])
def test_flipped_bits_anywhere_are_found(written: Path, bits: int) -> None:
    whole = written.read_bytes()
    expected = Contents("model", ARRAYS, DOCUMENT)
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= bits
        written.write_bytes(flipped)
        # No flip is immaterial: JSON spells a character in two ways only outside plain ASCII, and
        # of that there is none in the header.
        refused(written)
    written.write_bytes(whole)
    assert_same_contents(checkpoint.read(written, "model"), expected)


@pytest.mark.parametrize("value", [0x00, 0x20, 0xFF])
def test_overwritten_bytes_anywhere_are_found(written: Path, value: int) -> None:
    whole = written.read_bytes()
    expected = Contents("model", ARRAYS, DOCUMENT)
    for position in range(len(whole)):
        for length in (2, 16):
            damaged = bytearray(whole)
            damaged[position : position + length] = bytes([value] * length)
            damaged = damaged[: len(whole)]
            written.write_bytes(damaged)
            if damaged == whole:
                assert_same_contents(checkpoint.read(written, "model"), expected)
            else:
                refused(written)


def edit(
    path: Path,
    about: Callable[[dict[str, str]], dict[str, str]] = dict,
    arrays: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> None:
    """Do what a careful vandal would: write the file anew, digest and all as they were."""
    with safe_open(path, "numpy") as f:
        before = json.loads(f.metadata()["gpurnn"])
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    metadata = {"gpurnn": json.dumps(about(before), sort_keys=True)}
    path.write_bytes(save(arrays(tensors), metadata=metadata))


CHANGED = "has been changed since it was written: its contents do not match their digest"


def test_edit_that_changes_nothing_is_accepted(written: Path) -> None:
    before = written.read_bytes()
    edit(written)
    assert written.read_bytes() == before
    expected = Contents("model", ARRAYS, DOCUMENT)
    assert_same_contents(checkpoint.read(written, "model"), expected)


@pytest.mark.parametrize(
    "document",
    ["{}", '{"lr": 0.2}', "", "not JSON", '{"lr": 0.1,"list": [1, {"x": true}]}'],
)
def test_edited_document(written: Path, document: str) -> None:
    edit(written, about=lambda m: {**m, "document": document})
    assert refused(written) == CHANGED


def test_document_spelled_another_way(written: Path) -> None:
    edit(written, about=lambda m: {**m, "document": m["document"] + " "})
    assert refused(written) == CHANGED


@pytest.mark.parametrize(
    "sha256", ["", "0" * 64, lambda m: m["sha256"].upper(), lambda m: m["sha256"][:-1]]
)
def test_edited_digest(written: Path, sha256: str | Callable[[dict[str, str]], str]) -> None:
    edit(written, about=lambda m: {**m, "sha256": sha256(m) if callable(sha256) else sha256})
    assert refused(written) == CHANGED


@pytest.mark.parametrize("name", ["document", "sha256"])
def test_missing_metadata(written: Path, name: str) -> None:
    edit(written, about=lambda m: {k: v for k, v in m.items() if k != name})
    assert refused(written) == CHANGED


@pytest.mark.parametrize(
    "arrays",
    [
        lambda a: {**a, "W": a["W"] + 1},
        lambda a: {**a, "W": a["W"] * np.float32(-1)},
        lambda a: {**a, "W": a["W"].T.copy()},
        lambda a: {**a, "W": a["W"].reshape(-1)},
        lambda a: {**a, "W": a["W"].view(np.int32)},
        lambda a: {**a, "more": a["W"]},
        lambda a: {"W": a["W"]},
        lambda a: {"V": a["W"], "updates": a["updates"]},
        lambda a: {},
    ],
    ids=["values", "signs", "transposed", "flat", "dtype", "more", "fewer", "renamed", "none"],
)
def test_edited_arrays(written: Path, arrays: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    edit(written, arrays=arrays)
    assert refused(written) == CHANGED


def test_swapped_arrays(path: Path) -> None:
    one, two = np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)
    checkpoint.write(path, Contents("model", {"a": one, "b": two}, {}))
    edit(path, arrays=lambda a: {"a": a["b"], "b": a["a"]})
    assert refused(path) == CHANGED


def test_kind_edited_into_another(written: Path) -> None:
    edit(written, about=lambda m: {**m, "format": "gpurnn-training"})
    assert refused(written, "training") == CHANGED


@pytest.mark.parametrize("about", ["", "{", "null", "5", '"text"', "[1, 2]", '[["a"]]'])
def test_entry_that_gpurnn_did_not_write(path: Path, about: str) -> None:
    save_file(ARRAYS, path, metadata={"gpurnn": about})
    assert refused(path).startswith("is damaged: ")


@pytest.mark.parametrize("about", ["{}", "[]"])
def test_entry_that_says_nothing(path: Path, about: str) -> None:
    save_file(ARRAYS, path, metadata={"gpurnn": about})
    assert refused(path) == "has format version (none): this gpurnn reads 1"


# Another kind, another version, another program's


def test_model_where_training_is_expected_and_the_reverse(path: Path) -> None:
    checkpoint.write(path, Contents("model", ARRAYS, {}))
    assert refused(path, "training") == "is a model file, not a training file"
    checkpoint.write(path, Contents("training", ARRAYS, {}))
    assert refused(path, "model") == "is a training file, not a model file"


@pytest.mark.parametrize("version", ["2", "10", "0", "1.0", "1 ", "01"])
def test_another_format_version(written: Path, version: str) -> None:
    edit(written, about=lambda m: {**m, "format_version": version})
    assert refused(written) == f"has format version {version}: this gpurnn reads 1"


def test_no_format_version(written: Path) -> None:
    edit(written, about=lambda m: {k: v for k, v in m.items() if k != "format_version"})
    assert refused(written) == "has format version (none): this gpurnn reads 1"


def test_file_of_a_future_version_says_so_whatever_its_digest(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as later:
        later.setattr(checkpoint, "FORMAT_VERSION", 2)
        checkpoint.write(path, Contents("another-kind", ARRAYS, DOCUMENT))
        assert_same_contents(
            checkpoint.read(path, "another-kind"), Contents("another-kind", ARRAYS, DOCUMENT)
        )
    assert refused(path) == "has format version 2: this gpurnn reads 1"


@pytest.mark.parametrize("metadata", [None, {"made by": "hand"}, {"format": "pt"}])
@pytest.mark.parametrize("arrays", [ARRAYS, {}], ids=["arrays", "no-arrays"])
def test_foreign_safetensors_file(
    path: Path, metadata: dict[str, str] | None, arrays: dict[str, Any]
) -> None:
    save_file(arrays, path, metadata=metadata)
    assert refused(path) == "is a safetensors file, but gpurnn did not write it"


def png() -> bytes:
    """Return a picture of one grey pixel."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + check

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0\x80")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    )


@pytest.mark.parametrize(
    "data",
    [
        png(),
        b"A long enough text, which anyone could give by mistake.\n" * 10,
        bytes(1000),
        b"\xff" * 1000,
        b"PK\x03\x04" + bytes(100),
        b"\x80\x04\x95" + bytes(100),
        b'{"epoch": 1}\n',
    ],
    ids=["png", "text", "zeros", "ones", "zip", "pickle", "json-lines"],
)
def test_another_kind_of_file(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    assert refused(path) == f"is not a safetensors file ({len(data)} bytes)"


@given(data=st.binary(max_size=80) | st.binary(max_size=80).map(crafted))
def test_random_bytes(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "random.safetensors"
    path.write_bytes(data)
    refused(path)


@pytest.mark.parametrize("seed", range(20))
def test_long_random_bytes(path: Path, seed: int) -> None:
    path.write_bytes(np.random.default_rng(seed).bytes(50_000))
    refused(path)


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1, 9)
    | st.floats()
    | st.sampled_from(["", "1", "F32"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*TENSOR, "a", "__metadata__", "gpurnn", "format", "sha256"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), JSON, max_size=3)
    | st.fixed_dictionaries({k: JSON | st.just(v) for k, v in TENSOR.items()}).map(
        lambda tensor: {"a": tensor}
    )
    | JSON.map(lambda any_: {"__metadata__": {"gpurnn": any_}}),
    data=st.binary(max_size=8),
)
@example(header={"a": {**TENSOR, "data_offsets": [0, "4"]}}, data=b"1234")
@example(header={"a": {**TENSOR, "data_offsets": [0, None]}}, data=b"1234")
@example(header={"a": {**TENSOR, "data_offsets": [0, float("nan")]}}, data=b"1234")
@example(header={"a": {**TENSOR, "data_offsets": [0, -4]}}, data=b"")
@example(header={"a": TENSOR, "__metadata__": {"gpurnn": 5}}, data=b"1234")
@example(header={"__metadata__": {"gpurnn": ["gpurnn-model"]}}, data=b"")
@example(header={"__metadata__": {"gpurnn": '{"format": 5, "format_version": "1"}'}}, data=b"")
@example(header={"__metadata__": []}, data=b"")
@example(header={"__metadata__": None}, data=b"")
def test_headers_that_nobody_wrote(
    header: dict[str, Any], data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "header.safetensors"
    path.write_bytes(crafted(header, data))
    refused(path)


@pytest.mark.parametrize("header", [b'{"a":' * 100_000, b'{"a":' + b"[" * 100_000])
def test_header_nested_beyond_measure(path: Path, header: bytes) -> None:
    path.write_bytes(crafted(header))
    refused(path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [1, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 4]}}',
    ],
    ids=["shape", "dtype", "negative", "gap", "no-data"],
)
def test_header_that_does_not_fit_its_data(path: Path, header: bytes) -> None:
    about = json.dumps(json.dumps({"format": "gpurnn-model", "format_version": "1"})).encode()
    metadata = b'"__metadata__":{"gpurnn":' + about + b"},"
    path.write_bytes(crafted(header.replace(b"{", b"{" + metadata, 1), b"1234"))
    assert refused(path).startswith("is damaged: ")
