"""Held-out accuracy and margin of the quickstart over several seeds.

    python benchmarks/quickstart_seeds.py --seeds 0 1 2 --output-dir runs/seeds

Prints one line a seed and the verdict: accuracy at least 0.70 and margin above two standard errors on each.
Exit status 0 if both hold. Takes three quickstarts.
"""

import argparse
from pathlib import Path

from jaxdpo import QuickstartConfig, run_quickstart


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args()
    lines, passed = [], True
    for seed in args.seeds:
        result = run_quickstart(QuickstartConfig(output_dir=str(args.output_dir / f"seed-{seed}"), seed=seed))
        assert result.after is not None  # the quickstart always has held-out data
        accuracy = result.after.metrics["eval_rewards/accuracies"]
        margin, error = result.after.metrics["eval_rewards/margins"], result.after.margin_standard_error
        passed &= accuracy >= 0.70 and margin > 2 * error
        lines.append(f"{seed:4d} {accuracy:9.3f} {margin:8.3f} {error:15.3f} {result.seconds:8.0f}")
    print(f"\n{'seed':>4} {'accuracy':>9} {'margin':>8} {'standard error':>15} {'seconds':>8}")
    print("\n".join(lines))
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
