"""What the commands print: the fields of their JSON objects, and tables for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table

from hw_profiles import Workload
from hw_profiles.staleness import ProfileSummary
from nas.quality import Quality

if TYPE_CHECKING:  # they bring torch
    from export import Verification
    from export.artefact import TextQuality
    from nas.budget import Answer
    from nas.latency import LatencyModel
    from nas.memory import MemoryProfile
    from nas.refinement import Refinement
    from nas.space import SearchSpace
    from nas.study import Trial
    from nas.subnet import Subnet
    from nas.supernet_tuning import TunedSupernet
    from nas.tasks import Score
    from nas.tuned import Tuned

Fields = dict[str, Any]


def whole_column(head: str, values: Sequence[str]) -> Column:
    """Of what is copied into the next command: other columns give way where a terminal is narrow."""
    return Column(head, no_wrap=True, min_width=max(map(len, [head, *values])))


def workload_name(workload: Workload) -> str:
    return f"{workload.phase} {workload.tokens}" + (f" x {workload.batch_size}" if workload.batch_size > 1 else "")


def summary_fields(summary: ProfileSummary) -> Fields:
    """One target of `nas devices`."""
    return {
        "device": summary.target.device_id,
        "target": summary.target.key,
        "graphs": summary.graphs,
        "memory_graphs": summary.memory_graphs,
        "measurements": summary.measurements,
        "workloads": [workload_name(workload) for workload in summary.workloads],
        "repeat_noise": {workload_name(workload): noise for workload, noise in summary.repeat_noise.items()},
        "runtime_version": summary.runtime_version,
        "last": summary.last.isoformat(timespec="seconds"),
        "stale": summary.is_stale,
    }


def profiled(summaries: Sequence[ProfileSummary]) -> Table:
    columns = ("target", "graphs", "for memory", "workload", "repeat noise", "runtime version", "last")
    device = whole_column("device", [summary.target.device_id for summary in summaries])
    table = Table(device, *columns, title="Profiled")
    for summary in summaries:
        fields = summary_fields(summary)
        noises = [summary.repeat_noise.get(workload) for workload in summary.workloads]
        table.add_row(
            summary.target.device_id,
            summary.target.key,
            str(summary.graphs),
            str(summary.memory_graphs),
            "\n".join(fields["workloads"]),
            "\n".join("" if noise is None else f"{noise:.1%}" for noise in noises),
            summary.runtime_version + ("\nSTALE" if summary.is_stale else ""),
            fields["last"],
        )
    return table


def timed(rows: Sequence[Fields]) -> Table:
    """The targets and workloads of one `nas profile`."""
    leaning = ("leans on", "error") if rows and "leans_on" in rows[0] else ()
    table = Table("target", "workload", "full model ms", "graphs", *leaning, title="Profile")
    for row in rows:
        workload = Workload(row["phase"], row["tokens"], row["batch_size"])
        found = (row["leans_on"] or "itself", f"{row['held_out_error']:.1%}") if leaning else ()
        table.add_row(row["target"], workload_name(workload), f"{row['full_ms']:.2f}", str(row["graphs"]), *found)
    return table


def memory_fields(found: MemoryProfile) -> Fields:
    """What `nas profile` measured of the memory of one target; energy only where the machine tells it."""
    return {
        "target": found.target.key,
        "measurements": found.measurements,
        "without_model_bytes": found.baseline_bytes,
        "full_bytes": {workload_name(work): size for work, size in found.full_bytes.items()},
        "full_joules_per_token": _joules_per_token(found.full_step_joules),
        "held_out": len(found.held_out),
        "mape": found.mape,
    }


def memory(rows: Sequence[Fields]) -> Table:
    table = Table("target", "workload", "full model MB", "without a model", "held-out error", title="Peak memory")
    for row in rows:
        table.add_row(
            row["target"],
            "\n".join(row["full_bytes"]),
            "\n".join(f"{size / 1e6:.0f}" for size in row["full_bytes"].values()),
            f"{row['without_model_bytes'] / 1e6:.0f}",
            "" if row["mape"] is None else f"{row['mape']:.1%}",
        )
    return table


def space_fields(space: SearchSpace, latency: LatencyModel) -> Fields:
    """How many subnets a search may choose from, and three of them with their predicted latency."""
    members = {"smallest": space.smallest, "middle": space.middle, "full": space.full(max(space.bits_choices))}
    predicted = latency.predict(list(members.values()))
    return {"subnets": space.size} | {
        name: {
            "parameters": space.model_shape(subnet).parameters,
            "precision": subnet.description,
            "bits": subnet.bits,
            "value_ms": float(predicted.value_ms[i]),
            "low_ms": float(predicted.low_ms[i]),
            "high_ms": float(predicted.high_ms[i]),
        }
        for i, (name, subnet) in enumerate(members.items())
    }


def space(fields: Fields) -> str:
    members = []
    for name in ("smallest", "middle", "full"):
        member = fields[name]
        members.append(f"{name} {member['parameters'] / 1e6:.3g} M, {member['precision']}, {member['value_ms']:.3g} ms")
    return f"{float(fields['subnets']):.1e} subnets: {'; '.join(members)}"


def trial_fields(trial: Trial, latency: Mapping[str, float]) -> Fields:
    """One of a search; `latency` by the name of the objective."""
    return {
        "id": trial.subnet.id,
        "precision": trial.subnet.description,
        "bits": trial.subnet.bits,
        "role": trial.role,
        **_quality_fields(trial.quality),
        **latency,
    }


def _quality_fields(quality: Quality) -> Fields:
    """Without the loss of tasks where a search goes by KL."""
    of_tasks = {} if quality.task_loss is None else {"task_loss": quality.task_loss}
    return {"kl": quality.kl, "perplexity": quality.perplexity, **of_tasks}


def trials(study_name: str, rows: Sequence[Fields], count: int = 12) -> Table:
    """The best of a search, by the rows' `kl`, or `task_loss` where they have it."""
    best = sorted(rows, key=lambda row: float(row["task_loss" if "task_loss" in row else "kl"]))[:count]
    others = (name for name in rows[0] if name != "id")
    table = Table(whole_column("subnet", [row["id"] for row in best]), *others, title=f"Study {study_name}")
    for row in best:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    return table


