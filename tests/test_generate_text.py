"""Text from checkpoints: what is loaded, what is streamed, and what the command does and refuses."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import splits

from tinylm import checkpoint
from tinylm.config import CheckpointError, ConfigError, preset
from tinylm.generate import Sampling, complete
from tinylm.generate.__main__ import main
from tinylm.generate.text import TextStream, load
from tinylm.model import Transformer
from tinylm.tokenizer import EOT, Tokenizer, train_bpe, train_char

SAMPLE = "Once upon a time there was a small café. ¡Olé! 今日は 🙂 — the end.\n" * 4
BPE = train_bpe([SAMPLE], 300)
CHARACTERS = train_char([SAMPLE], eot=True)


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


# --- streaming ----------------------------------------------------------------------------------------------


def pushed(decode: Any, ids: Sequence[int], sizes: Sequence[int]) -> list[str]:
    """What a stream gives for ids that come in parts of these sizes, and at the end."""
    stream, start, parts = TextStream(decode), 0, []
    for size in sizes:
        parts.append(stream.push(ids[start : start + size]))
        start += size
    return [*parts, stream.finish()]


@given(st.data(), st.text(max_size=20))
def test_any_text_in_any_parts_streams_whole_characters(data: st.DataObject, text: str) -> None:
    ids = BPE.encode(text)
    parts = pushed(BPE.decode, ids, data.draw(splits(len(ids))) if ids else [])
    assert "".join(parts) == text
    assert all("\ufffd" not in part or "\ufffd" in text for part in parts), "no half of a character"


@given(st.data(), st.lists(st.integers(0, BPE.vocab_size - 1), min_size=1, max_size=30))
def test_any_tokens_stream_to_what_decoding_all_gives(data: st.DataObject, ids: list[int]) -> None:
    """Bytes that are no UTF-8 too, and special tokens."""
    parts = pushed(BPE.decode, ids, data.draw(splits(len(ids))))
    assert "".join(parts) == BPE.decode(ids)


@given(st.lists(st.integers(0, CHARACTERS.vocab_size - 1), min_size=1, max_size=30))
def test_each_character_of_a_table_comes_at_once(ids: list[int]) -> None:
    parts = pushed(CHARACTERS.decode, ids, [1] * len(ids))
    assert parts == [*(CHARACTERS.decode([id]) for id in ids), ""]


def metaspace() -> tokenizers.Tokenizer:
    """As Llama 2's: words begin with a mark, unknown characters are bytes, and the first space is dropped."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefgh", "▁a", "ab"]
    model = tokenizers.models.BPE(
        {token: id for id, token in enumerate(tokens)},
        [("▁", "a"), ("a", "b")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    made = tokenizers.Tokenizer(model)
    steps = tokenizers.normalizers
    made.normalizer = steps.Sequence([steps.Prepend("▁"), steps.Replace(" ", "▁")])
    back = tokenizers.decoders
    made.decoder = back.Sequence([back.Replace("▁", " "), back.ByteFallback(), back.Fuse(), back.Strip(" ", 1, 0)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return made


@given(st.data(), st.text("abh é今🙂 ", min_size=1, max_size=12))
def test_a_tokenizer_with_marks_of_words_keeps_its_spaces(data: st.DataObject, text: str) -> None:
    made = metaspace()
    ids = made.encode(text).ids
    parts = pushed(made.decode, ids, data.draw(splits(len(ids))))
    assert "".join(parts) == made.decode(ids) == text
    assert all("\ufffd" not in part for part in parts)


def test_text_comes_as_soon_as_it_is_whole() -> None:
    ids = BPE.encode_bytes("a🙂b".encode())
    assert len(ids) >= 3, "the character is several tokens"
    assert pushed(BPE.decode, ids, [1] * len(ids)) == ["a", *[""] * (len(ids) - 3), "🙂", "b", ""]


def test_a_character_that_is_never_whole_comes_at_the_end() -> None:
    ids = BPE.encode_bytes("a🙂".encode()[:-1])
    assert pushed(BPE.decode, ids, [1] * len(ids))[-1] == "\ufffd" == BPE.decode(ids)[1:]


# --- checkpoints --------------------------------------------------------------------------------------------


def own(folder: Path, tokenizer: Tokenizer = BPE, step: int = 1, loss: float | None = None, **more: Any) -> Transformer:
    """A run's folder with a checkpoint of a random model."""
    fields = {"vocab_size": tokenizer.vocab_size, "context": 64, "init_std": 0.3, **more}
    config = preset("nano", **fields)
    model = Transformer(config).eval()
    meta = {"model": checkpoint.model_meta(config), "val_loss": loss}
    checkpoint.save(folder, step, model.state_dict(), {}, meta, tokenizer, keep=5)
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Hugging Face Llama directory, whose tokenizer puts a token before each text."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llama")
    made = tokenizers.Tokenizer.from_str(json.dumps(json.loads(BPE._saved)))
    made.add_special_tokens(["<s>"])
    start = made.token_to_id("<s>")
    made.post_processor = tokenizers.processors.Sequence(
        [
            tokenizers.processors.ByteLevel(trim_offsets=False),
            tokenizers.processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", start)]),
        ]
    )
    made.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=made.get_vocab_size(),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=start,
        eos_token_id=BPE.eot,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.5 / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def copy(folder: Path, to: Path) -> Path:
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_runs_folder_and_one_of_its_checkpoints_load(tmp_path: Path, dtype: torch.dtype | None) -> None:
    first, second = own(tmp_path, step=1, loss=1.0), own(tmp_path, step=2, loss=2.0)
    for folder, which, model in (
        (tmp_path, "newest", second),
        (tmp_path, "best", first),
        (tmp_path / "step-00000001", "newest", first),
    ):
        found = load(folder, which=which, dtype=dtype)
        expected = {name: tensor.to(dtype or torch.float32) for name, tensor in model.state_dict().items()}
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.model.state_dict().items())
        assert found.tokenizer.digest == BPE.digest and not found.model.training
        assert (found.ends, found.start) == ({BPE.eot}, BPE.eot)


def test_prompts_and_the_empty_one(tmp_path: Path, llama: Path) -> None:
    own(tmp_path)
    found = load(tmp_path)
    assert found.encode("a time") == BPE.encode("a time")
    assert found.encode("") == [BPE.eot]
    assert found.encode(f"{EOT}a") == [BPE.eot, *BPE.encode("a")]
    theirs = load(llama)
    start = theirs.start
    assert theirs.encode("a") == [start, *BPE.encode("a")] and theirs.encode("") == [start]
    own(tmp_path / "bare", train_char([SAMPLE]))
    with pytest.raises(ConfigError, match="prompt is empty"):
        load(tmp_path / "bare").encode("")
    with pytest.raises(ConfigError, match="no UTF-8 at character 1"):
        found.encode("a\udcff")


def test_ends_of_text_of_a_hugging_face_directory(llama: Path, tmp_path: Path) -> None:
    folder = copy(llama, tmp_path)
    generation = folder / "generation_config.json"
    assert load(folder).ends == {BPE.eot}
    edit(generation, eos_token_id=[3, 5])
    assert load(folder).ends == {3, 5}
    edit(generation, eos_token_id=None)
    edit(folder / "config.json", eos_token_id=7)
    assert load(folder).ends == {7}, "config.json's, where generation_config.json has none"
    generation.unlink()
    edit(folder / "config.json", eos_token_id=None, bos_token_id=None)
    found = load(folder)
    assert (found.ends, found.start) == ({BPE.eot}, BPE.eot), "the tokenizer's, where neither has one"
    edit(folder / "config.json", eos_token_id="</s>")
    with pytest.raises(ConfigError, match=r"config\.json: eos_token_id is '</s>'"):
        load(folder)


@pytest.mark.parametrize("prompts", [["Once upon"], ["Once upon a time", "", "there was a café"]])
def test_greedy_text_is_that_of_transformers(llama: Path, prompts: list[str]) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.LlamaForCausalLM.from_pretrained(llama)
    tokenizer = tokenizers.Tokenizer.from_file(str(llama / "tokenizer.json"))
    found = load(llama)
    rows = complete(found.model, [found.encode(prompt) for prompt in prompts], 20, stop=found.ends)
    for prompt, row in zip(prompts, rows, strict=True):
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        with torch.no_grad():
            out = reference.generate(ids, max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(ids))
        expected = tokenizer.decode(out[0].tolist(), skip_special_tokens=True)
        assert found.tokenizer.decode(found.encode(prompt) + row) == expected


# --- the command --------------------------------------------------------------------------------------------


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
    out, err = Written(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        assert main(["--checkpoint", str(folder), *arguments]) == expect, err.getvalue()
    return out, err.getvalue()


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


def test_bad_input_is_one_line_and_status_2(tmp_path: Path, llama: Path) -> None:
    run, bare, small = tmp_path / "run", tmp_path / "bare", tmp_path / "small"
    own(run)
    own(bare, train_char(["abc\n"]), context=8)
    own(small, vocab_size=BPE.vocab_size - 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "silent").mkdir()
    copy(llama, tmp_path / "silent")
    (tmp_path / "silent" / "tokenizer.json").unlink()
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
        (run, ["--graph", "--device", "cpu"], ["--graph on cpu"]),
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
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(tmp_path)
    assert "model.safetensors" in command(tmp_path, expect=2)[1]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"}


def test_the_command_itself(tmp_path: Path) -> None:
    """As a user runs it, into a pipe that its reader closes early."""
    own(tmp_path)
    line = [sys.executable, "-m", "tinylm.generate", "--checkpoint", str(tmp_path), "--prompt", "今日は", "--no-stop"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(9).decode() == "今日は"
        process.stdout.close()
        err = process.stderr.read().decode()
        assert process.wait() == 0 and "Traceback" not in err and "BrokenPipe" not in err
