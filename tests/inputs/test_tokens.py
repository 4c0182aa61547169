"""Tokens are estimated by what the text is; the true numbers are SmolLM2's, measured once with its tokenizer."""

from __future__ import annotations

import pytest

from biollm.inputs.tokens import estimate

TRUE = {  # 100 lines of each
    "JOB 4410311 ON cn042 CANCELLED AT 2025-11-14T10:02:29 DUE TO TIME LIMIT\n": 4700,
    "0.1724\t0.9921\t0.0031\t0.4410\n": 2800,
    "The workflow stopped because one of its tasks needed more memory than it was given.\n": 1700,
    "        return {name: value for name, value in self.fields.items() if value is not None}\n": 2301,
    "由于内存不足,任务被系统终止。请检查日志文件。\n": 4300,
}


@pytest.mark.parametrize("line", TRUE)
def test_an_estimate_is_within_a_third_of_the_truth(line: str) -> None:
    assert 0.75 < estimate(line * 100) / TRUE[line] < 1.34


def test_a_long_text_is_sampled_and_scales() -> None:
    line = next(iter(TRUE))
    text = line * 50_000
    assert abs(estimate(text) / (estimate(line * 100) * 500) - 1) < 0.03
    assert estimate(text.encode()) == estimate(text)


def test_no_text_is_no_token_and_lone_surrogates_are_counted() -> None:
    assert estimate("") == estimate(b"") == 0
    assert estimate("\ud800") > 0