def refined_fields(subnet: Subnet, found: Refinement, before_ms: float, after_ms: float) -> Fields:
    """What `nas refine` made of a subnet; both qualities are of fitted weights, on the search text."""
    return {
        "subnet": found.subnet.id,
        "from": subnet.id,
        "precision": found.subnet.description,
        "rounds": found.rounds,
        "kl": {"before": found.before.kl, "after": found.after.kl},
        "perplexity": {"before": found.before.perplexity, "after": found.after.perplexity},
        "value_ms": {"before": float(before_ms), "after": float(after_ms)},
    }


def refined(fields: Fields) -> Table:
    same = fields["subnet"] == fields["from"]
    title = f"Subnet {fields['from']}: nothing better" if same else f"Subnet {fields['subnet']}, {fields['precision']}"
    table = Table("fitted", fields["from"], fields["subnet"], title=title)
    for name in ("kl", "perplexity", "value_ms"):
        table.add_row(name, *(f"{fields[name][when]:.4g}" for when in ("before", "after")))
    return table


def answer_fields(answer: Answer) -> Fields:
    """What `nas query` found."""
    latencies = {
        "tpot_ms" if workload.phase == "decode" else "ttft_ms": {
            "value": latency.value_ms,
            "low": latency.low_ms,
            "high": latency.high_ms,
            "measured": latency.measured_ms,
        }
        for workload, latency in answer.latencies.items()
    }
    memory = answer.memory
    return {
        "subnet": answer.subnet.id,
        "precision": answer.subnet.description,
        "bits": answer.subnet.bits,
        **_quality_fields(answer.quality),
        "parameters": answer.parameters,
        "parameters_ratio": answer.parameters_ratio,
        "size_bytes": answer.size_bytes,
        "memory_bytes": None
        if memory is None
        else {
            "value": memory.value_bytes,
            "low": memory.low_bytes,
            "high": memory.high_bytes,
            "without_model": memory.baseline_bytes,
        },
        "layers": json.loads(answer.subnet.to_json())["layers"],
        **latencies,
        **({"joules_per_token": _joules_per_token(memory.step_joules)} if memory and memory.step_joules else {}),
    }


