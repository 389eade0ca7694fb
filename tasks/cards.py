"""README.md of a published model: metadata by huggingface_hub's own classes, the rest plain Markdown tables.

Mitchell et al. 2019, arXiv:1810.03993 (model cards), in the Hub's form. Text that came with data is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from models.networks.checkpoint import SamplingCard
from tasks.card_facts import Judged, Score, Trained

LICENCES = {  # what pictures carry -> the Hub's identifier
    r"cc[ -]?0\b": "cc0-1.0",
    r"cc[ -]by[ -]sa[ -]4\.0": "cc-by-sa-4.0",
    r"cc[ -]by[ -]sa[ -]3\.0": "cc-by-sa-3.0",
    r"cc[ -]by[ -]nc[ -]sa[ -]4\.0": "cc-by-nc-sa-4.0",
    r"cc[ -]by[ -]nc[ -]4\.0": "cc-by-nc-4.0",
    r"cc[ -]by[ -]4\.0": "cc-by-4.0",
    r"apache[ -]2\.0": "apache-2.0",
    r"mit\b": "mit",
}
UNKNOWN = "other"


@dataclass(frozen=True)
class CardFacts:
    """All that a card is written from."""

    title: str
    usage: str  # Python that draws a picture with stock diffusers
    note: str  # what to know when calling it
    sampling: SamplingCard
    steps: int
    scheduler: str
    adapter: bool
    base: str | None
    licence: str
    packaged_text_encoder: bool
    lineage: Mapping[str, Any]
    trained: Sequence[Trained]
    funnel: Sequence[Mapping[str, Any]]
    curation: Mapping[str, Any]
    judged: Judged
    preset: bool  # whether config.yaml lies beside the card
    seed: int | None
    provenance: Mapping[str, Any]


def licence_of(licences: Mapping[str, int]) -> str:
    """The Hub's identifier of the one licence that all pictures carry, `other` where there are several or none."""
    known = {next((name for p, name in LICENCES.items() if re.match(p, text.lower())), UNKNOWN) for text in licences}
    return known.pop() if len(known) == 1 else UNKNOWN


def render(facts: CardFacts) -> str:
    """The whole README.md."""
    parts = [
        f"# {plain(facts.title)}", summary(facts), use(facts), sampling(facts), training(facts), data(facts),
        metrics(facts), limits(facts), reproduce(facts),
    ]  # fmt: skip
    return f"---\n{metadata(facts).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def metadata(facts: CardFacts) -> ModelCardData:
    """The YAML block that the Hub indexes."""
    tags = ["text-to-image", "t2i-lifecycle", "flow-matching", facts.sampling.family]
    more: dict[str, Any] = {}
    if facts.adapter:
        tags += ["lora", "peft"]
        more = {"base_model_relation": "adapter", "instance_prompt": facts.sampling.trigger}
    elif facts.base:
        more = {"base_model_relation": "finetune"}
    if facts.sampling.distilled:
        tags += ["distillation", f"{facts.steps}-step"]
    if facts.licence == UNKNOWN:
        more |= {"license_name": "see-the-card", "license_link": "README.md"}
    return ModelCardData(
        base_model=facts.base, eval_results=[result(s, facts.steps) for s in facts.judged.scores] or None,
        language="en", library_name="diffusers", license=facts.licence, model_name=facts.title,
        pipeline_tag="text-to-image", tags=tags, **{name: value for name, value in more.items() if value},
    )  # fmt: skip


def result(score: Score, steps: int) -> EvalResult:
    """A score as the Hub's model index holds it."""
    return EvalResult(
        task_type="text-to-image", task_name="Text to image", dataset_type=score.asked.replace(", ", "-").replace(" ", "-"),
        dataset_name=f"t2i-lifecycle prompts: {score.asked}", metric_type=score.metric, metric_name=score.label,
        metric_value=score.value, metric_args={"low": score.low, "high": score.high, "interval": 0.95, "n": score.n, "steps": steps},
    )  # fmt: skip


def summary(facts: CardFacts) -> str:
    """What it is, in two sentences."""
    last = facts.trained[-1].technique if facts.trained else "training"
    what = "A LoRA adapter" if facts.adapter else "A text-to-image model"
    of = f" of [{facts.base}](https://huggingface.co/{facts.base})" if facts.base else ""
    student = f", distilled for {facts.steps} step(s)" if facts.sampling.distilled else ""
    lines = [f"{what}{of}{student}, made by t2i-lifecycle (last stage: {last})."]
    lines.append(f"Pictures are {facts.sampling.side}x{facts.sampling.side} px.")
    if facts.judged.examples is not None:
        asked = "; ".join(plain(prompt) for prompt in facts.judged.prompts)
        lines.append(f"\n\n![Pictures of the prompts below, in this order](examples.png)\n\nLeft to right: {asked}.")
    return " ".join(lines)


def use(facts: CardFacts) -> str:
    """Code that runs as it is, without t2i-lifecycle."""
    return f"## Use\n\n```python\n{facts.usage.strip()}\n```\n\n{facts.note}".strip()


