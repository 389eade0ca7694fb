"""`python -m benchmarks [NAME]`: measure one benchmark or all of them and print a line each."""

from __future__ import annotations

import importlib
import sys

NAMES = ("training_speed", "kill_resume", "corruption", "download", "hostile_input", "near_duplicates", "curation_truth", "image_hashing", "loader", "manifest_scale", "time_to_quality", "preference", "reward_model", "prompt_enhancement", "personalization",
         "distillation", "orchestration", "serving")  # fmt: skip


def main(wanted: list[str]) -> int:
    """Exit status 1 when a bar was missed, 2 for an unknown name."""
    if unknown := sorted(set(wanted) - set(NAMES)):
        print(f"no benchmark {unknown[0]!r}; choose from {', '.join(NAMES)}", file=sys.stderr)
        return 2
    missed = 0
    for name in wanted or NAMES:
        result = importlib.import_module(f"benchmarks.{name}").main()
        verdict = "met" if result["met"] else "MISSED"
        print(
            f"{name}: {result['value']:g} against {result['peer']:g}, ratio {result['ratio']}, bar {verdict}",
            flush=True,
        )
        missed += not result["met"]
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
