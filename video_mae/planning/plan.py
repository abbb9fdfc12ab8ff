"""`video-mae plan`: what a run computes, keeps, sends, reads and takes on some GPUs, without them.

Units of all figures: GB (10^9 bytes), milliseconds, GFLOP; so rates are TB/s and TFLOP/s.
"""

from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

from video_mae.config.machines import FACTS
from video_mae.config.plan import FinetunePlanConfig, PretrainPlanConfig
from video_mae.config.schema import MOST_SIZE, require, to_dict
from video_mae.config.yaml_text import to_yaml
from video_mae.files import draw_or_tell, one_line, write_text
from video_mae.planning.rehearsal import Rehearsal
from video_mae.planning.zero import zero_costs
from video_mae.training.deepspeed_config import deepspeed_config, zero_settings
from video_mae.training.journal import peak_flops

Figures = dict[str, float]
"""Of a step, by FACTS.figures."""


class Planner:
    """The steps of a configuration on any number of GPUs."""

    def __init__(self, config: PretrainPlanConfig | FinetunePlanConfig) -> None:
        self.config, self.gpu = config, SimpleNamespace(**FACTS.gpus[config.gpu])
        flops = peak_flops(config.gpu.upper(), config.engine.precision)
        self.peak = flops / 1e12 if flops else self.gpu.fp32
        exact = Rehearsal(config, "reference", False)
        self.gflops, self.model = exact.gflops(), exact.model
        self.costs = [Rehearsal(config, "auto", again).costs() for again in (False, True)]
        known = [num for word, num in FACTS.videos.items() if word in str(config.data).lower()]
        self.videos = config.videos or sum(known) or FACTS.some_videos

    def step(self, num_gpus: int, stage: int, again: int) -> Figures | None:
        """With the largest micro-batch; again: 1 with activation checkpointing. None where no video
        fits, or those of a step are no equal shares.
        """
        config, gpu = self.config, self.gpu
        optim, c, num_crops = config.optim, config.model, config.data.clips_per_video
        engine = replace(config.engine, zero_stage=stage, offload="none")
        told = deepspeed_config(replace(config, engine=engine), num_gpus)["zero_optimization"]
        width = 4 if engine.precision == "fp32" else 2
        weights = list(self.model.parameters())
        derived = zero_settings(stage, sum(p.numel() for p in weights if p.requires_grad))
        settings = {**FACTS.deepspeed, **derived, **told}
        memory, once, each = zero_costs(weights, width, stage, num_gpus, settings)
        encoder = self.model.get_submodule("encoder")
        teacher = (width + 4) * sum(p.numel() for p in encoder.parameters()) / 1e9
        teacher *= "Encoder" in self.gflops
        base, slope = self.costs[again]
        batch = FACTS.batches * c.num_tokens * c.tubelet_values / 1e9
        free = FACTS.usable * gpu.memory - memory.sum() - teacher - base[1]
        videos = optim.global_batch or optim.micro_batch * optim.accumulation * num_gpus
        most = min(MOST_SIZE, int(free / num_crops / (slope[1] + batch)))
        if videos % num_gpus or most < 1:
            return None
        cut = replace(optim, global_batch=videos, micro_batch=most).cut_for(num_gpus)
        micro_batch, accumulation = cut.micro_batch, cut.accumulation
        num_clips = micro_batch * num_crops
        kept, peak, moved, operations = base + num_clips * slope

        flops = accumulation * num_clips * self.gflops["Global"]
        products = flops / FACTS.products / self.peak * (FACTS.recomputed if again else 1)
        bandwidth = FACTS.bandwidth * gpu.bandwidth
        others, update = accumulation * moved / bandwidth, FACTS.update * memory[2] / bandwidth
        host = operations * FACTS.launch + len(weights) * FACTS.gather * (stage == 3)
        host = max(0, accumulation * host - products - others)
        reduced, gathered, scattered = traffic = once + accumulation * each
        sent = (2 * reduced + gathered + scattered) * (1 - 1 / num_gpus)
        link = sent / FACTS.links / gpu.link
        network = sent / FACTS.links / FACTS.networks[config.network]
        in_node = config.gpus / config.nodes if config.nodes else FACTS.gpus_a_node
        sending = max(link, network * (num_gpus > in_node))
        if settings["overlap_comm"]:
            # with the backward pass, which does not wait for what ZeRO 1 and 2 gather after it
            share = 1 if stage == 3 else 2 * reduced / (2 * reduced + gathered)
            sending -= min(share * sending, (products + others) * 2 / 3)
            host += FACTS.wait * (0, 1, accumulation, 0)[stage]
        times = products, others, host, update, sending
        total = sum(times)
        hours = (optim.steps or optim.epochs * self.videos / videos) * total / 3.6e6
        rate = 1e3 * accumulation * num_clips / total
        parts = [*memory, teacher, kept, peak - kept, batch * num_clips]
        figures = [
            num_gpus,
            stage,
            again,
            micro_batch,
            accumulation,
            *parts,
            sum(parts),
            *traffic,
            sent,
            link,
            network,
            *times,
            total,
            rate,
            rate * num_gpus,
            flops / total / self.peak,
            hours,
            hours * num_gpus,
        ]
        return dict(zip(FACTS.figures, figures, strict=True))

    def steps(self, num_gpus: int) -> list[Figures]:
        """In every ZeRO stage, without and with activation checkpointing, the fastest first."""
        found = [self.step(num_gpus, stage, again) for stage in range(4) for again in (0, 1)]
        return sorted(filter(None, found), key=itemgetter("ms a step"))


