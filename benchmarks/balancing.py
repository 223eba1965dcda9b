"""The quickstart's tasks under every weighting, with one budget of optimizer steps: what each task comes to.

    python benchmarks/balancing.py [--steps 150] [--seeds 1 2 3] [--modes case3 famo] [--output DIR]

Prints a table: validation loss of each task, their mean, and the worst task, each as mean and standard deviation over
the seeds; and how far the mean and the worst are from those of case3 with the same seed. ``balancing.csv`` has every
run, ``balancing.png`` the validation curves. A seed decides the split, the batches and the random weights, so runs of
one seed differ in the weighting alone. docs/balancing.md records the figures.
"""

import argparse
import csv
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("text_to_code", "code_explanation", "unit_tests")
# CoBa looks back over a third of the run, after a warm-up of a seventh: its defaults are for longer ones
MODES: dict[str, list[str]] = {
    **{f"case{number}": [] for number in (1, 2, 3, 4)},
    "coba": ["--model.coba.warmup_steps=20", "--model.coba.history_length=50"],
    "famo": [],
}
Curves = dict[int, dict[str, float]]


def run(mode: str, seed: int, steps: int, directory: Path) -> Curves:
    """Train; the validation losses by step, by task and their mean."""
    output = directory / f"{mode}-{seed}"
    words = [sys.executable, "-m", "mft_lightning", "fit", "--config", "configs/quickstart.yaml"]
    words += [f"--output_dir={output}", f"--seed_everything={seed}", f"--trainer.max_steps={steps}"]
    words += [f"--model.weighted_loss_mode={mode}", *MODES[mode], "--evaluation.steps=10"]
    words += ["--evaluation.exact_match_per_task=null", "--evaluation.samples_per_task=0"]
    words += ["--checkpoint.save_total_limit=1"]
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    with (output / "metrics.csv").open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["val/loss"]]
    names = ("val/loss", *(f"val/loss/{task}" for task in TASKS))
    return {int(row["step"]): {name.removeprefix("val/loss/"): float(row[name]) for name in names} for row in rows}


def summary(curves: Curves) -> dict[str, float]:
    """What a run came to."""
    last = curves[max(curves)]
    return {**{task: last[task] for task in TASKS}, "mean": last["val/loss"], "worst": max(last[t] for t in TASKS)}


def spread(values: list[float], sign: str = "") -> str:
    return f"{mean(values):{sign}.3f} ± {stdev(values) if len(values) > 1 else 0:.3f}"


def print_table(found: dict[str, list[dict[str, float]]]) -> None:
    columns = [*TASKS, "mean", "worst"]
    print(f"| weighting | {' | '.join(columns)} | mean - case3 | worst - case3 |")
    print(f"|---{'|---' * (len(columns) + 2)}|")
    for mode, runs in found.items():
        cells = [spread([one[column] for one in runs]) for column in columns]
        for column in ("mean", "worst"):
            apart = [one[column] - other[column] for one, other in zip(runs, found["case3"], strict=True)]
            cells.append("" if mode == "case3" else spread(apart, "+"))
        print(f"| {mode} | {' | '.join(cells)} |")


def draw(curves: dict[str, list[Curves]], file: Path) -> None:
    """Mean over the seeds and their range: a panel for each task, and one for their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 4, figsize=(18, 4.5), layout="constrained")
    for panel, name in zip(panels, (*TASKS, "val/loss"), strict=True):
        for mode, runs in curves.items():
            steps = sorted(runs[0])[1:]
            values = [[one[step][name] for one in runs] for step in steps]
            (line,) = panel.plot(steps, [mean(at) for at in values], label=mode, linewidth=1.5)
            lowest, highest = [min(at) for at in values], [max(at) for at in values]
            panel.fill_between(steps, lowest, highest, color=line.get_color(), alpha=0.12, linewidth=0)
        panel.set(title="mean over tasks" if name == "val/loss" else name, xlabel="optimizer step", yscale="log")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("validation loss (NLL per token)")
    panels[-1].legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="case3 among them")
    parser.add_argument("--at_once", type=int, default=2, help="runs side by side")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "balancing", help="a new directory")
    given = parser.parse_args()
    if "case3" not in given.modes:
        parser.error("--modes: case3, with which the others are compared, is not among them")
    directory = given.output.absolute()
    if directory.exists():
        parser.error(f"--output: {directory} is there already")
    directory.mkdir(parents=True)
    jobs = [(mode, seed) for seed in given.seeds for mode in given.modes]
    with ThreadPoolExecutor(given.at_once) as pool:
        results = pool.map(lambda job: run(*job, given.steps, directory), jobs)
    curves: dict[str, list[Curves]] = defaultdict(list)
    for (mode, _), found in zip(jobs, results, strict=True):
        curves[mode].append(found)
    curves = {mode: curves[mode] for mode in given.modes}
    print_table({mode: [summary(one) for one in runs] for mode, runs in curves.items()})
    with (directory / "balancing.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["weighting", "seed", "step", *TASKS, "mean"])
        for mode, runs in curves.items():
            for seed, one in zip(given.seeds, runs, strict=True):
                for step, row in one.items():
                    writer.writerow([mode, seed, step, *(row[task] for task in TASKS), row["val/loss"]])
    draw(curves, directory / "balancing.png")


if __name__ == "__main__":
    main()
