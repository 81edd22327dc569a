"""The command `python -m tinylm.generate`: what it writes, and what it refuses."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
from spoken import BPE, own

from tinylm import checkpoint
from tinylm.generate import Sampling, complete
from tinylm.generate.__main__ import main
from tinylm.model import Transformer
from tinylm.tokenizer import train_char


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


class Written(io.StringIO):
    """Remembers what was written between flushes: what a reader of a pipe sees arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [""]

    def write(self, text: str) -> int:
        self.parts[-1] += text
        return super().write(text)

    def flush(self) -> None:
        self.parts.append("")


def command(folder: Path, *arguments: str, expect: int = 0) -> tuple[Written, str]:
    """What the command writes to stdout and stderr."""
    out = Written()
    return out, told(out, folder, *arguments, expect=expect)


def told(out: TextIO, folder: Path, *arguments: str, expect: int = 0) -> str:
    """What the command writes to stderr, with `out` as stdout."""
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        assert main(["--checkpoint", str(folder), *arguments]) == expect, err.getvalue()
    return err.getvalue()


def test_one_prompt_streams_and_is_the_text_of_all_its_tokens(tmp_path: Path) -> None:
    model = own(tmp_path)
    out, err = command(tmp_path, "--prompt", "Once upon", "--max-new-tokens", "30", "--seed", "3", "--top-p", "0.9")
    ids = BPE.encode("Once upon")
    (row,) = complete(model, [ids], 30, stop={BPE.eot or 0}, sampling=Sampling(0.8, top_p=0.9, seed=3))
    assert out.getvalue() == BPE.decode(ids + row) + "\n"
    arrived = [part for part in out.parts if part]
    assert arrived[0] == "Once upon" and len(arrived) > 10
    assert "30 tokens" in err and "tokens/s" in err and "seed 3" in err


def test_a_seed_is_told_and_repeats_the_text(tmp_path: Path) -> None:
    own(tmp_path)
    out, err = command(tmp_path, "--prompt", "a", "--max-new-tokens", "20", "--temperature", "1")
    seed = err.split("seed ")[1].split(";")[0].strip()
    again, _ = command(tmp_path, "--prompt", "a", "--max-new-tokens", "20", "--temperature", "1", "--seed", seed)
    other, _ = command(tmp_path, "--prompt", "a", "--max-new-tokens", "20", "--temperature", "1")
    assert out.getvalue() == again.getvalue() != other.getvalue()


@pytest.mark.parametrize("more", [[], ["--cache", "none"], ["--dtype", "bf16"], ["--top-k", "9"]])
def test_several_prompts_are_a_batch_of_which_each_is_as_alone(tmp_path: Path, more: list[str]) -> None:
    own(tmp_path)
    prompts, arguments = ["Once upon a time", "", "café"], ["--max-new-tokens", "25", *more]
    each = [
        command(tmp_path, "--prompt", prompt, "--seed", str(5 + row), *arguments)[0].getvalue()
        for row, prompt in enumerate(prompts)
    ]
    given = [part for prompt in prompts for part in ("--prompt", prompt)]
    out, _ = command(tmp_path, *given, "--seed", "5", *arguments)
    if more == ["--dtype", "bf16"]:  # its logits have ties, which the order of additions decides
        assert out.getvalue().count("--- prompt ") == 3
    else:
        assert out.getvalue() == "".join(f"--- prompt {row + 1} of 3\n{text}" for row, text in enumerate(each))


class Ending(Transformer):
    """Says the end of text after every token but those of the prompt `a time`; for that, as it likes."""

    def forward(self, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
        logits = super().forward(tokens, **options)
        logits[..., BPE.eot] += 1e4 * (tokens.shape[1] == 9)
        return logits


def test_the_end_of_text_ends_it_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(tmp_path)
    monkeypatch.setattr(checkpoint, "Transformer", Ending)
    arguments = ["--prompt", "a", "--max-new-tokens", "20", "--temperature", "0", "--cache", "none"]
    length = 9 - len(BPE.encode("a"))
    _, err = command(tmp_path, *arguments)
    assert f"{length} tokens" in err and "end of text" in err
    _, err = command(tmp_path, *arguments, "--no-stop")
    assert "20 tokens" in err and "end of text" not in err


def test_the_context_ends_it_with_a_note(tmp_path: Path) -> None:
    own(tmp_path, context=12)
    asked = ["--no-stop", "--max-new-tokens", "10"]
    _, err = command(tmp_path, "--prompt", "x" * 5, *asked)
    assert "the prompt has 5 of the context's 12 tokens: at most 7 new ones" in err
    assert "7 tokens" in err and "context is full" in err
    _, err = command(tmp_path, "--prompt", "xx", "--prompt", "x" * 9, *asked)
    assert "prompt 2 has 9 of the context's 12 tokens: at most 3" in err and "prompt 1" not in err
    assert "13 tokens" in err
    _, err = command(tmp_path, "--prompt", "xx", *asked)
    assert "context" not in err


def test_a_prompt_may_come_from_a_file_or_from_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(tmp_path)
    more = ["--max-new-tokens", "5", "--temperature", "0"]
    expected = command(tmp_path, "--prompt", "café\n", *more)[0].getvalue()
    file = tmp_path / "prompt.txt"
    file.write_bytes("café\n\n".encode())
    assert command(tmp_path, "--prompt-file", str(file), *more)[0].getvalue() == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("café\n\n".encode()), encoding="ascii"))
    assert command(tmp_path, "--prompt-file", "-", *more)[0].getvalue() == expected