def start(config: PretrainPlanConfig | FinetunePlanConfig) -> int:
    """Prints the plan. Raises: ValueError for what cannot be planned."""
    config.optim.cut_for(config.gpus)
    is_even = config.gpus % (config.nodes or 1) == 0
    require(is_even, "nodes", config.nodes, f"must have equal shares of gpus = {config.gpus}")
    planner, num_gpus = Planner(config), config.gpus
    here, named = planner.steps(num_gpus), planner.model.named_parameters
    require(here != [], "gpus", num_gpus, "have no room for one clip")
    best = [steps[0] for steps in map(planner.steps, FACTS.scale) if steps]
    rate, most = here[0]["clips/s"] / 1e3, max(step["clips/s a GPU"] for step in best)
    end = next((step for step in best if step["clips/s a GPU"] < FACTS.pays * most), best[-1])
    lines = [
        f"# Plan: {one_line(Path(config.output).name)} on {num_gpus} x {config.gpu}\n",
        "| part | million parameters | GFLOP of a clip, forward and backward |\n|---|---|---|",
        *(
            f"| {FACTS.parts[name][0]} | "
            f"{sum(p.numel() for k, p in named() if k.startswith(FACTS.parts[name][1])) / 1e6:.5g} "
            f"| {gflop:.5g} |"
            for name, gflop in sorted(planner.gflops.items())
        ),
        f"\n## A step on {num_gpus} GPUs, the fastest first\n",
        *_table(here),
        f"\n## Loading for {rate * 1e3:.4g} clips/s\n\n| data | cores | cores a GPU | TB stored "
        f"| GB/s read | share with {FACTS.cores} cores a GPU |\n|---|---|---|---|---|---|",
        *_loading(planner, rate),
        "\n## The fastest step of each number of GPUs\n",
        f"At {end['GPUs']} GPUs a GPU does {end['clips/s a GPU'] / most:.0%} of what it does at "
        f"best; first in the way: {max(FACTS.losses, key=end.__getitem__)}. The most of these "
        f"numbers, up to {FACTS.scale[-1]}, that can share a step: {best[-1]['GPUs']}.\n",
        *_table(best),
        f"\n## Assumptions\n\n- {config.gpu}: {planner.peak:.4g} dense TFLOP/s, "
        f"{planner.gpu.memory:g} GB, {planner.gpu.bandwidth:g} TB/s, {planner.gpu.link:g} TB/s to "
        f"others of its machine ({planner.gpu.source}). {config.network}: "
        f"{FACTS.networks[config.network]:g} TB/s from a machine to others. The list has "
        f"{planner.videos} videos.",
        *(f"- {note.format(**vars(FACTS))}" for note in FACTS.notes),
        f"\n## The whole recipe\n\n```yaml\n{to_yaml(to_dict(config))}```",
    ]
    text = "\n".join(lines)
    print(text)
    if config.page:
        page = Path(config.page)
        plot = page.with_suffix(".png")
        write_text(page, f"{text}\n\n![scaling]({plot.name})\n")
        draw_or_tell(plot, lambda path: _draw(path, best))
    return 0


def _loading(planner: Planner, rate: float) -> list[str]:
    """A row of each form that videos have on disks. rate: clips a millisecond."""
    num_gpus, crops = planner.config.gpus, planner.config.data.clips_per_video
    rows = []
    for name, form in FACTS.forms.items():
        cores = rate * (form["decode"] / crops + form["crop"])  # those are milliseconds of one
        stored = FACTS.video_bytes * form["stored"] * planner.videos / 1e12
        read = FACTS.video_bytes * form["read"] * rate / crops / 1e6
        share = min(1, FACTS.cores * num_gpus / cores)
        rows.append(
            f"| {name} | {cores:.4g} | {cores / num_gpus:.3g} | {stored:.3g} | {read:.3g} "
            f"| {share:.0%} |"
        )
    return rows


def _table(steps: list[Figures]) -> list[str]:
    head, *lines = (
        f"| {name} | {' | '.join(f'{step[name]:.4g}' for step in steps)} |"
        for name in FACTS.figures
    )
    return [head, f"|---{'|---' * len(steps)}|", *lines]


def _draw(path: Path, best: list[Figures]) -> None:
    """Clips a second with the fastest step of each number of GPUs, and what its time goes to."""
    from matplotlib.figure import Figure

    figure = Figure((8, 8), layout="constrained")
    rates, times = figure.subplots(2)
    for step in best:
        rates.loglog(step["GPUs"], step["clips/s"], "k", marker=f"${step['ZeRO stage']}$")
    for name in FACTS.times:
        times.loglog([step["GPUs"] for step in best], [step[name] for step in best], label=name)
    times.legend()
    rates.set(ylabel="clips/s; marks: ZeRO stage")
    times.set(xlabel="GPUs", ylabel="milliseconds")
    figure.savefig(path, format="png")
