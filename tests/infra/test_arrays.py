import numpy as np
from safetensors.numpy import load_file

from infra.arrays import save_arrays


def test_a_transposed_array_is_read_back_as_it_was(tmp_path) -> None:
    channels_first = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    pictures = channels_first.transpose(0, 2, 3, 1)[[1, 0]]
    save_arrays(tmp_path / "a.safetensors", {"pictures": pictures})
    np.testing.assert_array_equal(load_file(tmp_path / "a.safetensors")["pictures"], pictures)
