"""Bad input to generation: one clear error each, before anything is launched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from launched import DEVICE, EACH, ONE_ROW, here, prompts_of
from launched import rows as rows
from torch import Tensor

from tinylm.config import ConfigError, preset
from tinylm.generate import RUNNERS, Decoder, complete, prefill
from tinylm.model import Transformer

pytestmark = pytest.mark.usefixtures("rows")


class Launched(Transformer):
    """A model that nothing may be asked of."""

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        raise AssertionError("launched")

    def _enter(self, *arguments: Any) -> Any:
        raise AssertionError("launched")


@pytest.mark.parametrize("name", [*EACH, *map(here, ONE_ROW)])
def test_bad_input_is_one_clear_error_before_anything_is_launched(name: str) -> None:
    model = Launched(preset("nano", context=16)).eval().to(DEVICE)
    prompt = prompts_of(model, 1, 10)
    decode = functools.partial(Decoder, model, runner=name)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: decode(prompts_of(model, 1, 17), 0), "prompt of 17 tokens does not fit the model's context of 16"),
        (lambda: decode(prompt, 7), "10 prompt tokens and 7 new ones do not fit"),
        (lambda: decode(prompt[:, :0], 1), "not empty"),
        (lambda: decode(prompt + 512, 1), "token ids run from .*: expected 0 to 511"),
        (lambda: decode(prompt - 512, 1), "token ids run from -"),
        (lambda: decode(prompt.float(), 1), "expected int64"),
        (lambda: decode(prompt, 1, cache="pagd"), "unknown cache layout 'pagd': use one of dense"),
        (lambda: decode(prompt, 1, granularity=0), "granularity is 0"),
        (lambda: Decoder(model, prompt, 1, runner="grahp"), "unknown runner 'grahp': use one of eager, graph"),
        (lambda: complete(model, [[1], []], 2, runner=name), r"prompts of \[1, 0\] tokens"),
    ]
    for call, words in calls:
        refused(call, words)


def test_prefill_refuses_what_is_no_prompt_and_the_cache_of_another_model_or_device() -> None:
    model = Launched(preset("nano", context=16)).eval().to(DEVICE)
    cache, prompt = model.new_cache(), prompts_of(model, 1, 10)

    def of(**more: Any) -> Any:
        return Transformer(preset("nano", context=16, **more)).to(DEVICE).new_cache()

    elsewhere = Transformer.build(model.config, device="meta").new_cache()
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: prefill(model, prompts_of(model, 1, 17), cache), "prompt of 17 tokens"),
        (lambda: prefill(model, prompt[:, :0], cache), "not empty"),
        (lambda: prefill(model, prompt + 512, cache), "token ids"),
        (
            lambda: prefill(model, prompt, of(layers=3)),
            r"cache is for 3 layers .*the model has 2 layers .*new_cache\(\)",
        ),
        (lambda: prefill(model, prompt, of(kv_heads=4)), "k of 4 x 16, v of 4 x 16 .* k of 2 x 16"),
        (lambda: prefill(model, prompt, of(head_dim=32)), "k of 2 x 32"),
        (lambda: prefill(model, prompt, elsewhere), f"on meta, the model has .* on {DEVICE}"),
        (lambda: prefill(model, prompt, model.new_cache(context=9)), "10 tokens a row are more than the 9"),
        (lambda: prefill(model, prompt, model.new_cache(context=9), chunk=4), "10 tokens a row are more than the 9"),
        (lambda: prefill(model, prompt, model.new_cache(batch=2)), "1 rows given, the cache has 2"),
        (lambda: prefill(model, prompt, cache, chunk=0), "chunk is 0"),
    ]
    for call, words in calls:
        refused(call, words)


@pytest.mark.parametrize("name", [name for name, row in RUNNERS.items() if "cpu" not in row.devices])
def test_a_runner_that_the_device_cannot_run_is_an_error(name: str) -> None:
    model = Launched(preset("nano", context=16)).eval()
    prompt = prompts_of(model, 1, 10)
    refused(lambda: Decoder(model, prompt, 1, runner=name), f"runner '{name}' with a model on cpu: .* cuda; .* eager")


def refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
