"""The stage `data` over shards: messy folders, every reader, results that do not depend on who did what, resuming."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from llmctl import Artifact, InputError, TempFail
from llmctl.hookspecs import Reader
from llmctl.testing import run_stage
from llmctl.text.datasets import read_rows
from llmctl_data import DATA
from llmctl_data.readers import formats
from llmctl_data.records import record_to_text, text_to_record

PAGE = (
    "<html><head><title>Otters</title></head><body><nav><a href='/'>Home</a></nav><article><h1>Otters</h1>"
    "<p>Otters live along rivers and eat fish that they catch at night in cold water.</p>"
    "<p>They sleep in dens under the roots of old trees near the bank.</p></article></body></html>"
)
TEXT_ONLY = {
    "emit": [
        "text",
    ],
    "validation_share": 0.0,
}


def pdf(text: str) -> bytes:
    """A PDF of one page, as the specification (ISO 32000-1, 7.5) has it."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode() if text else b""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R"
        b" /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % len(out)
    return out + b"xref\n0 6\n0000000000 65535 f \n" + table + end


def run(root, out, params=None, **more):
    return run_stage(DATA, out, {**TEXT_ONLY, **(params or {})}, files=[Artifact(root, "files")], **more)


def texts(result, split="train"):
    return {row["id"]: row["text"] for row in read_rows(result.outputs["text"], split)}


def rejects(result):
    lines = (result.outputs["metrics"].path / "rejects.jsonl").read_text().splitlines()
    return {told["where"]: told["reason"] for told in map(json.loads, lines)}


