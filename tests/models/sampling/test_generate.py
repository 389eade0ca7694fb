"""Several workers draw what one draws."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from models.networks import prx
from models.networks.checkpoint import SamplingCard, write_checkpoint
from models.networks.config import PrxConfig
from models.sampling.generate import BATCH, load_generator, sample_together

WORKER = """
import sys
from pathlib import Path
import numpy as np, torch, torch.distributed as dist
from models.sampling.generate import load_generator, sample_together
file, rank, checkpoint, count = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
generator, drawn = load_generator(checkpoint), []
generator.sample = lambda prompts, *rest, draw=generator.sample, **more: drawn.append(len(prompts)) or draw(prompts, *rest, **more)
pictures = sample_together(generator, [f"picture {i}" for i in range(count)], list(range(count)))
np.save(f"{file}-{rank}.npy", pictures)
print(sum(drawn))
dist.destroy_process_group()
"""


def test_two_workers_share_the_drawing_and_both_have_all_pictures(tmp_path: Path) -> None:
    config = PrxConfig(hidden_size=32, depth=1, num_heads=2, mlp_ratio=2.0)
    denoiser = prx.build(config, torch.zeros(config.text_dim), torch.ones(config.text_dim), 0)
    torch.nn.init.normal_(denoiser.transformer.final_layer.linear.weight)  # a new one draws grey only
    write_checkpoint(tmp_path / "checkpoint", denoiser, SamplingCard(steps=1, guidance=1.0))
    count = 2 * BATCH + 3
    prompts, seeds = [f"picture {i}" for i in range(count)], list(range(count))
    command = [sys.executable, "-c", WORKER, str(tmp_path / "meet")]
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "checkpoint"), str(count)], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    drawn = [int(worker.communicate(timeout=120)[0].split()[-1]) for worker in workers]
    assert drawn == [BATCH + 3, BATCH]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = load_generator(tmp_path / "checkpoint")
    alone = generator.sample(prompts, seeds)
    np.testing.assert_array_equal(sample_together(generator, prompts, seeds), alone)
    torch.set_num_threads(threads)
    assert alone.std() > 10
    for rank in range(2):
        np.testing.assert_array_equal(np.load(tmp_path / f"meet-{rank}.npy"), alone)