def _joules_per_token(step_joules: Mapping[Workload, float]) -> dict[str, float]:
    """A step feeds every sequence one token, or its whole prompt."""
    fed = {work: work.batch_size * (work.tokens if work.phase == "prefill" else 1) for work in step_joules}
    return {workload_name(work): joules / fed[work] for work, joules in step_joules.items()}


def answer(found: Answer) -> Table:
    table = Table("", "value", title=f"Subnet {found.subnet.id}, {found.subnet.description}")
    table.add_row("KL to the full model", f"{found.quality.kl:.4f}")
    table.add_row("perplexity (search text)", f"{found.quality.perplexity:.2f}")
    table.add_row("parameters", f"{found.parameters / 1e6:.1f} M ({found.parameters_ratio:.0%})")
    table.add_row("weights", f"{found.size_bytes / 1e6:.1f} MB")
    for workload, latency in found.latencies.items():
        measured = "" if latency.measured_ms is None else f", measured {latency.measured_ms:.2f}"
        predicted = f"{latency.value_ms:.2f} ms [{latency.low_ms:.2f}, {latency.high_ms:.2f}]{measured}"
        table.add_row(workload_name(workload), predicted)
    if (memory := found.memory) is not None:
        sizes = (memory.value_bytes, memory.low_bytes, memory.high_bytes, memory.baseline_bytes)
        value, low, high, baseline = (f"{size / 1e6:.0f}" for size in sizes)
        table.add_row("peak memory", f"{value} MB [{low}, {high}], {baseline} of it without a model")
        for name, joules in _joules_per_token(memory.step_joules).items():
            table.add_row(f"energy, {name}", f"{joules:.3g} J a token")
    return table


def tuned_fields(tuned: Tuned, folder: Path) -> Fields:
    """What `nas tune` did; both qualities are on the text that the study's search saw."""
    return {
        "folder": str(folder),
        "subnet": tuned.subnet.id,
        "precision": tuned.subnet.precision,
        "method": tuned.settings.method,
        "kl": {"before": tuned.before.kl, "after": tuned.after.kl},
        "perplexity": {"before": tuned.before.perplexity, "after": tuned.after.perplexity},
        "pruned": None if tuned.pruned is None else {"kl": tuned.pruned.kl, "perplexity": tuned.pruned.perplexity},
        "sparsity": tuned.sparsity,
        "steps": tuned.steps,
        "tokens": tuned.tokens,
        "seconds": tuned.seconds,
        "ranks": dict(tuned.ranks),
    }


def tuned(tuned: Tuned, folder: Path) -> Table:
    title = f"{folder}: {tuned.subnet.id} at {tuned.subnet.precision} by {tuned.settings.method}, {tuned.steps} steps"
    states = {"before": tuned.before, "pruned": tuned.pruned, "tuned": tuned.after}
    known = {name: quality for name, quality in states.items() if quality is not None}
    table = Table("", *known, title=title, caption="On the text of the search; nas export judges on unseen text.")
    table.add_row("KL to the full model, nats", *(f"{quality.kl:.4f}" for quality in known.values()))
    table.add_row("perplexity", *(f"{quality.perplexity:.2f}" for quality in known.values()))
    blanks = [""] * (len(known) - 1)
    if tuned.settings.sparsity:
        table.add_row("zeros in the projections", *blanks, f"{tuned.sparsity:.2%}, which no runtime here gains from")
    table.add_row("tokens, seconds", *blanks, f"{tuned.tokens:,}, {tuned.seconds:,.0f}")
    return table


def tuned_supernet_fields(tuned: TunedSupernet, folder: Path) -> Fields:
    """What `nas tune --subnet all` did to some of them, on the text that the study's search saw."""
    return {"folder": str(folder), **asdict(tuned)}


def tuned_supernet(tuned: TunedSupernet, folder: Path) -> Table:
    title = f"{folder}: all subnets, {tuned.steps} steps, {tuned.tokens:,} tokens, {tuned.seconds:,.0f} seconds"
    table = Table("subnet, at 32 bits", "KL before", "after", title=title)
    for name, (before, after) in tuned.kl.items():
        table.add_row(name, f"{before:.4f}", f"{after:.4f}")
    return table


