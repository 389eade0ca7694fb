from pathlib import Path

import torch

from models.networks.sd3 import packed
from models.networks.text_features import Sd3Text, sd3_text_parts

DIM, T5_TOKENS = 32, 8


def test_an_entry_belongs_to_the_encoder_that_made_it(sd3_folder: Path) -> None:
    encode = Sd3Text(sd3_folder, T5_TOKENS, DIM)
    tokens, null = (encode([text])[0] for text in ("a red apple", ""))
    parts = sd3_text_parts(sd3_folder, *tokens.shape[1:])
    assert len(parts) == 2
    for dropped, part in enumerate(parts):
        asked = ["" if number == dropped else "a red apple" for number in (0, 1)]
        made = [encode.pipeline._get_clip_prompt_embeds([asked[number]], clip_model_index=number) for number in (0, 1)]
        clip = torch.cat([each for each, _ in made], -1)
        clip = torch.nn.functional.pad(clip, (0, DIM - clip.shape[-1]))
        want = packed(torch.cat([clip, clip.new_zeros(1, T5_TOKENS, DIM)], 1), torch.cat([p for _, p in made], -1))
        assert torch.equal(torch.where(part, null, tokens), want)
        assert not torch.equal(want, tokens)
