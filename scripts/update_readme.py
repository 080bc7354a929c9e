"""Writes the quickstart's table into the README and its figures into docs/images.

bash scripts/quickstart.sh && python scripts/update_readme.py
"""

import json
import shutil

from benchmarks import IMAGES, README, ROOT, write_section

RESULT = ROOT / "runs/quickstart/blocks.9.hook_resid_post"


def main() -> None:
    """Replace what stands between the markers, copy the figures."""
    report = json.loads((RESULT / "report.json").read_text(encoding="utf-8"))
    profile = json.loads((RESULT / "profile.json").read_text(encoding="utf-8"))
    effective = {w["name"]: w["effective_dimensions"] for w in profile["weights"]}
    lines = [
        "| dictionary | effective dimensions of its loss | FVU | CE recovered [95 %] | KL | L0 |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, arm in report["dictionaries"].items():
        low, high = arm["ce_recovered_interval"]
        lines.append(
            f"| `{name}` | {effective[name.rsplit('-k', 1)[0]]:.1f} of {profile['dimensions']} "
            f"| {arm['fvu']:.3f} | {arm['ce_recovered']:.3f} [{low:.3f}, {high:.3f}] "
            f"| {arm['kl']:.3f} | {arm['l0']:.0f} |"
        )
    first = next(iter(report["dictionaries"].values()))
    lines += [
        "",
        f"SmolLM2-135M-Instruct (4-bit file, computed in bfloat16), State of the Union addresses, "
        f"block 9, {profile['rows']:,} rows, 8 × width, one seed, measured on {first['rows']:,} "
        "held-out tokens. The intervals are over contexts, not over seeds.",
    ]
    write_section("quickstart table", "\n".join(lines), README)
    for name in ("profile.png", "fidelity.png"):
        shutil.copy(RESULT / name, IMAGES / name)


if __name__ == "__main__":
    main()