def sampling(facts: CardFacts) -> str:
    """Steps, guidance and time grid as trained."""
    card = facts.sampling
    rows = [("Network", card.family), ("Predicts", card.prediction), ("Scheduler", facts.scheduler)]
    rows += [("Steps", str(facts.steps)), ("Guidance", f"{card.guidance:g}"), ("Size", f"{card.side}x{card.side} px")]
    rows += [("Time shift", f"{card.shift} (base {card.base_tokens} tokens)")]
    rows += [("Longest prompt", f"{card.prompt_max_tokens} tokens")]
    if card.distilled:
        asked = ", ".join(map(str, card.trained_steps or (facts.steps,)))
        rows += [("Trained step counts", f"{asked}; this folder's scheduler is for {facts.steps}")]
        rows += [("Guidance inside the weights", f"{card.distilled_guidance}; call it with guidance_scale=1.0")]
    if card.trigger:
        rows += [("The subject's token", card.trigger)]
    return "## Sampling as trained\n\n" + table(("", ""), rows)


def training(facts: CardFacts) -> str:
    """Every training stage with its settings."""
    head = ("stage", "technique", "from", "steps", "batch", "learning rate", "samples", "seconds")
    rows = [(t.stage, t.technique, t.start, t.steps, t.batch_size, t.rates, t.samples, f"{t.seconds:.0f}") for t in facts.trained]  # fmt: skip
    return "## Training\n\n" + table(head, rows) + "\n\n" + settings({t.stage: t.config for t in facts.trained})


def data(facts: CardFacts) -> str:
    """How many pictures, whose, and how they were chosen."""
    found = facts.lineage
    text = [
        "## Data",
        f"Trained on {found['pictures']} pictures. [lineage.json](lineage.json) names every stage behind this model by digest; "
        "`t2i lineage` on this folder lists the URLs, `t2i impact URL` answers whether a picture was used.",
        table(("licence", "pictures"), found["licences"].items()), table(("domain", "pictures"), found["domains"].items()),
    ]  # fmt: skip
    if facts.funnel:
        rows = [(r["stage"], r["received"], r["kept"], ", ".join(f"{k} {n}" for k, n in r["new"].items())) for r in facts.funnel]  # fmt: skip
        text += [
            "Curation:",
            table(("stage", "rows", "kept", "dropped or failed here"), rows),
            settings(facts.curation),
        ]
    return "\n\n".join(part for part in text if part)


def metrics(facts: CardFacts) -> str:
    """Scores with intervals, then the gates."""
    if not facts.judged.scores:
        return "## Metrics\n\nThis model was not evaluated at this number of steps."
    rows = [(s.label, s.asked, f"{s.value:.3f}", f"{s.low:.3f} to {s.high:.3f}", s.n) for s in facts.judged.scores]
    text = f"## Metrics\n\nAt {facts.steps} step(s), value with 95 % interval.\n\n"
    text += table(("metric", "prompts", "value", "interval", "n"), rows)
    verdicts = [(v["metric"], "passed" if v["passed"] else "missed", v["reason"]) for v in facts.judged.verdicts]
    return text + ("\n\nGates:\n\n" + table(("gate", "verdict", "why"), verdicts) if verdicts else "")


def limits(facts: CardFacts) -> str:
    """Intended use and what it cannot do."""
    lines = [
        "Intended use: pictures of the kind it was trained on, and the study of how such a model comes to be.",
        f"It has seen {facts.lineage['pictures']} pictures and draws what they show; other subjects, styles and languages "
        "come out as the nearest thing it knows. A picture may resemble its training data.",
        "Nothing here filters prompts or pictures: put a filter of your own before it where others can reach it.",
    ]
    if facts.judged.scores:
        lines.append(
            "The scores are of the prompts named above, by this project's own judge, and say nothing of others."
        )
    lines += [f"**Missed gate**: {plain(reason)}" for reason in facts.judged.missed]
    if facts.licence == UNKNOWN:
        lines.append("Licence: the pictures carry several licences, or none is stated; the table under Data has them.")
    if facts.packaged_text_encoder:
        lines.append("The frozen text encoder in this folder is all-MiniLM-L6-v2 (Apache-2.0).")
    return "## Intended use and limits\n\n" + "\n".join(f"- {line}" for line in lines)


def reproduce(facts: CardFacts) -> str:
    """Commit, seed, configuration, libraries."""
    code, found = facts.provenance.get("code", {}), facts.provenance
    commit = code.get("commit") or "not recorded"
    text = f"## Reproduce\n\nt2i-lifecycle {code.get('version', '')} at commit `{commit}`"
    text += " with uncommitted changes" if code.get("changed") else ""
    text += f", code digest `{str(code.get('digest', ''))[:12]}`, seed {facts.seed}.\n\n"
    if facts.preset:
        text += "```\nt2i run config.yaml\n```\n\n"
    packages = ", ".join(f"{name} {version}" for name, version in found.get("packages", {}).items())
    machine = found.get("machine", {})
    return (
        text
        + f"Made on {machine.get('platform', 'an unknown machine')}, Python {machine.get('python', '?')}, {packages}."
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; nothing for no rows."""
    lines = ["| " + " | ".join("" if cell is None else plain(str(cell)) for cell in row) + " |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines]) if lines else ""


def plain(text: str) -> str:
    """Text of others as it is: no markup, no link, no HTML, one line."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;"))


def settings(found: Mapping[str, Any]) -> str:
    """Full configurations, folded away."""
    parts = [
        f"**{name}**\n\n```yaml\n{yaml.safe_dump(config, default_flow_style=None, width=110).strip()}\n```"
        for name, config in found.items()
    ]
    return "<details><summary>Settings</summary>\n\n" + "\n\n".join(parts) + "\n\n</details>"
