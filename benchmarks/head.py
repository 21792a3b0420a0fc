"""What does an int8 head cost a trained model, beside everything else that becomes int8?

The protocol and the data of `quality.py`, one seed and Wikitext-2: KL(float || int8) and the change
of the negative log-likelihood, with the head float, as `haq.quantize_model` leaves it, and int8.

    python benchmarks/head.py    about five minutes on 2 cores
"""

import harness
import quality
from quality import Protocol, Variant

from haq import QuantizationConfig

MODELS = ["tiny-opt", "tiny-opt-outliers", "tiny-mixtral-outliers"]
VARIANTS = [
    Variant("the head float", QuantizationConfig()),
    Variant("the head int8", QuantizationConfig(exclude=())),
]


def main() -> None:
    quick = harness.arguments(__doc__).quick
    quality.prepare()
    protocol = Protocol(128, 16, 8, (0,)) if quick else Protocol(128, 128, 96, (0,))
    facts = harness.card()
    harness.print_card(__doc__, facts)
    print("1e-4 nats per token")
    rows = [
        row
        for name in MODELS[: 1 if quick else None]
        for row in quality.measure(name, VARIANTS, ["wikitext2"], protocol)
    ]
    if not quick:
        harness.write("head", facts, rows=rows)


if __name__ == "__main__":
    main()
