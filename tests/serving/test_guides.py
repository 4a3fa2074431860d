"""Outputs that follow a guide: of a tiny model whose tokens are bytes, and an engine that compiles guides."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from chiron_engine import LLM, SamplingParams
from chiron_engine.model.cpu_kernels import kernels_for
from chiron_engine.model.kernel_choice import Kernels
from chiron_engine.policy.iteration.request import Request
from chiron_engine.policy.iteration.sampling_params import Guide
from chiron_engine.runtime.guides import GuideCompiler, GuideTable, forbid, forbidden_tokens
from tests.cli.tiny_llama import write_tiny_llama
from tests.gateway.tiny_model import END

WORDS = [f"{shade}{colour}" for colour in ("red", "green", "blue") for shade in ("", "light ", "dark ")]
COLOURS = "(light |dark )?(red|green|blue)"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "colour": {"enum": ["red", "blue"]},
    },
    "required": ["name", "age", "colour"],
    "additionalProperties": False,
}
SUMS = 'start: term ("+" term){1,3}\nterm: /[0-9]{1,2}/ | "(" start ")"'


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("guided") / "model")


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    """Blocks for a few requests, so that some are evicted and come back."""
    with LLM(
        str(model),
        dtype="float32",
        max_num_seqs=8,
        max_model_len=256,
        kv_cache_memory=160 << 10,
        swap_space=0,
    ) as llm:
        for _ in range(20):  # outputs are predicted far too short
            llm._core.scheduler.output_lengths.observe(1)
        yield llm


def is_person(text: str) -> bool:
    person = json.loads(text)
    return (
        set(person) == {"name", "age", "colour"}
        and len(person["name"]) <= 8
        and 0 <= person["age"] <= 150
        and person["colour"] in ("red", "blue")
    )


def test_outputs_are_of_their_form_whoever_is_beside_them(llm: LLM) -> None:
    kinds = [
        SamplingParams(seed=1, max_tokens=200, regex=COLOURS),
        SamplingParams(seed=2, max_tokens=200, json_schema=json.dumps(SCHEMA), temperature=0.7, top_p=0.9),
        SamplingParams(seed=3, max_tokens=200, grammar=SUMS, min_p=0.01),
        SamplingParams(seed=4, max_tokens=60, ignore_eos=True, repetition_penalty=1.2),
    ]
    asked = [kinds[number % 4] for number in range(32)]
    prompts = [[(7 * number) % 250 + 1] * (number % 9 + 1) for number in range(32)]
    outputs = llm.generate(prompts, asked)
    assert any(output.timing.preemptions for output in outputs)
    for output, params in zip(outputs, asked, strict=True):
        if params.regex is not None:
            assert output.text in WORDS
        elif params.json_schema is not None:
            assert is_person(output.text)
        elif params.grammar is not None:
            assert re.fullmatch(r"[0-9+()]+", output.text)
            assert isinstance(eval_sum(output.text), int)
        if params.guide is not None:
            assert output.finish_reason == "stop"
            assert output.token_ids[-1] == END


def eval_sum(text: str) -> int:
    """Of digits, plus signs and parentheses; raises where that is no sum."""
    total, place = parse_sum(text, 0)
    assert place == len(text)
    return total


def parse_sum(text: str, place: int) -> tuple[int, int]:
    total = terms = 0
    while True:
        if text[place] == "(":
            value, place = parse_sum(text, place + 1)
            assert text[place] == ")"
            place += 1
        else:
            digits = re.compile(r"[0-9]{1,2}").match(text, place)
            assert digits is not None
            value, place = int(digits.group()), digits.end()
        total, terms = total + value, terms + 1
        if place == len(text) or text[place] != "+":
            assert 2 <= terms <= 4
            return total, place
        place += 1


def test_greedy_takes_the_best_of_what_may_come_next(llm: LLM) -> None:
    """Of a language that can be listed; what is best among some tokens, a large bias on them tells."""
    prompt = [12, 200, 45]
    (output,) = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=40, regex=COLOURS))
    text = ""
    for token in output.token_ids:
        following = {word[len(text)].encode()[0] for word in WORDS if word.startswith(text) and word != text}
        allowed = following | ({END} if text in WORDS else set())
        bias = SamplingParams(temperature=0.0, max_tokens=1, logit_bias=dict.fromkeys(allowed, 100.0))
        (one,) = llm.generate([*prompt, *text.encode()], bias)
        assert [token] == one.token_ids
        text += chr(token) if token != END else ""
    assert output.text == text and text in WORDS


def test_what_came_from_other_engines_counts(model: Path) -> None:
    compiler = GuideCompiler(model, END + 1, [END])
    compiled = compiler.compile(Guide("regex", COLOURS))
    assert compiler.compile(Guide("regex", COLOURS)) is compiled
    table = GuideTable(END + 1, torch.device("cpu"))
    tokens = np.frombuffer(b"prompt: dark g", np.uint8).astype(np.int64)
    params = SamplingParams(regex=COLOURS)
    table.set(2, Request(1, tokens.tolist(), params, 30, guide=compiled, num_prior_outputs=6), tokens)
    rows = table.rows(np.array([0, 2]), 0)
    assert rows is not None
    logits = torch.zeros(2, END + 1)
    rows.begin(torch.zeros(4, dtype=torch.int64))
    rows.apply(logits)
    assert (logits[1] == 0).nonzero().flatten().tolist() == [ord("r")]
    assert (logits[0] == 0).all()
    decoding = table.rows(np.array([2]), 1)
    assert decoding is not None
    for letter, then in zip("reen", ["e", "e", "n", None], strict=True):
        logits = torch.zeros(1, END + 1)
        decoding.begin(torch.tensor([0, 0, ord(letter), 0]))
        decoding.apply(logits)
        expected = END if then is None else ord(then)
        assert (logits[0] == 0).nonzero().flatten().tolist() == [expected]


@pytest.mark.parametrize("kernels", [Kernels.COMPILED, Kernels.TORCH])
@pytest.mark.parametrize("some_rows", [False, True])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 32), (9, 96), (40, 1000), (5, 65)])
def test_what_masks_forbid_is_taken_out(rows: int, vocab: int, some_rows: bool, kernels: Kernels) -> None:
    if kernels is Kernels.COMPILED and kernels_for(torch.device("cpu")) is None:
        pytest.skip("no compiled kernels here")
    generator = np.random.default_rng(vocab)
    masks = generator.integers(-(2**31), 2**31, (rows, -(-vocab // 32)), np.int64).astype(np.int32)
    logits = torch.from_numpy(generator.normal(size=(rows, vocab)).astype(np.float32))
    logits[0, :3] = torch.tensor([torch.inf, -torch.inf, 0.0])
    where = torch.arange(rows - 1, -1, -2) if some_rows else torch.arange(rows)
    forbidden = forbidden_tokens(torch.from_numpy(masks[: len(where)]), vocab)
    expected = logits.index_copy(0, where, logits[where].masked_fill(forbidden, -torch.inf))
    forbid(logits, where if some_rows else None, masks[: len(where)], kernels)
    assert torch.equal(logits, expected)


def test_some_rows_of_a_batch_follow_guides(model: Path) -> None:
    """The others stay as they are."""
    compiler, table = GuideCompiler(model, END + 1, [END]), GuideTable(END + 1, torch.device("cpu"))
    for slot, regex in ((1, "ab"), (3, "ba")):
        params = SamplingParams(regex=regex)
        compiled = compiler.compile(Guide("regex", regex))
        table.set(slot, Request(slot, [1], params, 30, guide=compiled), np.array([1], np.int64))
    rows = table.rows(np.array([0, 1, 2, 3]), 0)
    assert rows is not None
    logits = torch.zeros(4, END + 1)
    rows.begin(torch.zeros(4, dtype=torch.int64))
    rows.apply(logits)
    assert (logits[::2] == 0).all()
    assert [(row == 0).nonzero().flatten().tolist() for row in logits[1::2]] == [[ord("a")], [ord("b")]]


def test_an_output_that_leaves_its_guide_ends(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As one whose guide has become too much work does: nothing of the step fails."""
    table, tokens = GuideTable(END + 1, torch.device("cpu")), np.array([1], np.int64)
    compiled = GuideCompiler(model, END + 1, [END]).compile(Guide("regex", COLOURS))
    table.set(0, Request(1, [1], SamplingParams(regex=COLOURS), 30, guide=compiled), tokens)
    rows = table.rows(np.array([0]), 1)
    assert rows is not None
    logits = torch.zeros(1, END + 1)
    rows.begin(torch.tensor([ord("z")]))
    rows.apply(logits)
    assert (logits[0] == 0).nonzero().flatten().tolist() == [END]
    assert "an output left its guide and ends: Parser Error" in caplog.text


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"regex": "(("}, "regex cannot be followed"),
        ({"json_schema": "{"}, "json_schema cannot be followed"),
        ({"json_schema": "[1]"}, "json_schema cannot be followed"),
        ({"json_schema": '{"type": "no such"}'}, "json_schema cannot be followed"),
        ({"grammar": "start: nothing"}, "grammar cannot be followed"),
        ({"regex": "a", "grammar": "b"}, "regex and grammar are given"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos does not go with regex"),
        ({"regex": "a", "min_tokens": 3}, "min_tokens does not go with regex"),
        ({"regex": ""}, "regex has 0 characters"),
        ({"regex": "a" * 65_537}, "regex has 65537 characters"),
        ({"regex": 3}, "regex is 3; it must be text"),
    ],
)
def test_what_cannot_be_followed_is_named(llm: LLM, asked: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        llm.generate([1, 2], SamplingParams(max_tokens=5, **asked))  # type: ignore[arg-type]


def test_a_model_without_a_tokenizer_file_follows_none(model: Path, tmp_path: Path) -> None:
    for directory, ends in ((tmp_path, [END]), (model, [])):
        with pytest.raises(ValueError, match=r"no tokenizer\.json or no end token"):
            GuideCompiler(directory, END + 1, ends).compile(Guide("regex", "a"))


CHAIN = """
import sys
from pathlib import Path
from chiron_engine.policy.iteration.sampling_params import Guide
from chiron_engine.runtime.guides import GuideCompiler
rules = "".join(f"r{n}: r{n + 1}\\n" for n in range(5000))
grammar = "start: r0\\n" + rules + 'r5000: "a"'
assert 60_000 < len(grammar) < 65_536
try:
    GuideCompiler(Path(sys.argv[1]), int(sys.argv[2]), [0]).compile(Guide("grammar", grammar))
except ValueError:
    pass
"""


def test_the_longest_chain_of_rules_does_not_end_the_process(model: Path) -> None:
    vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
    command = [sys.executable, "-c", CHAIN, str(model), str(vocab_size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
