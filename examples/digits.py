"""Claim: one shared mixture of adapters brings a backbone that never saw a digit to read them.

Trains and compares ten methods on real images, about five minutes on two CPU cores, no download.
The same as `surgery demo`; what it does is read in surgery/demo/digits.py.

    python examples/digits.py
"""

from surgery.demo.digits import run

if __name__ == "__main__":
    run()
