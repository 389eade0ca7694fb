"""Which part of the reward model's data a prompt falls in, however it is written."""

from data_curation.scenes import all_scenes, short_caption
from models.engine.randomness import derive_seed
from tasks.reward_model import part_of


def test_case_and_whitespace_do_not_put_a_prompt_on_another_side() -> None:
    for number in range(300):
        part = part_of(f"prompt {number}", 0.4, 0.25, 0)
        for same in (f"Prompt {number}", f"  prompt   {number}\n", f"PROMPT\t{number}"):
            assert part_of(same, 0.4, 0.25, 0) == part


def test_captions_of_the_demo_stay_where_their_bytes_put_them() -> None:
    for scene in all_scenes("full"):
        caption = short_caption(scene)
        place = derive_seed(0, "split", caption) % 10_000 / 10_000
        wanted = "train" if place >= 0.4 else "calibrate" if place < 0.1 else "report"
        assert part_of(caption, 0.4, 0.25, 0) == wanted