def digest(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def messy(root: Path, line: int) -> Path:
    root.mkdir()
    (root / "page.html").write_text(PAGE)
    (root / "paper.pdf").write_bytes(pdf("A paper about herons"))
    (root / "scan.pdf").write_bytes(pdf(""))
    (root / "cut.pdf").write_bytes(pdf("A paper about herons")[:60])
    (root / "rows.jsonl").write_text('{"text": "one"}\n{"text": \n{"text": "three"}\n{"txt": "four"}\n')
    (root / "old.txt").write_bytes("fine\ncaf\u00e9\n".encode("latin-1"))
    (root / "wide.txt").write_bytes("sixteen \u00e9".encode("utf-16"))
    (root / "empty.txt").write_bytes(b"")
    (root / "photo.txt").write_bytes(b"\x89PNG\0\0\0")
    (root / "data.xyz").write_text("?")
    (root / "tool.py").write_text("def f():\n\treturn 1  \n")
    (root / "cut.txt.gz").write_bytes(gzip.compress(bytes(range(256)) * 99 + b"x")[:-9])
    (root / "cut.txt.zst").write_bytes(zstandard.compress(b"some words\n" * 9999)[:-9])
    (root / "cut.parquet").write_bytes(b"PAR1 and no more")
    (root / "ok.txt.bz2").write_bytes(bz2.compress(b"bzip2"))
    (root / "ok.txt.xz").write_bytes(lzma.compress(b"xz"))
    (root / "ok.txt.zst").write_bytes(zstandard.compress(b"zstd"))
    (root / "table.csv").write_text('text,n\n"a, b",1\nbroken\nc,2\n')
    (root / "again").symlink_to(root)
    (root / "self.txt").symlink_to("self.txt")
    with (root / "long.txt").open("wb") as file:
        for _ in range(line // 1000):
            file.write(b"x" * 1000)
        file.write(b"\nshort\n")
    return root


EXPECTED = {
    "scan.pdf": "PDF without text",
    "cut.pdf": "cut short or damaged",
    "rows.jsonl:2:10": "broken line",
    "rows.jsonl:4": "no text",
    "empty.txt": "empty file",
    "photo.txt": "binary file",
    "data.xyz": "unknown format .xyz",
    "cut.parquet row 1": "cut short or damaged",
    "table.csv:3": "broken row",
    "again": "link loop",
    "self.txt": "link loop",
    "long.txt:1": "line too long",
}


def check_messy(result) -> None:
    found = rejects(result)
    assert EXPECTED.items() <= found.items()
    packed = {where.partition(":")[0]: reason for where, reason in found.items() if where.startswith("cut.txt")}
    assert packed["cut.txt.zst"] == "cut short or damaged"
    assert "cut.txt.gz" in packed
    kept = texts(result)
    assert kept["old.txt#0"] == "fine\ncaf\u00e9"
    assert kept["wide.txt#0"] == "sixteen \u00e9"
    assert kept["tool.py"] == "def f():\n\treturn 1  \n"
    assert [kept[f"ok.txt.{end}#0"] for end in ("bz2", "xz", "zst")] == ["bzip2", "xz", "zstd"]
    assert kept["long.txt#0"] == "short"
    assert (kept["rows.jsonl#1"], kept["rows.jsonl#3"]) == ("one", "three")
    assert (kept["table.csv#2"], kept["table.csv#4"]) == ("a, b", "c")
    assert "herons" in kept["paper.pdf#0"]
    assert "dens under the roots" in kept["page.html"] and "Home" not in kept["page.html"]
    audit = json.loads((result.outputs["text"].path / "audit.json").read_text())
    assert audit["rejects"]["count"] == len(found) == result.metrics["rejects"]
    assert sum(audit["read"]["rejected"].values()) == len(found)
    assert audit["read"]["encodings"] == {"cp1252": 1, "utf-16-le": 1}
    assert audit["kept"]["documents"] == len(kept)
    warned = [fields["text"] for kind, fields in result.events if kind == "warning"]
    assert len(warned) == 1 and f"{len(found)} not read" in warned[0]
    card = (result.outputs["metrics"].path / "card.html").read_text()
    assert "rows.jsonl:2:10" in card and "<svg" in card and "<script" not in card


def test_a_messy_folder_is_processed_and_every_problem_is_named(tmp_path):
    check_messy(run(messy(tmp_path / "raw", 200_000), tmp_path / "out", {"max_document_bytes": 100_000}))


@pytest.mark.slow
def test_a_line_of_200_mb_is_named_and_never_held(tmp_path):
    root = messy(tmp_path / "raw", 200_000_000)
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom llmctl import Artifact\n"
        "from llmctl.testing import run_stage\nfrom llmctl_data import DATA\n"
        "files = [Artifact(Path(sys.argv[1]), 'files')]\n"
        "run_stage(DATA, Path(sys.argv[2]), {'emit': ['text']}, files=files)\n"
        # Not ru_maxrss of the program itself, which begins with that of the process that started it.
        "status = Path('/proc/self/status').read_text()\n"
        "print(status.split('VmHWM:')[1].split()[0], resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    words = [sys.executable, "-c", code, str(root), str(tmp_path / "out")]
    told = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, timeout=280).stdout.split()
    assert max(map(int, told)) < 400 << 10
    told = [json.loads(line)["where"] for line in (tmp_path / "out/metrics/rejects.jsonl").read_text().splitlines()]
    assert "long.txt:1" in told


def test_on_error_fail_ends_at_the_first_fault(tmp_path):
    root = tmp_path / "raw"
    root.mkdir()
    (root / "a.jsonl").write_text('{"text": "x"}\n{\n')
    with pytest.raises(InputError, match=r"a\.jsonl:2: no valid JSON"):
        run(root, tmp_path / "out", {"on_error": "fail"})


# --- the same whoever did it ---


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A file that is cut into several tasks, with repeated texts and a broken line, and one of row groups."""
    root = tmp_path_factory.mktemp("big")
    lines = [json.dumps({"text": f"Document {n % 1500} " + "word " * (n % 1500 % 40)}) for n in range(2000)]
    lines[777] = "{"
    (root / "a.jsonl").write_text("\n".join(lines) + "\n")
    table = pyarrow.Table.from_pylist([{"text": f"row {n}"} for n in range(50)])
    parquet.write_table(table, root / "b.parquet", row_group_size=10)
    return root


STEPS = [{"name": "length", "min_chars": 16}, {"name": "exact-duplicates"}, {"name": "length", "max_chars": 200}]
CUT = {"task_bytes": 1 << 16, "steps": STEPS, "validation_share": 0.2}


def test_the_result_does_not_depend_on_the_number_of_workers(big, tmp_path):
    one, three = (run(big, tmp_path / str(n), {**CUT, "workers": n}) for n in (1, 3))
    assert (tmp_path / "1/.resume/shards/read-0/000001").is_dir()
    for port in ("text", "metrics"):
        assert digest(one.outputs[port].path) == digest(three.outputs[port].path)
    kept = [row["text"] for split in ("train", "validation") for row in read_rows(one.outputs["text"], split)]
    given = [json.loads(line)["text"] for n, line in enumerate((big / "a.jsonl").read_text().splitlines()) if n != 777]
    assert sorted(kept) == sorted({text for text in given if 16 <= len(text.strip()) <= 200})
    assert rejects(one) == {"a.jsonl:778:2": "broken line"}
    audit = json.loads((one.outputs["text"].path / "audit.json").read_text())
    first, second, third = audit["steps"]
    assert first["documents_in"] == 1999 + 50
    assert first["documents_out"] == second["documents_in"]
    assert second["documents_out"] == third["documents_in"]
    assert third["documents_out"] == audit["kept"]["documents"] == len(kept)
    assert second["dropped"] == {"exact duplicate": second["facts"]["duplicates"]}
    assert len(second["samples"]["dropped: exact duplicate"]) == 5
    assert (
        audit["sources"][0]["listed"][0]["digest"]
        == f"sha256:{hashlib.sha256((big / 'a.jsonl').read_bytes()).hexdigest()}"
    )


def test_a_run_that_was_stopped_goes_on_and_gives_the_same(big, tmp_path):
    whole = run(big, tmp_path / "whole", {**CUT, "workers": 1})
    with pytest.raises(TempFail):
        run(big, tmp_path / "parts", {**CUT, "workers": 1}, stop_after=3)
    done = sorted((tmp_path / "parts/.resume/shards/read-0").iterdir())
    assert len(done) == 2
    before = [path.stat().st_ino for path in done]
    rest = run(big, tmp_path / "parts", {**CUT, "workers": 2})
    assert [path.stat().st_ino for path in done] == before
    assert digest(rest.outputs["text"].path) == digest(whole.outputs["text"].path)


def test_the_terminal_shows_what_each_step_did(big, tmp_path):
    told = [fields["text"] for kind, fields in run(big, tmp_path, {**CUT, "workers": 1}).events if kind == "log"]
    words = [line.split() for line in told]
    table = words[[line[0] for line in words].index("read") :][:5]
    assert [row[0] for row in table] == ["read", "length", "exact-duplicates", "length", "kept"]
    counts = [int(row[1].replace(",", "")) for row in table]
    assert counts[0] == 2049 and sum(counts[:-1]) == counts[-1]
    assert " ".join(table[2][2:]) == f"{-counts[2]} exact duplicate"


def test_a_task_is_a_command(big, tmp_path):
    with pytest.raises(TempFail):
        run(big, tmp_path, {**CUT, "workers": 1}, stop_after=1)
    work = tmp_path / ".resume/shards"
    subprocess.run([sys.executable, "-m", "llmctl_data.tasks", str(work), "read-0", "1"], check=True, timeout=60)
    told = json.loads((work / "read-0/000001/ledger.json").read_text())
    assert told["documents"] > 0


# --- sources ---


def test_sources_say_what_their_files_are(tmp_path):
    root = tmp_path / "raw"
    (root / "web").mkdir(parents=True)
    rows = [{"doc": {"body": [f"text {n}"]}, "key": f"k{n}"} for n in range(20)]
    (root / "web/a.dump").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "b.txt").write_text("plain")
    entry = {"path": "web/*", "name": "web", "format": "jsonl", "fields": {"text": "doc.body.0", "id": "key"}}
    entry |= {"license": "CC-BY-4.0", "language": "en", "limit": 10, "weight": 2.0}
    result = run(root, tmp_path / "out", {"sources": [entry]})
    found = list(read_rows(result.outputs["text"], "train"))
    web = [row for row in found if row["source"] != "b.txt"]
    assert sorted(row["id"] for row in web) == sorted(f"k{n}{end}" for n in range(10) for end in ("", "~2"))
    told = {"license": "CC-BY-4.0", "language": "en", "corpus": "web"}
    assert all(row["meta"] == told for row in web)
    audit = json.loads((result.outputs["text"].path / "audit.json").read_text())
    told = next(source for source in audit["sources"] if source["name"] == "web")
    assert (told["documents"], told["taken"], told["kept"], told["license"]) == (10, 20, 20, "CC-BY-4.0")
    with pytest.raises(InputError, match="matches none"):
        run(root, tmp_path / "none", {"sources": [{"path": "nothing/*"}]})


def test_files_behind_a_url(tmp_path):
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe("/corpus/x/a.jsonl", b'{"text": "far"}\n')
    files.pipe("/corpus/x/b.txt.gz", gzip.compress(b"away"))
    try:
        result = run_stage(DATA, tmp_path, {**TEXT_ONLY, "sources": [{"path": "memory://corpus/**", "name": "far"}]})
    finally:
        files.rm("/corpus", recursive=True)
    assert sorted(texts(result).values()) == ["away", "far"]


def read_pairs(path):
    for line in path.read_text().splitlines():
        if line == "!":
            raise ValueError("no pair")
        yield {"text": line}


def test_hook_register_readers(tmp_path, monkeypatch):
    reader = Reader(name="pairs", endings=(".pairs",), read=f"{__name__}:read_pairs")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    from llmctl.registry import get_registry

    class Plugin:
        from llmctl import hookimpl

        @hookimpl
        def register_readers(self):
            return [reader]

    plugin = Plugin()
    get_registry().manager.register(plugin)
    formats.readers.cache_clear()
    try:
        (tmp_path / "raw").mkdir()
        (tmp_path / "raw/a.pairs").write_text("one\ntwo\n!\n")
        result = run(tmp_path / "raw", tmp_path / "out", {"workers": 1})
    finally:
        get_registry().manager.unregister(plugin)
        formats.readers.cache_clear()
    assert texts(result) == {"a.pairs#1": "one", "a.pairs#2": "two"}
    assert rejects(result) == {"a.pairs row 3": "broken file"}


def test_records_become_text_and_come_back():
    from decimal import Decimal

    record = {
        "name": "Ann",
        "n": 1,
        "x": 1.5,
        "s": "12",
        "t": True,
        "u": None,
        "l": [1, "a"],
        "m": "two\nlines",
        "a: b": "",
    }
    back = text_to_record(record_to_text(record))
    assert back == record and list(back) == list(record)
    assert [type(value) for value in back.values()] == [type(value) for value in record.values()]
    digits = text_to_record("price: 1.100000000000000000001\n")["price"]
    assert digits == Decimal("1.100000000000000000001")
    with pytest.raises(ValueError, match="line 2"):
        text_to_record("a: 1\nb\n")
