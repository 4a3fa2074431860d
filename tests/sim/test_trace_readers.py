"""Traces from files: what is read, and what is said of files that cannot be."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from chiron_engine.policy.iteration.request import SloClass
from chiron_engine.sim.traces.checks import TraceError
from chiron_engine.sim.traces.load import load_trace
from chiron_engine.sim.traces.packaged import FOLDER, read_packaged, trace_names
from chiron_engine.sim.traces.prefix_blocks import PrefixBlocks

HEADER = "arrival_s,prompt_tokens,output_tokens\n"


def written(path: Path, text: str) -> str:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
def test_our_csv(tmp_path: Path, name: str) -> None:
    text = "\ufeffuser,output_tokens,arrival_s,prompt_tokens\r\na,5,0.25,7\r\n\r\nb,6,1.5,8\r\n"
    trace = load_trace(written(tmp_path / name, text))
    assert (trace.name, list(trace.arrival_s)) == ("t", [0.25, 1.5])
    assert (list(trace.prompt_tokens), list(trace.output_tokens)) == ([7, 8], [5, 6])
    assert trace.prefix_blocks is None


def test_one_file_can_hold_both_classes(tmp_path: Path) -> None:
    header = "arrival_s,prompt_tokens,output_tokens,slo_class\n"
    path = written(tmp_path / "t.csv", header + "0,1,9,batch\n1,2,9,interactive\n2,3,9,batch\n")
    assert list(load_trace(path, slo_class=SloClass.BATCH).prompt_tokens) == [1, 3]
    assert list(load_trace(path, slo_class=SloClass.INTERACTIVE).arrival_s) == [1.0]
    assert len(load_trace(path)) == 3
    with pytest.raises(TraceError, match="none of 1 rows has slo_class interactive"):
        load_trace(written(tmp_path / "b.csv", header + "0,1,9,batch\n"), slo_class=SloClass.INTERACTIVE)
    with pytest.raises(TraceError, match=r"1 of 2 rows has an unknown SLO class \(line 3: bulk\)"):
        load_trace(written(tmp_path / "u.csv", header + "0,1,9,batch\n0,1,9,bulk\n"))


def test_azure_csv_counts_from_its_first_row(tmp_path: Path) -> None:
    text = (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:16:46.9951690,396,109\n"
    )
    trace = load_trace(written(tmp_path / "azure.csv", text))
    assert list(trace.arrival_s) == pytest.approx([0.0, 60.314579])
    assert (list(trace.prompt_tokens), list(trace.output_tokens)) == ([374, 396], [44, 109])


def mooncake_lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def mooncake_row(milliseconds: float, prompt: int = 600, output: int = 5, ids: object = (1, 2)) -> dict:
    return {"timestamp": milliseconds, "input_length": prompt, "output_length": output, "hash_ids": ids}


def test_mooncake_lines_with_blocks(tmp_path: Path) -> None:
    rows = [mooncake_row(0, ids=[7, 9]), mooncake_row(1500, prompt=512, ids=[7])]
    trace = load_trace(written(tmp_path / "m.jsonl", mooncake_lines(*rows)))
    assert list(trace.arrival_s) == [0.0, 1.5]
    assert trace.prefix_blocks is not None and trace.prefix_block_tokens == 512
    assert [list(row) for row in trace.prefix_blocks] == [[0, 1], [0]]


def test_ticks_are_spread_by_the_seed(tmp_path: Path) -> None:
    rows = [mooncake_row(3000 * (i // 5), prompt=i + 1, ids=[i]) for i in range(50)]
    path = written(tmp_path / "m.jsonl", mooncake_lines(*rows))
    trace = load_trace(path, seed=1)
    assert list(trace.arrival_s) == sorted(set(trace.arrival_s))
    for arrival, prompt, ids in zip(
        trace.arrival_s, trace.prompt_tokens, trace.prefix_blocks or [], strict=True
    ):
        row = prompt - 1
        assert 3 * (row // 5) <= arrival < 3 * (row // 5) + 3
        assert list(ids) == [row]
    assert load_trace(path, seed=1).arrival_s == trace.arrival_s
    assert load_trace(path, seed=2).arrival_s != trace.arrival_s


def test_packaged_traces_are_what_was_published() -> None:
    assert trace_names() == ["arxiv-summarization", "azure-conv", "mooncake-conversation"]
    azure = load_trace("azure-conv")
    assert (len(azure), round(azure.span_s, 1)) == (19_366, 3501.7)
    assert round(sum(azure.prompt_tokens) / len(azure), 1) == 1154.7
    mooncake = read_packaged("mooncake-conversation")
    assert len(mooncake) == 12_031
    assert isinstance(mooncake.prefix_blocks, PrefixBlocks)
    assert (len(mooncake.prefix_blocks.ids), mooncake.prefix_blocks.num_ids) == (288_500, 182_790)


def test_lengths_are_laid_out_over_the_span() -> None:
    trace = load_trace("arxiv-summarization", seed=3, span_s=600.0)
    assert len(trace) == 28_257 and 590 < trace.span_s < 600
    assert (trace.prompt_tokens[0], trace.output_tokens[0]) == (3772, 54)
    assert trace.arrival_s != load_trace("arxiv-summarization", seed=4, span_s=600.0).arrival_s


def test_every_packaged_file_is_attributed() -> None:
    readme = (FOLDER / "README.md").read_text()
    assert all(path.name in readme for path in [*FOLDER.glob("*.gz"), *(FOLDER / "licences").iterdir()])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["the file is empty", "names the columns"]),
        (HEADER, ["0 rows", "at least one request"]),
        (
            "arrival_s,prompt\n1,2\n",
            ["prompt_tokens, output_tokens", "it has arrival_s, prompt", "TIMESTAMP"],
        ),
        ("TIMESTAMP,ContextTokens\nx,2\n", ["no column GeneratedTokens"]),
        (f'"{"x" * 200_000}",b\n1,2\n', ["the header is no valid CSV"]),
        ("prompt_tokens,output_tokens\n1,2\n", ["no column arrival_s", "lengths="]),
        ("arrival_s,prompt_tokens,output_tokens,prompt_tokens\n0,1,2,3\n", ["prompt_tokens is there more"]),
        (HEADER + "1,2,3\n0.5,2,3\n2,2,3\n", ["1 of 3 rows", "line 3: 0.5", "before that of the row above"]),
        (HEADER + "-1,2,3\n2,2,3\n", ["1 of 2 rows", "negative arrival", "line 2: -1.0"]),
        (HEADER + "nan,2,3\ninf,2,3\n", ["2 of 2 rows", "not finite", "line 2: nan, line 3: inf"]),
        (HEADER + "0,0,3\n1,5,0\n", ["zero-length prompt (line 2)", "zero-length output (line 3)"]),
        (HEADER + "0,-4,3\n1,2.5,1\n", ["2 of 2 rows", "no valid prompt length (line 2: -4.0, line 3: 2.5)"]),
        (HEADER + "0,99999999999,3\n", ["1 of 1 rows has", "2147483647"]),
        (HEADER + "0,4,many\n", ["no number in output_tokens", "line 2: many"]),
        (HEADER + "0,4\n1,2,3\n", ["1 of 2 rows", "too few cells (line 2)"]),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nsoon,2,3\n", ["no valid TIMESTAMP (line 2: soon)"]),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = written(tmp_path / "bad.csv", text)
    with pytest.raises(TraceError) as error:
        load_trace(path)
    assert str(error.value).startswith(path)
    for part in parts:
        assert part in str(error.value)


def test_all_problems_are_told_at_once_and_counted(tmp_path: Path) -> None:
    rows = "".join(f"{-i},0,1\n" for i in range(1, 3001))
    with pytest.raises(TraceError) as error:
        load_trace(written(tmp_path / "bad.csv", HEADER + rows))
    message = str(error.value)
    assert (
        "3,000 of 3,000 rows have a negative arrival (line 2: -1.0, line 3: -2.0, line 4: -3.0, ...)"
        in message
    )
    assert "2,999 of 3,000 rows have an arrival before" in message
    assert "3,000 of 3,000 rows have a zero-length prompt (line 2, line 3, line 4, ...)" in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["0 rows"]),
        ("{\n[1]\n", ["2 of 2 rows", "no JSON object", "timestamp, input_length, output_length"]),
        ('{"timestamp": 1}\n', ["no input_length", "line 1"]),
        (mooncake_lines(mooncake_row(0, prompt="x")), ["no number as input_length", "line 1: x"]),  # type: ignore[arg-type]
        (mooncake_lines(mooncake_row(0, ids=[1])), ["1 of 1 rows", "a wrong number of blocks (line 1: 1)"]),
        (mooncake_lines(mooncake_row(0, ids="12")), ["no valid hash_ids"]),
        (mooncake_lines(mooncake_row(-5)), ["negative arrival"]),
        (mooncake_lines(mooncake_row(0, output=0)), ["zero-length output"]),
        ('{"timestamp": 1e999, "input_length": 1, "output_length": 1}\n', ["not finite"]),
        (
            f'{{"timestamp": {"9" * 400}, "input_length": 1, "output_length": 1}}\n',
            ["no number as timestamp"],
        ),
    ],
)
def test_bad_mooncake_lines(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = written(tmp_path / "bad.jsonl", text)
    with pytest.raises(TraceError) as error:
        load_trace(path)
    assert all(part in str(error.value) for part in [path, *parts])


def test_damaged_files(tmp_path: Path) -> None:
    whole = gzip.compress((HEADER + "0,1,2\n" * 5000).encode())
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TraceError, match="damaged or cut short"):
        load_trace(str(cut))
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"\xff\xfe\x00arrival")
    with pytest.raises(TraceError, match="no UTF-8 text"):
        load_trace(str(binary))
    with pytest.raises(TraceError, match="No such file"):
        load_trace(str(tmp_path / "missing.csv"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(TraceError, match="directory"):
        load_trace(str(tmp_path / "folder.csv"))


def test_an_unknown_name_lists_what_exists() -> None:
    with pytest.raises(TraceError) as error:
        load_trace("sharegpt")
    assert all(name in str(error.value) for name in [*trace_names(), ".csv.gz", ".jsonl", "poisson:"])


def test_rows_of_blocks_can_be_taken_and_copied() -> None:
    blocks = PrefixBlocks.of([[70, 80], [], [70, 90, 95]])
    assert [list(row) for row in blocks] == [[0, 1], [], [0, 2, 3]]
    assert [list(row) for row in blocks[::-1]] == [[0, 2, 3], [], [0, 1]]
    assert [list(row) for row in blocks.copies(2)][3:] == [[4, 5], [], [4, 6, 7]]
    with pytest.raises(IndexError):
        blocks[3]
