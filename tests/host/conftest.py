"""Every test in this folder runs inside the real host."""

from hosting import prepare_host

prepare_host()
