import numpy as np
import pytest

from models.evaluation.prompt_categories import Asked, Seen, answered, by_category


def picture(*objects: str, layout: str = "big", background: str = "blue", accepted: bool = True) -> Seen:
    return Seen(objects, layout, background, accepted)


def test_what_a_prompt_leaves_open_is_free() -> None:
    cat = Asked(("cat",))
    assert answered(cat, picture("cat", layout="three", background="pink"))["all"]
    assert not answered(cat, picture("cat", "key", layout="beside"))["all"]
    assert not answered(cat, picture("cat", accepted=False))["all"]
    assert answered(Asked(("cat", "key")), picture("key", "cat", layout="above"))["all"]
    assert not answered(Asked(("cat", "key"), ordered=True), picture("key", "cat", layout="above"))["all"]
    assert not answered(Asked(("cat",), count=3), picture("cat"))["all"]
    assert not answered(Asked(("cat",), background="pink"), picture("cat"))["all"]


def test_a_category_needs_its_question_and_the_objects() -> None:
    asked = [
        Asked(("cat",), count=1, background="blue"), Asked(("cat",), count=3), Asked(("cat", "key"), layout="beside", ordered=True),
    ]  # fmt: skip
    shown = [picture("cat", background="pink"), picture("cat", layout="three"), picture("cat", "key", layout="above")]
    found = by_category(asked, shown)
    assert {name: values.tolist() for name, values in found.items()} == {
        "all": [False, True, False], "single_object": [True], "colour": [False], "counting": [True],
        "two_objects": [True], "position": [False],
    }  # fmt: skip
    with pytest.raises(ValueError, match="one prompt per picture"):
        by_category(asked, shown[:1])
    assert all(values.dtype == np.bool_ for values in found.values())
