"""A prompt that the text encoder does not read whole is named once, with its tokens and the limit."""

import logging

from models.networks.text_features import PackagedText, warn_of_cut

LONG = "a cat " * 20


def test_one_warning_names_the_longest_prompt_its_tokens_and_the_limit(caplog) -> None:
    encode = PackagedText(12)
    with caplog.at_level(logging.WARNING):
        assert warn_of_cut(["a cat", "a dog"], encode) == 0
        assert caplog.records == []
        assert warn_of_cut(["a cat", "a dog " * 10, LONG, LONG], encode) == 2
    (record,) = caplog.records
    assert "2 of 3 prompts are cut" in record.getMessage()
    assert repr(LONG) in record.getMessage()
    assert "has 42 tokens, the text encoder reads 12" in record.getMessage()
