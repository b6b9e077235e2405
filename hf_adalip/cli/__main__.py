"""`python -m hf_adalip.cli`, as under accelerate launch."""

from . import main

main()