def judged_fields(
    subnet: Subnet,
    quality: TextQuality,
    scores: Mapping[str, Mapping[str, Score]],
    full: Mapping[str, Mapping[str, Score]],
) -> Fields:
    """A subnet beside the full model, on unseen text and on tasks."""
    return {
        "subnet": subnet.id,
        "precision": subnet.precision,
        **asdict(quality),
        "tasks": {
            task: {name: {"subnet": asdict(score), "full": asdict(full[task][name])} for name, score in metrics.items()}
            for task, metrics in scores.items()
        },
    }


def judged(fields: Fields) -> Table:
    title = f"Subnet {fields['subnet']} at {fields['precision']}; {fields['tokens']:,} tokens of unseen text"
    table = Table("", "full model", "subnet", title=title)
    table.add_row("perplexity", f"{fields['full_perplexity']:.2f}", f"{fields['perplexity']:.2f}")
    table.add_row("KL to the full model, nats", "", f"{fields['kl']:.4f}")
    for task, metrics in fields["tasks"].items():
        for name, scores in metrics.items():
            cells = (_score(scores[which]) for which in ("full", "subnet"))
            table.add_row(f"{task}, {name}, {scores['full']['items']} items", *cells)
    return table


def _score(score: Fields) -> str:
    return f"{score['value']:.1%}" + ("" if score["stderr"] is None else f" ± {score['stderr']:.1%}")


def verification_fields(
    result: Verification,
    prefill: Workload,
    decode: Workload,
    limits_ms: Mapping[Workload, float],
    max_memory_bytes: int | None,
) -> Fields:
    """One folder of `nas verify`; a limit holds for the latency at the profile's speed where that is known."""

    tpot, ttft = result.timings[decode], result.timings[prefill]
    peak_bytes = result.peak_memory_bytes
    fits = max_memory_bytes is None or (peak_bytes is not None and peak_bytes <= max_memory_bytes)
    return {
        "directory": str(result.directory),
        "format": result.manifest.format,
        "precision": result.manifest.precision,
        "size_bytes": result.size_bytes,
        "max_logit_difference": result.exact.max_logit_difference,
        "mean_kl": result.exact.mean_kl,
        "shipped_max_logit_difference": result.shipped.max_logit_difference,
        "shipped_mean_kl": result.shipped.mean_kl,
        "parity_holds": result.parity_holds,
        "prefill_tokens": prefill.tokens,
        "decode_tokens": decode.tokens,
        "ttft_ms": ttft.median_ms,
        "ttft_spread_ms": ttft.spread_ms,
        "ttft_at_profile_speed_ms": result.at_profile_speed_ms(prefill),
        "tpot_ms": tpot.median_ms,
        "tpot_spread_ms": tpot.spread_ms,
        "tpot_at_profile_speed_ms": result.at_profile_speed_ms(decode),
        "peak_memory_bytes": peak_bytes,
        "within_budget": fits and all(result.judged_ms(work)[0] <= limit_ms for work, limit_ms in limits_ms.items()),
        "generated": result.generated,
    }


def verifications(rows: Sequence[Fields]) -> Table:
    table = Table(
        whole_column("folder", [row["directory"] for row in rows]), "precision", "MB", "max logit diff", "mean KL",
        "as shipped", "TTFT ms", "TPOT ms", "at the profile's speed", "peak MB", "parity", "budget",
    )  # fmt: skip
    for row in rows:
        at_profile_speed = [row["ttft_at_profile_speed_ms"], row["tpot_at_profile_speed_ms"]]
        table.add_row(
            row["directory"],
            row["precision"],
            f"{row['size_bytes'] / 1e6:.1f}",
            f"{row['max_logit_difference']:.1e}",
            f"{row['mean_kl']:.1e}",
            f"{row['shipped_mean_kl']:.1e}",
            f"{row['ttft_ms']:.1f}",
            f"{row['tpot_ms']:.2f}",
            ", ".join("" if value is None else f"{value:.2f}" for value in at_profile_speed).strip(", "),
            "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e6:.0f}",
            *("yes" if row[name] else "NO" for name in ("parity_holds", "within_budget")),
        )
    return table
