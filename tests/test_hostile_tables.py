"""Whatever stands in a file of records, it is read, or refused in one line that names the file.

`pytest --hypothesis-profile=thorough` tries ten thousand of each.
"""

import io
import json
from functools import partial

import pandas as pd
import pyarrow as pa
from hostile import read_within_bounds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from gpt.text.records import RawFile, documents_in, instructions_in, messages_in

SECONDS = 2
"""What reading a file of some hundred bytes may hold at most."""

assert pd.__version__  # imported by now: that takes its time, and memory
READ = {
    "documents": lambda path, file: list(documents_in(path, file)),
    "messages": messages_in,
    "instructions": instructions_in,
}
hostile = settings(
    deadline=SECONDS * 1000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def check(folder, content, format, kinds):
    """Read `content` as each of `kinds`."""
    path = folder / "hostile"
    path.write_bytes(content)
    for kind in kinds:
        file = RawFile(
            name="x", file="hostile", kind=kind, format=format, bytes=len(content), sha256=""
        )
        read_within_bounds(partial(READ[kind], path, file), str(path))


@st.composite
def damaged(draw, whole):
    """Bytes, some of which are removed, repeated or replaced."""
    content = bytearray(draw(whole))
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(content)))
        stop = draw(st.integers(start, min(len(content), start + 40)))
        content[start:stop] = draw(
            st.one_of(
                st.binary(max_size=8),
                st.sampled_from(
                    [b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"\r\n", b"[" * 999]
                ),
                st.just(bytes(content[start:stop]) * 3),
            )
        )
    return bytes(content)


# --- JSON -----------------------------------------------------------------------------------------

NAMES = st.sampled_from(["text", "label", "instruction", "input", "output", "messages", "role"])
SPELLED = st.one_of(
    st.sampled_from(["1e999", "NaN", "-Infinity", "7" * 5000, "[" * 5000, '"\\ud800"', "-0", "01"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
        max_leaves=6,
    ).map(json.dumps),
)
OBJECTS = st.one_of(
    st.lists(st.tuples(NAMES.map(json.dumps), SPELLED), max_size=5).map(
        lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
    ),
    st.fixed_dictionaries(
        {name: st.text(min_size=1) for name in ("text", "label", "instruction", "input", "output")}
    ).map(json.dumps),
    SPELLED,
)
RECORDS = st.lists(OBJECTS, max_size=4)


@hostile
@given(content=damaged(RECORDS.map(lambda each: "\n".join(each).encode("utf-8", "surrogatepass"))))
def test_json_lines(tmp_path, content):
    check(tmp_path, content, "jsonl", READ)


@hostile
@given(
    content=damaged(
        RECORDS.map(lambda each: f"[{', '.join(each)}]".encode("utf-8", "surrogatepass"))
    )
)
def test_json_lists(tmp_path, content):
    check(tmp_path, content, "json", ["messages", "instructions"])


# --- CSV ------------------------------------------------------------------------------------------

CELLS = st.one_of(
    st.text(max_size=20).map(lambda text: '"' + text.replace('"', '""') + '"'),
    st.text("ab \t;'\"\r\0é", max_size=8),
    st.sampled_from(["", "text", "label", "x" * 200_000]),
)
ROWS = st.lists(st.lists(CELLS, max_size=4).map(",".join), max_size=6)


@hostile
@given(
    content=damaged(
        st.builds(
            lambda header, rows, end: end.join([header, *rows]).encode("utf-8", "surrogatepass"),
            st.sampled_from(["label,text", "text", "text,label,text", "label;text", ""]),
            ROWS,
            st.sampled_from(["\n", "\r\n", "\r"]),
        )
    )
)
def test_csv(tmp_path, content):
    check(tmp_path, content, "csv", ["documents", "messages"])


# --- parquet --------------------------------------------------------------------------------------

TYPES = [
    *(pa.string(), pa.large_string(), pa.binary(), pa.int64(), pa.float16(), pa.bool_(), pa.null()),
    *(pa.date32(), pa.date64(), pa.timestamp("ns"), pa.timestamp("s", "No/Where"), pa.time64("ns")),
    *(pa.decimal128(38, 9), pa.duration("us"), pa.uuid(), pa.list_(pa.string())),
    *(pa.dictionary(pa.int32(), pa.string()), pa.map_(pa.string(), pa.date32())),
    pa.struct([pa.field("role", pa.string()), pa.field("content", pa.timestamp("us"))]),
]


@st.composite
def columns(draw, n):
    """Of any type, out of bytes as they come."""
    kind = draw(st.sampled_from(TYPES))
    if pa.types.is_string(kind):
        return pa.array(draw(st.lists(st.none() | st.text(max_size=9), min_size=n, max_size=n)))
    width = {pa.types.is_date32: pa.int32(), pa.types.is_date64: pa.int64()}
    wide = next((of for fits, of in width.items() if fits(kind)), None)
    if wide is None and (pa.types.is_timestamp(kind) or pa.types.is_duration(kind)):
        wide = pa.int64()
    if wide is not None:
        top = 2 ** (wide.bit_width - 1) - 1
        numbers = st.integers(-top, top)
        return pa.array(draw(st.lists(numbers, min_size=n, max_size=n)), wide).cast(
            kind, safe=False
        )
    return pa.nulls(n, kind)


@st.composite
def tables(draw):
    """A parquet file."""
    n = draw(st.integers(0, 70))
    names = draw(st.lists(NAMES, min_size=1, max_size=4))
    table = pa.Table.from_arrays([draw(columns(n)) for _ in names], names=names)
    file = io.BytesIO()
    try:
        parquet.write_table(table, file, compression=draw(st.sampled_from(["none", "snappy"])))
    except pa.ArrowException:  # no parquet has such a column
        parquet.write_table(pa.table({"text": ["a"]}), file)
    return file.getvalue()


@hostile
@given(content=damaged(tables()))
def test_parquet(tmp_path, content):
    check(tmp_path, content, "parquet", READ)