def test_ctrl_c_ends_it_with_the_text_until_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(tmp_path)
    module = sys.modules["tinylm.generate.__main__"]
    whole = module.stream

    def interrupted(*arguments: Any, **options: Any) -> Any:
        for number, chosen in enumerate(whole(*arguments, **options)):
            if number == 6:
                raise KeyboardInterrupt
            yield chosen

    more = ["--prompt", "a", "--max-new-tokens", "20", "--temperature", "0", "--no-stop"]
    complete_text = command(tmp_path, *more)[0].getvalue()
    monkeypatch.setattr(module, "stream", interrupted)
    out, err = command(tmp_path, *more, expect=130)
    text = out.getvalue().removesuffix("\n")
    assert complete_text.startswith(text.rstrip("\ufffd")) and text.startswith("a")
    assert "6 tokens" in err and "interrupted" in err
    monkeypatch.setattr(module, "load", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert command(tmp_path, *more, expect=130)[1] == ""


def test_bad_input_is_one_line_and_status_2(tmp_path: Path) -> None:
    run, bare, small = tmp_path / "run", tmp_path / "bare", tmp_path / "small"
    own(run)
    own(bare, train_char(["abc\n"]), context=8)
    own(small, vocab_size=BPE.vocab_size - 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent" / "config.json").write_text("{}")
    (tmp_path / "no-utf8").write_bytes(b"ab\xff")
    cases: list[tuple[Path, list[str], list[str]]] = [
        (tmp_path / "nowhere", [], ["nowhere: no such directory"]),
        (tmp_path / "empty", [], ["empty: has neither checkpoints", "config.json"]),
        (tmp_path / "silent", [], ["silent: has no tokenizer.json"]),
        (small, [], ["tokenizer has 300 tokens", "vocabulary of 299"]),
        (bare, [], ["prompt is empty"]),
        (bare, ["--prompt", ""], ["prompt is empty"]),
        (bare, ["--prompt", "abé"], ["'é' at character 2"]),
        (bare, ["--prompt", "abcabcab"], ["prompt has 8 tokens", "context is 8"]),
        (bare, ["--prompt", "a", "--prompt", "abcabcabc"], ["prompt 2 has 9 tokens"]),
        (run, ["--prompt", "a\udcff"], ["no UTF-8 at character 1"]),
        (run, ["--prompt-file", str(tmp_path / "none")], ["none: cannot be read"]),
        (run, ["--prompt-file", str(tmp_path / "no-utf8")], ["no UTF-8 at byte 2"]),
        (run, ["--temperature", "-1"], ["temperature is -1"]),
        (run, ["--temperature", "nan"], ["temperature is nan"]),
        (run, ["--top-k", "0"], ["top_k is 0"]),
        (run, ["--top-p", "1.5"], ["top_p is 1.5"]),
        (run, ["--max-new-tokens", "0"], ["--max-new-tokens is 0"]),
        (run, ["--device", "abacus"], ["--device abacus"]),
        (run, ["--device", "meta"], ["--device meta: give cpu"]),
        (run, ["--device", "mps"], ["--device mps: give cpu"]),
        (run, ["--runner", "grahp"], ["unknown runner 'grahp': use one of eager, graph"]),
        (run, ["--runner", "graph", "--device", "cpu"], ["runner 'graph' with a model on cpu"]),
    ]
    if not torch.cuda.is_available():
        cases.append((run, ["--device", "cuda"], ["torch sees 0 CUDA devices"]))
    for folder, arguments, words in cases:
        out, err = command(folder, *arguments, expect=2)
        assert out.getvalue() == "", "no text before an error"
        assert err.startswith("tinylm.generate: ") and err.count("\n") == 1, err
        assert all(word in err for word in words), err
    with pytest.raises(SystemExit) as ended:
        command(run, "--temperatur", "1")
    assert ended.value.code == 2


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    own(tmp_path)
    path = tmp_path / "step-00000001" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    _, err = command(tmp_path, expect=2)
    assert "model.safetensors" in err and err.count("\n") == 1


def test_a_stdout_that_cannot_be_written_is_told_and_one_that_is_closed_is_not(tmp_path: Path) -> None:
    """And nothing is left in its buffer, which would fail again at Python's end."""
    own(tmp_path)
    reading, closed = os.pipe()
    os.close(reading)
    cases: list[tuple[int | str, int, str]] = [(closed, 0, "")]
    if Path("/dev/full").exists():
        cases.append(("/dev/full", 2, "tinylm.generate: stdout cannot be written: No space left on device\n"))
    for file, status, line in cases:
        with open(file, "w") as out:
            assert told(out, tmp_path, "--prompt", "a", "--max-new-tokens", "9", expect=status) == line


def test_a_model_that_does_not_fit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(tmp_path)
    module = sys.modules["tinylm.generate.__main__"]
    monkeypatch.setattr(module, "load", lambda *_, **__: torch.empty(1 << 55, dtype=torch.uint8))
    err = command(tmp_path, expect=2)[1]
    assert "memory is too small" in err and err.count("\n") == 1
    monkeypatch.setattr(module, "load", lambda *_, **__: torch.empty(2) @ torch.empty(3))
    with pytest.raises(RuntimeError, match="size"):
        command(tmp_path)


def test_the_command_itself(tmp_path: Path) -> None:
    """As a user runs it, into a pipe that its reader has closed."""
    own(tmp_path)
    # Without the buffer that users have, Python's end would have nothing to say of what is left in it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    line = [sys.executable, "-m", "tinylm.generate", "--checkpoint", str(tmp_path), "--max-new-tokens", "9"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)
