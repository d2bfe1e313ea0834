"""Random sequences of unprivileged instructions that fault nowhere and whose result is defined, as machine code.

A sequence may change any register but RSI, which points to its data, and RSP. The generator knows what the manuals
leave undefined: an instruction that reads an undefined flag gets a CMP in front of it, and `Sequence.undefined` says
which flags mean nothing at the end. What Unicorn 2.1 does wrong is treated alike, and named where that is.
"""
