"""Sets a run on planted data beside the best that any model could do: demo_summary.py TRUTH.json SUMMARY.json"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Prints a line per held-out set."""
    truth, summary = (json.loads(Path(path).read_text()) for path in sys.argv[1:3])
    reached = {"val": summary["val_auroc"][-1], "test": summary["test_auroc"]}
    print("set    AUROC    best possible")
    for stage, auroc in reached.items():
        print(f"{stage:<5}  {auroc:.4f}   {truth[f'{stage}_auroc']:.4f}")


if __name__ == "__main__":
    main()
