"""`video-mae plan`: what a run computes, keeps, sends, reads and takes on some GPUs, without them.

Units of all figures: GB (10^9 bytes), milliseconds, GFLOP; so rates are TB/s and TFLOP/s.
"""

import math
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from video_mae.config.machines import FACTS
from video_mae.config.optim import OptimConfig, largest_divisor
from video_mae.config.plan import PlanConfig
from video_mae.config.schema import MOST_SIZE, require, to_dict
from video_mae.config.yaml_text import to_yaml
from video_mae.files import draw_or_tell, one_line, write_text
from video_mae.planning.loading import loading_rows, planned_sources
from video_mae.planning.rehearsal import Rehearsal
from video_mae.planning.zero import zero_costs
from video_mae.training.deepspeed_config import deepspeed_config, zero_settings
from video_mae.training.journal import peak_flops
from video_mae.training.optim import videos_of_epoch

Figures = dict[str, float]
"""Of a step, by FACTS.figures."""


class Planner:
    """The steps of a configuration on any number of GPUs."""

    def __init__(self, config: PlanConfig) -> None:
        self.config, self.gpu = config, SimpleNamespace(**FACTS.gpus[config.gpu])
        flops = peak_flops(config.gpu.upper(), config.engine.precision)
        self.peak = flops / 1e12 if flops else self.gpu.fp32
        self.sources = planned_sources(config)
        self.num_files = sum(source.num_files for source in self.sources)
        exact = Rehearsal(config, "reference", False)
        self.gflops, self.model = exact.gflops(), exact.model
        self.weights = list(self.model.parameters())
        self.num_trained = sum(p.numel() for p in self.weights if p.requires_grad)
        self.costs = [Rehearsal(config, "auto", again).costs() for again in (False, True)]
        self.width = 4 if config.engine.precision == "fp32" else 2
        encoder = self.model.get_submodule("encoder")
        teacher = (self.width + 4) * sum(p.numel() for p in encoder.parameters()) / 1e9
        self.teacher = teacher * ("Encoder" in self.gflops)
        self.gpus_a_node = config.gpus // config.nodes if config.nodes else FACTS.gpus_a_node

    def step(self, num_gpus: int, stage: int, again: int) -> Figures | None:
        """With the largest micro-batch; again: 1 with activation checkpointing. None where no video
        fits, or those of a step are no equal shares, too small ones to be mixed, or more than all.
        """
        config, optim = self.config, self.config.optim
        videos = optim.global_batch or optim.micro_batch * optim.accumulation * num_gpus
        share, rest = divmod(videos, num_gpus)
        engine = replace(config.engine, zero_stage=stage, offload="none")
        told = deepspeed_config(replace(config, engine=engine), num_gpus)
        derived = zero_settings(stage, self.num_trained)
        settings = {**FACTS.deepspeed, **derived, **told, **told["zero_optimization"]}
        for name in FACTS.deepspeed | derived:
            key, value = f"engine.extra.zero_optimization.{name}", settings[name]
            require(isinstance(value, int | float), key, value, "is not a number")
        of_zero, once, each = zero_costs(self.weights, self.width, stage, num_gpus, settings)
        updated = self.num_trained / 1e9 / (num_gpus if stage else 1)
        of_zero[2] += 4 * updated * (optim.ema > 0)
        nothing, one = (sum(self.memory(of_zero, again, num)) for num in (0, 1))
        free = FACTS.usable * self.gpu.memory - nothing
        most = min(MOST_SIZE, int(free / (one - nothing)))
        if rest or most < 1:
            return None
        micro_batch = largest_divisor(share, most)
        cut = replace(optim, micro_batch=micro_batch, accumulation=share // micro_batch)
        try:
            replace(config, optim=cut)
            epoch = videos_of_epoch(cut, self.num_files, num_gpus)
        except ValueError:  # a clip that has no other to be mixed with, or no whole step
            return None
        parts = self.memory(of_zero, again, micro_batch)
        volumes = once + cut.accumulation * each
        traffic = self.traffic(volumes, num_gpus)
        times = self.times(settings, again, cut, updated, volumes, max(traffic[1:]))
        total = sum(times)
        num_clips = share * config.data.clips_per_video
        rate = 1e3 * num_clips / total
        hours = (optim.steps or optim.epochs * epoch / videos) * total / 3.6e6
        figures = [
            num_gpus,
            stage,
            again,
            micro_batch,
            most,
            cut.accumulation,
            *parts,
            sum(parts),
            *volumes,
            *traffic,
            *times,
            total,
            rate,
            rate * num_gpus,
            num_clips * self.gflops["Global"] / total / self.peak,
            hours,
            hours * num_gpus,
        ]
        return dict(zip(FACTS.figures, figures, strict=True))

    def memory(self, of_zero: np.ndarray, again: int, micro_batch: int) -> list[float]:
        """GB on a GPU by part, in the order of FACTS.figures. of_zero: as `zero_costs` has it."""
        config, c = self.config, self.config.model
        num_clips = micro_batch * config.data.clips_per_video
        base, slope = self.costs[again]
        kept, peak, *_ = base + num_clips * slope
        clip = c.num_tokens * c.tubelet_values * (1 + config.data.sixteen_bit) / 1e9
        return [*of_zero, self.teacher, kept, peak - kept, FACTS.batches * num_clips * clip]

    def share_of_node(self, num_gpus: int) -> float:
        """GPUs of a machine: several machines have equal shares."""
        return num_gpus / math.ceil(num_gpus / self.gpus_a_node)

    def traffic(self, volumes: np.ndarray, num_gpus: int) -> tuple[float, float, float]:
        """What a GPU sends: GB; milliseconds of them within a machine, and between machines.

        volumes: GB that are all-reduced, gathered, reduced and scattered.
        """
        reduced, gathered, scattered = volumes
        sent = (2 * reduced + gathered + scattered) * (1 - 1 / num_gpus)
        in_node = self.share_of_node(num_gpus)
        link = sent / FACTS.links / self.gpu.link * (in_node > 1)
        of_node, of_gpu = FACTS.networks[self.config.network]
        network = sent / FACTS.links / (of_node + of_gpu * in_node) * (num_gpus > in_node)
        return sent, link, network

    def times(
        self,
        settings: dict[str, Any],
        again: int,
        cut: OptimConfig,
        updated: float,
        volumes: np.ndarray,
        sending: float,
    ) -> list[float]:
        """Milliseconds of a step by part, in the order of FACTS.times.

        cut: micro-batch and accumulation; updated: of 1e9 weights those that a GPU updates;
        volumes: as for `traffic`, in `sending` milliseconds.
        """
        stage, accumulation = settings["stage"], cut.accumulation
        num_clips = cut.micro_batch * self.config.data.clips_per_video
        base, slope = self.costs[again]
        *_, moved, operations = base + num_clips * slope
        products = accumulation * num_clips * self.gflops["Global"] / FACTS.products / self.peak
        products *= FACTS.recomputed if again else 1
        bandwidth = FACTS.bandwidth * self.gpu.bandwidth
        others, update = accumulation * moved / bandwidth, FACTS.update * updated / bandwidth
        host = operations * FACTS.launch + len(self.weights) * FACTS.gather * (stage == 3)
        host = max(0, accumulation * host - products - others)
        if stage and settings["overlap_comm"]:
            # with the backward pass, which does not wait for what ZeRO 1 and 2 gather after it
            reduced, gathered, _ = volumes
            share = 1 if stage == 3 else 2 * reduced / (2 * reduced + gathered)
            sending -= min(share * sending, (products + others + host) * 2 / 3)
            host += FACTS.wait * (0, 1, accumulation, 0)[stage]
        return [products, others, host, update, sending]

    def steps(self, num_gpus: int) -> list[Figures]:
        """In every ZeRO stage, without and with activation checkpointing, the fastest first."""
        found = [self.step(num_gpus, stage, again) for stage in range(4) for again in (0, 1)]
        return sorted(filter(None, found), key=itemgetter("ms a step"))


def start(config: PlanConfig) -> int:
    """Prints the plan. Raises: ValueError for what cannot be planned."""
    cut = config.optim.cut_for(config.gpus)
    # no configuration or picture, which it would replace
    require(
        not config.page or config.page.endswith(".md"), "page", config.page, "must end with .md"
    )
    is_even = config.gpus % (config.nodes or 1) == 0
    require(is_even, "nodes", config.nodes, f"must have equal shares of gpus = {config.gpus}")
    planner, num_gpus = Planner(config), config.gpus
    videos_of_epoch(cut, planner.num_files, num_gpus)
    here, named = planner.steps(num_gpus), planner.model.named_parameters
    require(here != [], "gpus", num_gpus, "have no room for one clip, or for one to mix it with")
    scale = sorted({*FACTS.scale, num_gpus})
    best = [steps[0] for steps in map(planner.steps, scale) if steps]
    rate, most = here[0]["clips/s"] / 1e3, max(step["clips/s a GPU"] for step in best)
    end = next((step for step in best if step["clips/s a GPU"] < FACTS.pays * most), best[-1])
    (of_node, of_gpu), in_node = FACTS.networks[config.network], planner.share_of_node(num_gpus)
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
        *loading_rows(config, planner.sources, rate),
        "\n## The fastest step of each number of GPUs\n",
        f"At {end['GPUs']} GPUs a GPU does {end['clips/s a GPU'] / most:.0%} of what it does at "
        f"best; first in the way: {max(FACTS.losses, key=end.__getitem__)}. The most of these "
        f"numbers, up to {scale[-1]}, that can share a step: {best[-1]['GPUs']}.\n",
        *_table(best),
        f"\n## Assumptions\n\n- {config.gpu}: {planner.peak:.4g} dense TFLOP/s, "
        f"{planner.gpu.memory:g} GB, {planner.gpu.bandwidth:g} TB/s, {planner.gpu.link:g} TB/s to "
        f"others of its machine ({planner.gpu.source}). {config.network}: "
        f"{of_node + of_gpu * in_node:g} TB/s from a machine of {in_node:g} GPUs to others.",
        *(
            f"- {source.key}: {source.num_files} {source.kind}, {one_line(source.origin)}."
            for source in planner.sources
        ),
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
