"""Chat templates that ask for endless time, memory or text: one line within seconds, and bounded memory."""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from worlds import save_tiny_llama

from deft_lightning.cli.main import run
from deft_lightning.data.encoding import bounds
from deft_lightning.data.encoding.bounds import TemplateCost
from deft_lightning.data.encoding.encode import encode, encode_prompt, prompts, tokenise
from deft_lightning.data.encoding.template import end_of_turn, set_template
from deft_lightning.data.encoding.tokenizer import build_tokenizer
from deft_lightning.data.examples import Example
from deft_lightning.errors import UserError

PLAIN = (
    "{% for m in messages %}{{ ('>' if m['role'] == 'assistant' else '<') + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '>' }}{% endif %}"
)
LOOP = "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}"
BOMBS = {
    "text": "{{ 'x' * 10**10 }}",
    "text of a variable": "{% set n = 10**10 %}{{ messages[0]['content'] * n }}",
    "text within the memory": "{{ 'x' * 10**7 }}",
    "loop": LOOP,
    "loop that writes nothing": "{% set n = namespace(i=0) %}" + LOOP.replace("x", "{% set n.i = n.i + 1 %}"),
    "tower": "{{ 9**(9**9) }}",
    "tower of a variable": "{% set n = 9 %}{{ n**(n**n) }}",
    "padding": "{{ 'x'|center(10**10) }}",
    "format": "{{ '%10000000000d' % 1 }}",
    "list": "{{ ([1] * 10**10)|length }}",
    "doubling": "{% set n = namespace(s='xx') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "tags": "{% generation %}{{ 'x' * 10**10 }}{% endgeneration %}",
    "tags and a loop": "{% generation %}" + LOOP + "{% endgeneration %}",
    "json": "{{ ([messages] * 10**8)|tojson }}",
}
REFUSED = {
    "macro without an end": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as a %}",
    "sandbox": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "brackets": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "signs": "{{ " + "-" * 5000 + "1 }}",
    "blocks": "{% if 1 %}" * 500 + "{% endif %}" * 500,
}


@pytest.fixture
def tokenizer() -> Any:
    return build_tokenizer(["one two"], 0)


@pytest.fixture(autouse=True)
def everything_is_put_back() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    yield
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "SECONDS", 0.2)


def row(text: str = "one") -> Example:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "two"}]
    return Example(id="a", digest="", where="rows.jsonl, row 1", messages=messages)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_one_line_that_names_where_the_template_is_from(tokenizer: Any, kind: str) -> None:
    set_template(tokenizer, BOMBS[kind] + PLAIN)
    begin, most = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for use in (encode, encode_prompt) if kind in ("text", "loop") else (encode,):
        with pytest.raises(UserError) as caught:
            use(tokenizer, row())
        line = str(caught.value)
        assert "\n" not in line and len(line) < 300
        assert line.startswith("rows.jsonl, row 1: the chat template ") and "that of --data.chat_template" in line
    assert time.process_time() - begin < 6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 300 * 2**10  # kB


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_template_cannot_do_is_one_line(tokenizer: Any, kind: str) -> None:
    set_template(tokenizer, REFUSED[kind] + PLAIN)
    with pytest.raises(UserError, match=r"^rows\.jsonl, row 1: the chat template ") as caught:
        encode(tokenizer, row())
    assert "root:" not in str(caught.value)


def test_the_tokenizers_own_template_is_named_by_its_folder(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template, tokenizer.name_or_path = BOMBS["text"], str(tmp_path)
    set_template(tokenizer, None)
    with pytest.raises(TemplateCost, match=f"the tokenizer's own of {tmp_path}; another is chosen with"):
        encode(tokenizer, row())
    with pytest.raises(TemplateCost):
        end_of_turn(tokenizer)


@pytest.mark.slow
def test_a_row_that_is_expensive_alone_ends_preparation_where_bad_rows_are_skipped(tokenizer: Any) -> None:
    set_template(tokenizer, "{% if 'bad' in messages[0]['content'] %}" + LOOP + "{% endif %}" + PLAIN)
    good, bad = row(), row("bad")
    assert len(tokenise(tokenizer, [good] * 3, [()] * 3, [])) == 3
    refused: list[UserError] = []
    with pytest.raises(TemplateCost):
        tokenise(tokenizer, [good, bad, good], [()] * 3, refused)
    assert not refused
    with pytest.raises(TemplateCost):
        prompts(tokenizer, [good, bad])


def test_many_rows_may_take_longer_together(tokenizer: Any) -> None:
    set_template(tokenizer, "{% for i in range(90000) %}{% set a = i + 1 %}{% endfor %}" + PLAIN)
    begin = time.process_time()
    assert len(tokenise(tokenizer, [row()] * 80, [()] * 80)) == 80
    assert time.process_time() - begin > 2 * bounds.SECONDS


def test_long_messages_are_no_bomb(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deft_lightning.data.encoding.template.LETTERS", 1000)
    monkeypatch.setattr(bounds, "LETTERS", 1000)
    set_template(tokenizer, PLAIN)
    assert len(encode(tokenizer, row("x" * 5000)).input_ids) > 5000


def test_a_template_as_long_as_a_book_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"has 1,400,000 letters; it is that of"):
        set_template(tokenizer, "{{ 1 }}" * 200_000)


def test_in_another_thread_the_length_is_bounded_still(tokenizer: Any) -> None:
    set_template(tokenizer, BOMBS["text within the memory"])
    found: list[BaseException] = []

    def work() -> None:
        try:
            encode(tokenizer, row())
        except UserError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "writes 10,000,0" in str(found[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "kind"), [("preview", "text"), ("fit", "loop"), ("predict", "text"), ("probe", "loop")]
)
def test_every_verb_that_renders(
    tmp_path: Path, verb: str, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(save_tiny_llama(tmp_path / "model", 0.1))
    (folder / "chat_template.jinja").write_text(BOMBS[kind])
    (tmp_path / "rows.jsonl").write_text('{"question": "one", "answer": "two"}\n' * 4)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run([
            verb, "--data.source", "rows.jsonl", "--data.cache", "false", "--model.pretrained", str(folder),
            "--trainer.accelerator", "cpu", "--trainer.max_steps", "1",
            *(["--data.num_proc", "2"] if verb == "fit" else []),
        ])  # fmt: skip
    line = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and line.startswith("error: ") and f"the tokenizer's own of {folder}" in line
