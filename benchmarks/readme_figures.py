"""Write the figures of a demo run into README.md, docs/front.png and benchmarks/results/demo.json.

make demo && python benchmarks/readme_figures.py
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FORMATS = ("onnx", "openvino", "huggingface")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / "demo", help="what make demo wrote")
    demo = parser.parse_args().demo
    summary = json.loads((demo / "summary.json").read_text())
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, content in figures(summary, demo).items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        if not mark.search(text):
            sys.exit(f"README.md has no place <!-- {name} --> ... <!-- end -->")
        text = mark.sub(lambda found, content=content: found[1] + content + found[2], text)  # type: ignore[misc]
    readme.write_text(text)
    (ROOT / "benchmarks/results/demo.json").write_text(json.dumps(summary, indent=2) + "\n")
    shutil.copy(demo / "front.png", ROOT / "docs/front.png")


def figures(summary: dict[str, Any], demo: Path) -> dict[str, str]:
    """What belongs at each of README's marks."""
    loose_ms, runtime = round(summary["budget"]["tpot_ms"] * 1.08, 1), summary["budget"]["runtime"]
    return {
        "comparison": comparison(summary),
        "budget": budget(summary["budget"]),
        "baselines": baselines(summary),
        "seconds": seconds(summary),
        "latency error": latency_error(summary["latency_error"]),
        "quality error": quality_error(summary["quality_error"]),
        "query": f"On the demo's database, `nas query --study demo --runtime {runtime} --tpot-ms {loose_ms}` prints"
        f"\n\n```\n{query(demo, runtime, loose_ms)}\n```\n\nand with `--tpot-ms 0.5` it ends with exit code 1 and"
        f"\n\n```\n{query(demo, runtime, 0.5)}\n```",
    }


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def comparison(summary: dict[str, Any]) -> str:
    full, chosen, budget = summary["full"], summary["chosen"], summary["budget"]
    predicted = chosen["predicted"]
    rows = [
        ("parameters", *(f"{side['parameters'] / 1e6:.1f} M" for side in (full, chosen))),
        ("weights", *(side["precision"] for side in (full, chosen))),
        (
            f"perplexity, WikiText-2 test (fp32 model: {full['perplexity_fp32']:.1f})",
            *(f"{side['perplexity']:.1f}" for side in (full, chosen)),
        ),
        (
            f"TPOT predicted, {budget['runtime']}",
            "",
            f"{predicted['tpot_ms']:.2f} ms [{predicted['low']:.2f}, {predicted['high']:.2f}]",
        ),
        (f"TPOT budget, {budget['runtime']}", "", f"{budget['tpot_ms']:.2f} ms"),
        (
            f"TPOT re-measured, {budget['runtime']}, at the profile's speed",
            "",
            f"{budget['remeasured_tpot_ms']:.2f} ms",
        ),
    ]
    for name in FORMATS:
        both = [side["files"][name] for side in (full, chosen)]
        rows += [
            (f"{name}: size", *(f"{row['size_bytes'] / 1e6:.0f} MB" for row in both)),
            (
                f"{name}: TTFT, 128 tokens",
                *(f"{row['ttft_ms']:.0f} ± {row['ttft_spread_ms']:.0f} ms" for row in both),
            ),
            (
                f"{name}: TPOT, context 128",
                *(f"{row['tpot_ms']:.2f} ± {row['tpot_spread_ms']:.2f} ms" for row in both),
            ),
            (f"{name}: largest logit difference", *(f"{row['max_logit_difference']:.0e}" for row in both)),
        ]
    said = (side["files"][FORMATS[0]]["generated"] for side in (full, chosen))
    rows.append(("after “The capital of France is”", *(" ".join(text.split())[:150] for text in said)))
    return table(("", "full model", "chosen subnet"), rows)


def budget(budget: dict[str, Any]) -> str:
    met = "meets" if budget["met"] else "MISSES"
    return (
        f"The exported file for {budget['runtime']} {met} its budget: {budget['remeasured_tpot_ms']:.2f} ms of "
        f"{budget['tpot_ms']:.2f}, told at the profile's speed by what the profile's own references take beside it. "
        f"By the clock it took {budget['clock_tpot_ms']:.2f} ms, and "
        f"{budget['share_of_full_in_same_run']:.0%} of the full model's time in the same interleaved run, where 85 % "
        "are allowed. What the clock says moves with what else the shared host does."
    )


def baselines(summary: dict[str, Any]) -> str:
    perplexity, onnx = summary["perplexity_baselines"], summary["chosen"]["files"]["onnx"]
    return (
        f"At that TPOT a uniform FFN width ({summary['uniform_width']} in every layer) gives perplexity "
        f"{perplexity['uniform_width_same_tpot']:.1f}, where the chosen subnet, as the search saw it, gives "
        f"{perplexity['chosen_as_searched']:.1f}; without least squares it gives "
        f"{perplexity['chosen_without_reformation']:.1f}, and fitted in sequence, as exported, the figure above. "
        f"The logits of all three files equal those of the active "
        f"supernet; for ONNX that is with fp32 activations, since onnxruntime's fast int4 path rounds activations to "
        f"int8 (mean KL {onnx['shipped_mean_kl']:.1e} as shipped)."
    )


def seconds(summary: dict[str, Any]) -> str:
    spent = dict(summary["seconds"])
    minutes = spent.pop("total") / 60
    steps = ", ".join(f"{step} {value:.0f}" for step, value in spent.items())
    return (
        f"The run took {minutes:.0f} minutes and at most {summary['peak_memory_bytes'] / 2**30:.1f} GiB. "
        f"Seconds of its steps: {steps}."
    )


def latency_error(errors: dict[str, Any]) -> str:
    head = ("on graphs that no predictor was fitted on", "MAPE", "within ±10 %", "Spearman", "repeat noise")
    rows = [
        (
            f"{runtime}, {phase}: {error['samples']}",
            f"{error['mape']:.1%}",
            f"{error['within_10']:.0%}",
            f"{error['spearman']:.3f}",
            f"{error['repeat_noise']:.1%}",
        )
        for runtime, phases in errors.items()
        for phase, error in phases.items()
    ]
    return table(head, rows)


def quality_error(error: dict[str, float]) -> str:
    return (
        "The quality predictor's rank correlation with the true KL on trials held out in turn is "
        f"{error['spearman']:.4f}, the additive estimate's {error['additive_spearman']:.4f}."
    )


def query(demo: Path, runtime: str, tpot_ms: float) -> str:
    """What the command prints for people, on whichever stream."""
    call = [sys.executable, "-m", "nas", "query", "--study", "demo", "--tpot-ms", str(tpot_ms)]
    call += ["--runtime", runtime, "--database", str(demo / "llm-nas.db")]
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    result = subprocess.run(call, capture_output=True, text=True, env=environment, cwd=ROOT)
    return result.stdout.rstrip("\n") or " ".join(result.stderr.split())


if __name__ == "__main__":
    main()
